"""Extraction by way of a device gives factors as good as the CPU's; the device is a CPU here."""

from __future__ import annotations

import numpy as np
import pytest

import sdops
from sdops.errors import UsageError
from sdops.verbs import extract as module
from tests import tiny


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture
def files(tmp_path):
    base = tiny.checkpoint(0)
    random = np.random.default_rng(0)
    tuned = {
        key: tiny.encoded(tiny.numbers(tensor) + 0.003 * random.standard_normal(tensor[1].shape), "F16")
        if tensor[0] == "F16"
        else tensor
        for key, tensor in base.items()
    }
    return tiny.write(tmp_path / "tuned.safetensors", tuned), tiny.write(tmp_path / "base.safetensors", base)


def test_factors_are_as_good_as_those_of_the_cpu(files, device, tmp_path, monkeypatch):
    tuned, base = files
    path = tmp_path / "cpu.safetensors"
    cpu = sdops.extract(tuned, base=base, output=path, rank=3, conv_rank=2, hash_inputs=False)
    import sdops.verbs._extract_device as way

    through = way.factorise_on_device
    monkeypatch.setattr(way, "factorise_on_device", lambda *given: through(*given[:-1], device))
    monkeypatch.setattr(module, "check_device", lambda _: None)
    path = tmp_path / "device.safetensors"
    made = sdops.extract(tuned, base=base, output=path, rank=3, conv_rank=2, hash_inputs=False, device="cuda")
    assert {key: t[1].shape for key, t in tiny.load(path).items()} == {
        key: t[1].shape for key, t in tiny.load(tmp_path / "cpu.safetensors").items()
    }
    ours, theirs = captured(made), captured(cpu)
    assert ours.keys() == theirs.keys()
    assert all(ours[name] == pytest.approx(theirs[name], abs=2e-3) for name in theirs)


def captured(report):
    return {(layer["component"], layer["module"]): layer["captured"] for layer in report.data["layers"]}


def test_without_a_rank_it_is_refused(files, monkeypatch):
    monkeypatch.setattr(module, "check_device", lambda _: None)
    with pytest.raises(UsageError, match="needs a fixed rank"):
        sdops.extract(files[0], base=files[1], device="cuda")

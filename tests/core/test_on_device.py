"""The way through a device gives the bytes of the CPU. The device is a CPU here: the kernels' torch functions work."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

import sdops
from fixtures import loras
from sdops.core import accel
from sdops.core.applied_on_device import AppliedOnDevice
from sdops.core.on_device import MergedOnDevice
from sdops.core.run import run
from sdops.core.sink import SafetensorsSink
from sdops.errors import FormatError, UsageError
from sdops.verbs.merge import Merge
from tests import tiny


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    made = []
    for seed, name in enumerate("abc"):
        rng, base = np.random.default_rng([seed, 1]), np.random.default_rng(0)
        model = {}
        for key, spec in tiny.checkpoint(0, "F16").items():
            values = base.standard_normal(spec[1].shape) * 0.03 + rng.standard_normal(spec[1].shape) * 1e-3
            model[key] = tiny.encoded(values, "F16")
        made.append(tiny.write(folder / f"{name}.safetensors", model))
    return made


def on_device(made, device, path, portion=3000):
    assert isinstance(made, Merge)
    method = made.computed.method
    merged = MergedOnDevice(made.plan, method, device=device, seed=7)
    merged.small, merged.portion = 16, portion
    with SafetensorsSink(path, merged.specs, {}, force=True) as sink:
        run(merged, sink, jobs=2)
        sink.commit({})
    return merged


CASES = [
    ("weighted-sum", 2, {"alpha": 0.3}),
    ("weighted-sum", 2, {"alpha": "0.3, IN00-IN05=0.9, vae=0"}),
    ("add-difference", 3, {"alpha": 0.7}),
    ("dare-linear", 2, {"density": 0.4, "weights": (1.0, -0.3)}),
    ("dare-ties", 2, {"density": 0.4}),
    ("ties", 2, {"density": 0.3, "min_numel": 100}),
    ("ties", 2, {}),
]


@pytest.mark.parametrize(("method", "count", "knobs"), CASES, ids=[f"{m}-{n}" for n, (m, *_) in enumerate(CASES)])
def test_the_bytes_of_the_cpu(models, device, tmp_path, method, count, knobs):
    base = {"base": models[2]} if method.startswith(("dare", "ties")) else {}
    made = sdops.merge(*models[:count], method=method, seed=7, **base, **knobs)
    on_device(made, device, tmp_path / "device.safetensors")
    made.save(tmp_path / "cpu.safetensors", hash_inputs=False)
    found, wanted = tiny.load(tmp_path / "device.safetensors"), tiny.load(tmp_path / "cpu.safetensors")
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if not tiny.same(found[key], wanted[key])] == []


def test_what_is_no_number_is_named(models, device, tmp_path):
    broken = dict(tiny.load(models[1]))
    key = next(key for key, (_, values) in broken.items() if values.size > 1000)
    values = broken[key][1].copy()
    values.reshape(-1)[77] = 0x7E00 if values.dtype.kind in "ui" else np.nan
    broken[key] = broken[key][0], values
    made = sdops.merge(models[0], tiny.write(tmp_path / "x.safetensors", broken), alpha=0.3)
    with pytest.raises(FormatError, match="NaN"):
        on_device(made, device, tmp_path / "out.safetensors")


def test_methods_without_a_kernel_are_refused(models):
    made = sdops.merge(*models[:2], method="slerp")
    with pytest.raises(UsageError, match="`slerp` has no kernel"):
        MergedOnDevice(made.plan, made.computed.method, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_error_says_so():
    with pytest.raises(UsageError, match="needs a GPU"):
        accel.check_device("cuda")
    with pytest.raises(UsageError, match="cannot be `cudda`"):
        accel.check_device("cudda")
    accel.check_device("cpu")


def test_the_kernels_are_imported_when_they_are_needed():
    code = "import sys, sdops.core.accel, sdops.verbs.merge, sdops.verbs.apply; print('sdops_kernels' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_loras_on_a_device(models, device, tmp_path, rounding):
    weights = {
        key: values for key, (_, values) in tiny.load(models[0]).items() if values.ndim == 2 and values.size > 500
    }
    unet = {key: values for key, values in weights.items() if key.startswith("model.diffusion_model.")}
    rng = np.random.default_rng(3)
    parts = {}
    for key, values in list(unet.items())[:12]:
        stem = f"diffusion_model.{key.removeprefix('model.diffusion_model.').removesuffix('.weight')}"
        parts[f"{stem}.lora_up.weight"] = rng.standard_normal((values.shape[0], 4)).astype(np.float16) * np.float16(0.1)
        parts[f"{stem}.lora_down.weight"] = rng.standard_normal((4, values.shape[1])).astype(np.float16)
    file = loras.save(tmp_path / "x.safetensors", parts)
    options = {"rounding": rounding, "seed": 5, "lora": [f"{file}:0.3"], "allow_unmatched": True}
    made = sdops.apply(models[0], **options)
    plain = made.computed
    seed = 5 if rounding == "stochastic" else None
    device_made = AppliedOnDevice(plain.source, plain.changes, device=device, weights=plain.weights, seed=seed)
    device_made.small, device_made.portion = 16, 500
    with SafetensorsSink(tmp_path / "device.safetensors", device_made.specs, {}, force=True) as sink:
        run(device_made, sink, jobs=2)
        sink.commit({})
    made.save(tmp_path / "cpu.safetensors", hash_inputs=False)
    found, wanted = tiny.load(tmp_path / "device.safetensors"), tiny.load(tmp_path / "cpu.safetensors")
    wrong = sum(int((found[key][1] != wanted[key][1]).sum()) for key in wanted)
    assert wrong <= 1e-3 * sum(values.size for values in unet.values())  # near-ties: products in another order
    assert device_made.adder.kept_overall() == pytest.approx(made.computed.adder.kept_overall(), abs=1e-3)
    assert any(not tiny.same(wanted[key], tensor) for key, tensor in tiny.load(models[0]).items())

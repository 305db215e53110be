"""The way through a device gives the bytes of the CPU. The device is a CPU here: the kernels' torch functions work."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
import torch

import sdops
from fixtures import loras
from sdops.core import accel, applied_on_device
from sdops.core import on_device as on_device_module
from sdops.core.applied_on_device import AppliedOnDevice
from sdops.core.on_device import MergedOnDevice
from sdops.core.run import run
from sdops.core.sink import SafetensorsSink
from sdops.core.transfer import Transfer
from sdops.errors import FormatError, UsageError
from sdops.verbs import _merge_adapters as merge_adapters
from sdops.verbs.merge import Merge
from tests import tiny

merge_module = import_module("sdops.verbs.merge")  # the verbs have functions of that name


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
    merged.transfer.small, merged.transfer.portion = 16, portion
    sent, send = [], merged.transfer.send
    merged.transfer.send = lambda *arguments: sent.append(arguments) or send(*arguments)
    with SafetensorsSink(path, merged.specs, {}, force=True) as sink:
        run(merged, sink, jobs=2)
        sink.commit({})
    assert sent  # the CPU would give the same bytes
    return merged


CASES = [
    ("weighted-sum", 2, {"alpha": 0.3}),
    ("weighted-sum", 2, {"alpha": "0.3, IN00-IN05=0.9, vae=0"}),
    ("add-difference", 3, {"alpha": 0.7}),
    ("dare-linear", 2, {"density": 0.4, "weights": (1.0, -0.3)}),
    ("dare-ties", 2, {"density": 0.4}),
    ("ties", 2, {"density": 0.3, "min_numel": 100}),
    ("ties", 2, {}),
    ("slerp", 2, {"alpha": 0.3}),
    ("nuslerp", 2, {}),
    ("model-stock", 2, {}),
]


@pytest.mark.parametrize(("method", "count", "knobs"), CASES, ids=[f"{m}-{n}" for n, (m, *_) in enumerate(CASES)])
def test_the_bytes_of_the_cpu(models, device, tmp_path, method, count, knobs):
    base = {"base": models[2]} if method.startswith(("dare", "ties", "model")) else {}
    made = sdops.merge(*models[:count], method=method, seed=7, **base, **knobs)
    through = on_device(made, device, tmp_path / "device.safetensors")
    made.save(tmp_path / "cpu.safetensors", hash_inputs=False)
    found, wanted = tiny.load(tmp_path / "device.safetensors"), tiny.load(tmp_path / "cpu.safetensors")
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if not tiny.same(found[key], wanted[key])] == []
    assert through.overflows == made.computed.overflows
    assert through.retained.shares() == pytest.approx(made.computed.retained.shares(), abs=2e-3)  # other portions


def test_what_is_too_large_is_counted(tmp_path, device):
    large = {"w": tiny.encoded(np.full((40, 40), 60000.0), "F16")}
    small = {"w": tiny.encoded(np.full((40, 40), -60000.0), "F16")}
    files = [tiny.write(tmp_path / f"{name}.safetensors", own) for name, own in (("a", large), ("b", small))]
    made = sdops.merge(files[0], files[0], files[1], method="add-difference")
    assert on_device(made, device, tmp_path / "out.safetensors").overflows == {"w": 1600}
    made = sdops.merge(files[0], method="ties", base=files[1], density=1.0, scale=2.0)
    assert on_device(made, device, tmp_path / "out.safetensors").overflows == {"w": 1600}


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
    made = sdops.merge(*models[:2], method="geometric-sum")
    with pytest.raises(UsageError, match="`geometric-sum` has no kernel"):
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


def matrices_of(model):
    """Those of the U-Net that are worth while."""
    prefix = "model.diffusion_model."
    found = {key: values for key, (_, values) in tiny.load(model).items() if key.startswith(prefix)}
    return {key: values for key, values in found.items() if values.ndim == 2 and values.size > 500}


def lora_for(model, path, seed=3):
    rng = np.random.default_rng(seed)
    parts = {}
    for key, values in list(matrices_of(model).items())[:12]:
        stem = f"diffusion_model.{key.removeprefix('model.diffusion_model.').removesuffix('.weight')}"
        parts[f"{stem}.lora_up.weight"] = rng.standard_normal((values.shape[0], 4)).astype(np.float16) * np.float16(0.1)
        parts[f"{stem}.lora_down.weight"] = rng.standard_normal((4, values.shape[1])).astype(np.float16)
    return loras.save(path, parts)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_loras_on_a_device(models, device, tmp_path, rounding):
    unet = matrices_of(models[0])
    file = lora_for(models[0], tmp_path / "x.safetensors")
    options = {"rounding": rounding, "seed": 5, "lora": [f"{file}:0.3"], "allow_unmatched": True}
    made = sdops.apply(models[0], **options)
    plain = made.computed
    seed = 5 if rounding == "stochastic" else None
    device_made = AppliedOnDevice(plain.source, plain.changes, device=device, weights=plain.weights, seed=seed)
    device_made.transfer.small, device_made.transfer.portion = 16, 500
    with SafetensorsSink(tmp_path / "device.safetensors", device_made.specs, {}, force=True) as sink:
        run(device_made, sink, jobs=2)
        sink.commit({})
    made.save(tmp_path / "cpu.safetensors", hash_inputs=False)
    found, wanted = tiny.load(tmp_path / "device.safetensors"), tiny.load(tmp_path / "cpu.safetensors")
    wrong = sum(int((found[key][1] != wanted[key][1]).sum()) for key in wanted)
    assert wrong <= 1e-3 * sum(values.size for values in unet.values())  # near-ties: products in another order
    assert device_made.adder.kept_overall() == pytest.approx(made.computed.adder.kept_overall(), abs=1e-3)
    assert any(not tiny.same(wanted[key], tensor) for key, tensor in tiny.load(models[0]).items())


@pytest.fixture
def everything_is_sent(device, monkeypatch):
    """`--device cuda`, to a CPU where that is the device, tensors of all sizes in small portions."""

    def transfer(_):
        made = Transfer(device)
        made.small, made.portion = 16, 3000
        return made

    for module in (on_device_module, applied_on_device):
        monkeypatch.setattr(module, "Transfer", transfer)
    for module in (merge_module, merge_adapters):
        monkeypatch.setattr(module, "check_device", lambda _: None)


@pytest.mark.parametrize(("method", "knobs"), [("weighted-sum", {"alpha": 0.3}), ("slerp", {}), ("ties", {})])
def test_a_merge_with_loras_on_top(models, tmp_path, everything_is_sent, method, knobs):
    file = lora_for(models[0], tmp_path / "x.safetensors")
    base = {"base": models[2]} if method == "ties" else {}
    options = {"method": method, "lora": [f"{file}:0.3"], "hash_inputs": False, **knobs, **base}
    for name in ("cpu", "cuda"):
        made = sdops.merge(*models[:2], output=tmp_path / f"{name}.safetensors", device=name, **options)
        assert made.verb == "merge"
    found, wanted = tiny.load(tmp_path / "cuda.safetensors"), tiny.load(tmp_path / "cpu.safetensors")
    assert found.keys() == wanted.keys()
    wrong = sum(int((found[key][1] != wanted[key][1]).sum()) for key in wanted)
    assert wrong <= 1e-3 * sum(values.size for values in matrices_of(models[0]).values())


@pytest.mark.parametrize("method", ["concat", "svd", "ties", "dare"])
def test_loras_are_merged_on_a_device(models, tmp_path, device, everything_is_sent, method):
    files = [lora_for(models[0], tmp_path / f"{seed}.safetensors", seed) for seed in (3, 4)]
    found = []
    for name in ("cpu", device):
        path = tmp_path / f"{name}-out.safetensors"
        sdops.merge(*files, method=method, weights=(0.7, -0.3), output=path, device=name, hash_inputs=False, force=True)
        parts = {key: values.astype(np.float64) for key, (_, values) in tiny.load(path).items()}
        found.append(
            {
                key: values @ parts[key.replace("lora_up", "lora_down")]
                for key, values in parts.items()
                if "lora_up" in key
            }
        )
    assert found[0].keys() == found[1].keys()
    for key, change in found[0].items():
        np.testing.assert_allclose(found[1][key], change, atol=2e-3 * float(np.abs(change).max()))

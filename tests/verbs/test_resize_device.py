"""Resizing by way of a device gives what the CPU gives; the device is a CPU here."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest

import sdops
from fixtures import loras
from sdops.verbs import _resize_device
from tests import tiny

module = import_module("sdops.verbs.resize")  # the verbs have a function of that name


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.mark.parametrize("rule", [{"rank": 3}, {"energy": 0.9}, {"budget": 12_000}, {}], ids=str)
def test_what_the_cpu_gives(tmp_path, device, monkeypatch, rule):
    random = np.random.default_rng(0)
    parts = {}
    shapes = ((32, 24, 8), (32, 24, 8), (16, 40, 6), (24, 24, 4), (40, 16, 8))  # two alike, the last of a lower rank
    for block, (rows, columns, rank) in zip((1, 2, 4, 5, 7), shapes, strict=True):
        stem = f"lora_unet_input_blocks_{block}_1_transformer_blocks_0_attn1_to_q"
        parts[f"{stem}.lora_up.weight"] = random.standard_normal((rows, rank)).astype(np.float16)
        parts[f"{stem}.lora_down.weight"] = random.standard_normal((rank, columns)).astype(np.float16)
    parts[f"{stem}.lora_up.weight"][:, 1] = parts[f"{stem}.lora_up.weight"][:, 0]
    file = loras.save(tmp_path / "x.safetensors", parts)
    made = _resize_device.Decomposed
    monkeypatch.setattr(_resize_device, "Decomposed", lambda adapter, most, _: made(adapter, most, device))
    monkeypatch.setattr(_resize_device, "BATCH", 2)
    monkeypatch.setattr(module, "check_device", lambda _: None)
    found = []
    for name in ("cpu", "cuda"):
        path = tmp_path / f"{name}.safetensors"
        report = sdops.resize(file, output=path, device=name, hash_inputs=False, **rule)
        values = {key: array.astype(np.float64) for key, (_, array) in tiny.load(path).items()}
        products = {
            key: own @ values[key.replace("lora_up", "lora_down")] for key, own in values.items() if "lora_up" in key
        }
        found.append((report.data["layers"], products))
    (plain, wanted), (sent, products) = found
    assert [layer["rank"] for layer in plain] == [layer["rank"] for layer in sent]
    assert [layer["error"] for layer in sent] == pytest.approx([layer["error"] for layer in plain], abs=2e-3)
    for key, change in wanted.items():
        np.testing.assert_allclose(products[key], change, atol=3e-3 * float(np.abs(change).max()))

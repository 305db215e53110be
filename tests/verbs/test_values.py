"""Small tensors read without numpy, and what they tell."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sdops.verbs._traits import prediction, quantisation
from sdops.verbs._values import position_ids, values

KEY = "cond_stage_model.transformer.text_model.embeddings.position_ids"


def as_bf16(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy()


@pytest.mark.parametrize(
    ("dtype", "array"),
    [
        ("I64", np.array([-1, 2**40])),
        ("U8", np.array([0, 255], np.uint8)),
        ("F64", np.array([0.1, -1e300])),
        ("F32", np.array([1.5, -0.25], np.float32)),
        ("F16", np.array([65504, 2**-24], np.float16)),
    ],
)
def test_values(dtype, array, memory):
    assert values(memory({"x": (dtype, array)}), "x") == array.tolist()


def test_bfloat16_values(memory):
    x = np.array([1.5, -3.0, 0.15625], np.float32)
    assert values(memory({"x": ("BF16", as_bf16(x))}), "x") == x.tolist()


def test_other_dtypes_have_no_plain_values(memory):
    assert values(memory({"x": ("F8_E4M3", np.zeros(3, np.uint8))}), "x") is None


RIGHT = np.arange(77)


@pytest.mark.parametrize(
    ("dtype", "array", "state", "wrong"),
    [
        ("I64", RIGHT, "ok", 0),
        ("I32", RIGHT.astype(np.int32), "ok", 0),
        ("F16", RIGHT.astype(np.float16), "float", 0),
        ("BF16", as_bf16(RIGHT.astype(np.float32)), "float", 0),
        ("I64", np.where(RIGHT == 5, 4, RIGHT), "broken", 1),
        ("F32", RIGHT.astype(np.float32) * np.float32(0.9) + RIGHT.astype(np.float32) * np.float32(0.1), "broken", 22),
        ("F32", np.full(77, np.nan, np.float32), "broken", 77),
        ("F8_E4M3", np.zeros(77, np.uint8), "broken", 77),
    ],
)
def test_position_ids(dtype, array, state, wrong, memory):
    (entry,) = position_ids(memory({KEY: (dtype, array), "weight": ("F16", np.zeros(3, np.float16))}))
    assert (entry.key, entry.state, entry.wrong, entry.total) == (KEY, state, wrong, 77)


def found(needs_values=(), quantised=()):
    """As much of a Detection as is looked at."""
    return SimpleNamespace(needs_values=dict(needs_values), quantised=dict(quantised))


@pytest.mark.parametrize(
    ("keys", "metadata", "expected"),
    [
        ([], {}, []),
        (["v_pred"], {}, ["v (tensor `v_pred`)"]),
        (["v_pred", "ztsnr"], {}, ["v (tensor `v_pred`)", "zero terminal SNR (tensor `ztsnr`)"]),
        ([], {"modelspec.prediction_type": "v"}, ["v (metadata)"]),
    ],
)
def test_prediction_markers(keys, metadata, expected, memory):
    source = memory({key: ("F32", np.zeros(0, np.float32)) for key in keys}, metadata)
    assert prediction(source, found()) == expected


@pytest.mark.parametrize(("spread", "kind"), [(0.2, "v"), (0.05, "epsilon"), (np.nan, "epsilon")])
def test_sd2_tells_v_from_epsilon_by_the_spread_of_a_bias(spread, kind, memory):
    bias = (np.where(np.arange(320) % 2, spread, -spread)).astype(np.float16)
    source = memory({"b": ("F16", bias)})
    assert prediction(source, found({"prediction": "b"})) == [f"likely {kind} (spread of a bias)"]
    assert prediction(source, found()) == []


@pytest.mark.parametrize(("last", "lines"), [(0.0, ["zero terminal SNR (`s` ends in 0)"]), (0.005, [])])
def test_the_noise_schedule_tells_zero_terminal_snr(last, lines, memory):
    schedule = np.linspace(1, last, 1000).astype(np.float32)
    assert prediction(memory({"s": ("F32", schedule)}), found({"zero_terminal_snr": "s"})) == lines


def test_quantisation(memory):
    source = memory({}, {"_quantization_metadata": "{}"})
    packed = {"a": SimpleNamespace(kind="fp8"), "b": SimpleNamespace(kind="nf4"), "c": SimpleNamespace(kind="fp8")}
    lines = ["fp8: 2 tensors", "nf4: 1 tensor", "described in metadata (`_quantization_metadata`)"]
    assert quantisation(source, found(quantised=packed.items())) == lines
    assert quantisation(memory({}), found()) == []

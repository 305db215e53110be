"""Machine code for GPUs that are not there: registers, widths of accesses, tensor cores, precision."""

from __future__ import annotations

import re

import pytest
from cases import (
    BF16,
    E4M3,
    F32,
    NORMAL,
    OTHERS,
    bake,
    complaints,
    count_magnitudes,
    count_ties,
    dora,
    inner_products,
    linear_merge,
    lora_gradients,
    lora_linear,
    own,
    settle,
    sparse_merge,
    title,
)
from offline import PACKAGE, reports

HELPERS = ("change_of", "tile_of", "weight_of")  # called by kernels
TILES = ({}, {"R": 64}, {"R": 128, "BM": 64})  # of `product`, by rank
QUICK = [
    *(linear_merge(target) for target in (*NORMAL, *OTHERS)),
    linear_merge("sm_90", 3, BF16),
    linear_merge("sm_90", 2, F32),
    settle("sm_90"),
    *(bake(target) for target in NORMAL),
    bake("sm_90", FACTOR=F32, BM=32),
    sparse_merge("sm_90"),
    sparse_merge("sm_90", RANDOM=True),
    count_magnitudes("sm_90"),
    count_ties("sm_90"),
    inner_products("sm_90"),
    dora("sm_90"),
    lora_linear("sm_90"),
    lora_linear("sm_90", TURNED=True, BIAS=False),
    lora_gradients("sm_90"),
]
EVERYWHERE = (*NORMAL, *OTHERS)
ALL = [
    *(
        linear_merge(target, inputs, dtype, EXACT=exact)
        for target in NORMAL
        for inputs in (2, 3, 8)
        for dtype in (0, BF16, F32)
        for exact in (True, False)
    ),
    *(sparse_merge(target, RANDOM=drawn, CODE=BF16, OUT=BF16) for target in EVERYWHERE for drawn in (False, True)),
    *(count_magnitudes(target, BINS=bins, WHOLE=bins > 1024) for target in NORMAL for bins in (2048, 1024)),
    *(count_magnitudes(target) for target in OTHERS),
    *(count_ties(target, CODE=BF16) for target in EVERYWHERE),
    *(inner_products(target, dtype) for target in NORMAL for dtype in (BF16, F32)),
    *(inner_products(target) for target in OTHERS),
    *(settle(target, 8, dtype) for target in NORMAL for dtype in (BF16, F32)),
    *(settle(target) for target in OTHERS),
    *(
        lora_linear(target, "bf16", TURNED=turned, **tile)
        for target in NORMAL
        for turned in (False, True)
        for tile in TILES
    ),
    *(lora_linear(target, TURNED=turned) for target in OTHERS for turned in (False, True)),
    *(lora_gradients(target, "bf16", R=rank) for target in NORMAL for rank in (16, 64, 128)),
    *(lora_gradients(target) for target in OTHERS),
    *(bake(target, **kind) for target in EVERYWHERE for kind in ({}, {"BASE": BF16, "OUT": BF16, "FACTOR": BF16})),
    *(dora(target, AXIS=axis) for target in EVERYWHERE for axis in (0, 1)),
    *(
        dora(target, **kind)
        for target in NORMAL
        for kind in (
            {"FACTOR": F32},
            {"BASE": BF16, "FACTOR": BF16, "BR": 64},
            {"KINDS": 2},
            {"KINDS": 4, "FACTOR": F32},
            {"KINDS": 8, "FACTOR": F32},
            {"FACTOR": F32, "PRECISION": "tf32x3"},
        )
    ),
    *(
        bake(target, **kind)
        for target in NORMAL
        for kind in (
            {"BR": 64},
            {"RANDOM": True},
            {"BASE": E4M3, "OUT": E4M3},
            {"BASE": E4M3, "OUT": E4M3, "MEASURE": True},
            {"KINDS": 17, "BM": 32},
            {"KINDS": 2, "BM": 32},
            {"KINDS": 4, "FACTOR": F32, "BM": 32},
            {"KINDS": 5, "FACTOR": F32, "BM": 32},
            {"KINDS": 8, "FACTOR": F32, "BM": 32},
            {"KINDS": 1, "FACTOR": F32, "BM": 32, "PRECISION": "tf32x3"},
            {"ALIGNED": False, "BM": 32},
        )
    ),
]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return reports(QUICK, tmp_path_factory.mktemp("triton"))


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    return reports(ALL, tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("index", range(len(QUICK)), ids=[title(case) for case in QUICK])
def test_machine_code(quick, index):
    assert complaints(QUICK[index], quick[index]) == []


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(ALL)), ids=[title(case) for case in ALL])
def test_machine_code_of_all_variants(everything, index):
    assert complaints(ALL[index], everything[index]) == []


def test_registers_leave_room_for_enough_blocks(quick):
    """What is in flight per multiprocessor hides the latency: 26 kB at 4.3 TB/s on 132 of them."""
    registers = {title(case): facts.get("registers", 0) for case, facts in zip(QUICK, quick, strict=True)}
    bakes = [
        registers[title(case)] for case in QUICK if case["kernel"] == "bake_tiles" and case["constants"]["BM"] == 64
    ]
    merges = [registers[title(case)] for case in QUICK if case["kernel"] == "merge_chunks" and case["target"] in NORMAL]
    assert max(bakes) <= 168  # three blocks of 4 warps
    assert max(merges) <= 80  # six


# What may go wrong, made on purpose: in kernels of their own, and in each of ours.
NARROW, CONTRACTED, ROUNDED, SPILLED = (
    "loads are narrower than 16 bytes",
    "sums are contracted",
    "products are rounded to TF32",
    "registers are spilled",
)
IDLE = "tensor cores are idle"
WRONG = [
    (own("silent_tf32", {"a": "*fp32", "b": "*fp32", "out": "*fp32"}, 64), ROUNDED),
    (own("unaligned", {"addresses": "*i64", "out": "*fp16"}, 1024), NARROW),
    (own("greedy", {"a": "*fp32", "out": "*fp32"}, 128) | {"warps": 1}, SPILLED),
    (linear_merge("sm_90") | {"fusion": True}, CONTRACTED),
    (linear_merge("sm_90", ALIGNED=False), NARROW),
    (settle("sm_90") | {"fusion": True}, CONTRACTED),
    (sparse_merge("sm_90") | {"fusion": True}, CONTRACTED),
    (sparse_merge("sm_90", RANDOM=True, ALIGNED=False), NARROW),
    (count_magnitudes("sm_90", ALIGNED=False), NARROW),
    (count_ties("sm_90", ALIGNED=False), NARROW),
    (inner_products("sm_90", ALIGNED=False), NARROW),
    (bake("sm_90", FACTOR=F32, BM=32, PRECISION="tf32"), ROUNDED),
    (bake("sm_90", WIDE=True) | {"matrix": True}, IDLE),
    (dora("sm_90", FACTOR=F32, PRECISION="tf32"), ROUNDED),
    (dora("sm_90", ALIGNED=False) | {"wide": 2}, NARROW),
    (lora_linear("sm_90") | {"divisible": []}, NARROW),
    (lora_linear("sm_90", WIDE=True, BM=64, BN=64, BK=32), IDLE),
    (lora_gradients("sm_90") | {"divisible": []}, NARROW),
]


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    return reports([case for case, _ in WRONG], tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("index", range(len(WRONG)), ids=[f"{case['kernel']}-{what}" for case, what in WRONG])
def test_a_wrong_kernel_is_found_out(wrong, index):
    case, what = WRONG[index]
    assert what in complaints(case, wrong[index])


def test_every_kernel_has_a_wrong_one():
    """What is compiled here is all there is, and each has been seen to fail."""
    kernels = {
        f"sdops_kernels.{path.stem}.{name}"
        for path in PACKAGE.glob("sdops_kernels/_*kernels.py")
        for name in re.findall(r"@triton\.jit\ndef ([a-z]\w+)\(", path.read_text(encoding="utf-8"))
        if name not in HELPERS
    }
    assert {f"{case['module']}.{case['kernel']}" for case in (*QUICK, *ALL)} == kernels
    assert {f"{case['module']}.{case['kernel']}" for case, _ in WRONG} >= kernels

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

HELPERS = ("change_of", "shape_of", "tile_of", "weight_of")  # called by kernels
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
            {"BASE": BF16, "FACTOR": BF16, "BR": 64},
            {"KINDS": 2},
            {"KINDS": 4, "FACTOR": F32, "BM": 16},
            {"KINDS": 8, "FACTOR": F32, "BM": 16},
            {"FACTOR": F32, "PRECISION": "tf32x3", "BM": 16},
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
            {"KINDS": 5, "FACTOR": F32, "BM": 16},
            {"KINDS": 8, "FACTOR": F32, "BM": 32},
            {"KINDS": 1, "FACTOR": F32, "BM": 32, "PRECISION": "tf32x3"},
            {"ALIGNED": False, "BM": 32},
        )
    ),
]


def mistakes(cases, found):
    """Title -> complaints, where there are any."""
    said = {title(case): complaints(case, facts) for case, facts in zip(cases, found, strict=True)}
    return {name: what for name, what in said.items() if what}


def test_machine_code(tmp_path):
    """All in one test: several workers would compile everything twice."""
    found = reports(QUICK, tmp_path)
    assert mistakes(QUICK, found) == {}
    check_registers(found)


@pytest.mark.slow
def test_machine_code_of_all_variants(tmp_path):
    assert mistakes(ALL, reports(ALL, tmp_path)) == {}


def check_registers(found):
    """What is in flight per multiprocessor hides the latency: 26 kB at 4.3 TB/s on 132 of them."""
    registers = {title(case): facts.get("registers", 0) for case, facts in zip(QUICK, found, strict=True)}
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


def test_a_wrong_kernel_is_found_out(tmp_path):
    found = reports([case for case, _ in WRONG], tmp_path)
    unseen = [
        f"{title(case)}: {what}"
        for (case, what), facts in zip(WRONG, found, strict=True)
        if what not in complaints(case, facts)
    ]
    assert unseen == []


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

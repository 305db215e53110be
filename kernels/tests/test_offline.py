"""Machine code for GPUs that are not there: registers, widths of accesses, tensor cores, precision."""

from __future__ import annotations

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
    linear_merge,
    lora_linear,
    settle,
    sparse_merge,
    title,
)
from offline import reports

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
    lora_linear("sm_90"),
]
ALL = [
    *(
        linear_merge(target, inputs, dtype, EXACT=exact)
        for target in NORMAL
        for inputs in (2, 3, 8)
        for dtype in (0, BF16, F32)
        for exact in (True, False)
    ),
    *(
        sparse_merge(target, RANDOM=drawn, CODE=BF16, OUT=BF16)
        for target in (*NORMAL, "sm_120", "gfx942")
        for drawn in (False, True)
    ),
    *(count_magnitudes(target, BINS=bins, WHOLE=bins > 1024) for target in NORMAL for bins in (2048, 1024)),
    *(lora_linear(target, "bf16", R=rank) for target in NORMAL for rank in (16, 64)),
    *(settle(target, 8, dtype) for target in NORMAL for dtype in (BF16, F32)),
    *(
        bake(target, **kind)
        for target in (*NORMAL, *OTHERS)
        for kind in ({}, {"BASE": BF16, "OUT": BF16, "FACTOR": BF16})
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


WRONG = {
    "silent_tf32": ({"a": "*fp32", "b": "*fp32", "out": "*fp32"}, 64, "products are rounded to TF32"),
    "unaligned": ({"addresses": "*i64", "out": "*fp16"}, 1024, "loads are narrower than 16 bytes"),
    "greedy": ({"a": "*fp32", "out": "*fp32"}, 128, "registers are spilled"),
}


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    cases = [
        {
            "module": "wrong_kernels",
            "kernel": name,
            "target": "sm_90",
            "signature": signature,
            "constants": {"SIZE": size},
            "divisible": list(signature),
            "warps": 4,
            "stages": 2,
            "wide": 1,
            "matrix": False,
        }
        for name, (signature, size, _) in WRONG.items()
    ]
    fused = linear_merge("sm_90") | {"fusion": True}
    unpromised = linear_merge("sm_90", ALIGNED=False)
    found = reports([*cases, fused, unpromised], tmp_path_factory.mktemp("triton"))
    return dict(
        zip([*WRONG, "contracted", "unpromised"], zip([*cases, fused, unpromised], found, strict=True), strict=True)
    )


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_is_found_out(wrong, name):
    assert WRONG[name][2] in complaints(*wrong[name])


def test_contraction_and_narrow_loads_are_found_out(wrong):
    assert "sums are contracted" in complaints(*wrong["contracted"])
    assert "loads are narrower than 16 bytes" in complaints(*wrong["unpromised"])

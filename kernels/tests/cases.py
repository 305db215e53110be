"""Kernels with the constants that plans give them, for `offline.py`; and what must be true of the machine code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NORMAL = ("sm_80", "sm_90")
OTHERS = ("sm_89", "sm_100", "sm_120", "gfx942")
F16, BF16, F32, E4M3 = range(4)
MATRIX = {"sm_80": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA", "gfx942": "mfma"}


def linear_merge(target: str, inputs: int = 2, dtype: int = F16, **changed: Any) -> dict[str, Any]:
    """`merge_chunks` of `inputs` models."""
    constants = {
        "N": inputs,
        "DTYPES": sum(dtype * 5**i for i in range(inputs)),
        "OUT": dtype,
        "LOW": True,
        "EXACT": True,
        "ALIGNED": True,
        "BLOCK": 1024,
    }
    signature = {"table": "*i64", "coefficients": "*fp32", "first": "*i32", "marks": "*i32"}
    signature |= dict.fromkeys(("problems", "chunks", "share"), "i32")
    case = _case("_linear_merge_kernels", "merge_chunks", target, signature, constants | changed)
    wide = inputs * (2 if dtype == F32 else 1)
    fused = 16 * inputs if (constants | changed)["EXACT"] else 8 * (inputs - 1)
    return case | {"wide": wide, "fused": fused, "matrix": False}


def settle(target: str, inputs: int = 3, dtype: int = F16) -> dict[str, Any]:
    """`settle_chunks`: float64, few chunks, no promise of alignment."""
    constants = {"N": inputs, "DTYPES": sum(dtype * 5**i for i in range(inputs)), "OUT": dtype}
    signature = {"table": "*i64", "coefficients": "*fp32", "first": "*i32", "marked": "*i32", "found": "*i32"}
    case = _case(
        "_linear_merge_kernels",
        "settle_chunks",
        target,
        signature | {"problems": "i32"},
        constants | {"LOW": True, "BLOCK": 1024},
    )
    return case | {"wide": 0, "matrix": False, "fused": 0}


def bake(target: str, **changed: Any) -> dict[str, Any]:
    """`bake_tiles`: plain LoRAs in float16 unless changed."""
    constants = {
        "BASE": F16,
        "OUT": F16,
        "FACTOR": F16,
        "KINDS": 1,
        "ALIGNED": True,
        "WIDE": False,
        "PRECISION": "ieee",
        "RANDOM": False,
        "MEASURE": False,
        "BM": 64,
        "BN": 64,
        "BR": 16,
    } | changed
    names = ("problems", "segments", "keys")
    signature = dict.fromkeys(names, "*i64") | {"numbers": "*fp32", "scales": "*fp32", "fresh": "*fp32"}
    signature |= {"most": "*i32", "first": "*i32"} | dict.fromkeys(("count", "tiles", "share"), "i32")
    case = _case("_bake_kernels", "bake_tiles", target, signature, constants)
    matrix = constants["FACTOR"] != F32 and bool(constants["KINDS"] & 3)
    wide = 1 if constants["MEASURE"] else 2 if constants["BASE"] == E4M3 or constants["BM"] == 32 else 4
    return case | {"wide": wide if constants["ALIGNED"] else 0, "matrix": matrix}


def sparse_merge(target: str, **changed: Any) -> dict[str, Any]:
    """`merge_sparse`: TIES of two models in float16 unless changed."""
    constants = {
        "N": 2,
        "CODE": F16,
        "OUT": F16,
        "RANDOM": False,
        "ELECT": True,
        "NORMALIZE": True,
        "ALIGNED": True,
        "BLOCK": 1024,
    } | changed
    signature = {"table": "*i64", "numbers": "*fp32", "keys": "*i64", "border": "*i32", "before": "*i32"}
    signature |= {"first": "*i32", "marks": "*i32"} | dict.fromkeys(("problems", "chunks", "share"), "i32")
    case = _case("_sparse_merge_kernels", "merge_sparse", target, signature, constants)
    return case | {"wide": 3, "matrix": False, "fused": 0}


def count_magnitudes(target: str, **changed: Any) -> dict[str, Any]:
    """`count_magnitudes`, first level."""
    constants = {"N": 2, "CODE": F16, "ALIGNED": True, "BINS": 2048, "WHOLE": True, "BLOCK": 1024} | changed
    signature = {"table": "*i64", "first": "*i32", "prefix": "*i32", "counts": "*i32"}
    signature |= dict.fromkeys(("problems", "chunks", "share", "shift"), "i32")
    case = _case("_sparse_merge_kernels", "count_magnitudes", target, signature, constants)
    return case | {"wide": 2, "matrix": False, "counts": True}  # adds to counters instead of storing


def count_ties(target: str, **changed: Any) -> dict[str, Any]:
    """`count_ties`: what is equal to the border."""
    constants = {"N": 2, "CODE": F16, "ALIGNED": True, "BLOCK": 1024} | changed
    signature = {"table": "*i64", "first": "*i32", "border": "*i32", "ties": "*i32"}
    signature |= dict.fromkeys(("problems", "chunks", "share"), "i32")
    case = _case("_sparse_merge_kernels", "count_ties", target, signature, constants)
    return case | {"wide": 3, "matrix": False, "counts": True}


def inner_products(target: str, dtype: int = F16, **changed: Any) -> dict[str, Any]:
    """`add_products` of two models."""
    constants = {"N": 2, "PAIRS": 3, "CODE": dtype, "ALIGNED": True, "BLOCK": 1024, "BLOCKS": 64} | changed
    signature = {"table": "*i64", "first": "*i32", "sums": "*fp64", "problems": "i32"}
    case = _case("_inner_products_kernels", "add_products", target, signature, constants)
    return case | {"wide": 2 * (2 if dtype == F32 else 1), "matrix": False, "counts": True}


def dora(target: str, **changed: Any) -> dict[str, Any]:
    """`add_squares`: rows of a float16 weight with a plain LoRA unless changed."""
    constants = {
        "BASE": F16,
        "FACTOR": F16,
        "KINDS": 1,
        "ALIGNED": True,
        "WIDE": False,
        "PRECISION": "ieee",
        "AXIS": 0,
        "BM": 32,
        "BN": 64,
        "BR": 16,
    } | changed
    signature = {"problems": "*i64", "segments": "*i64", "numbers": "*fp32", "scales": "*fp32", "first": "*i32"}
    signature |= {"sums": "*fp32"} | dict.fromkeys(("count", "strips", "share"), "i32")
    case = _case("_dora_kernels", "add_squares", target, signature, constants)
    matrix = constants["FACTOR"] != F32 and bool(constants["KINDS"] & 3)
    wide = 0 if not constants["ALIGNED"] else 2 if constants["BM"] == 32 else 1
    return case | {"wide": wide, "matrix": matrix, "counts": True}


def lora_linear(target: str, dtype: str = "fp16", **changed: Any) -> dict[str, Any]:
    """`product`, forward unless it is TURNED; sizes are divisible by 16, which the launcher tells the compiler."""
    constants = {"BIAS": True, "TURNED": False, "WIDE": False, "R": 16, "BM": 128, "BN": 128, "BK": 64} | changed
    names = ("x", "weight", "bias", "first", "second", "result", "inner")
    signature = dict.fromkeys(names, f"*{dtype}") | dict.fromkeys(("tokens", "outputs", "inputs", "rank"), "i32")
    case = _case("_lora_linear_kernels", "product", target, signature | {"scale": "fp32"}, constants)
    return _of_matrices(case, dtype) | {"warps": 8}


def lora_gradients(target: str, dtype: str = "fp16", **changed: Any) -> dict[str, Any]:
    """`add_gradients`: sums over slabs of tokens."""
    constants = {"WIDE": False, "R": 16, "BM": 64, "BN": 64} | changed
    names = ("gradient", "x", "inner", "low")
    signature = dict.fromkeys(names, f"*{dtype}") | {"partial": "*fp32"}
    signature |= dict.fromkeys(("tokens", "outputs", "inputs", "rank", "across", "slab"), "i32")
    return _of_matrices(_case("_lora_linear_kernels", "add_gradients", target, signature, constants), dtype)


def own(kernel: str, signature: Mapping[str, str], size: int) -> dict[str, Any]:
    """One of `wrong_kernels.py`."""
    case = _case("wrong_kernels", kernel, "sm_90", signature, {"SIZE": size})
    return case | {"module": "wrong_kernels", "wide": 1, "matrix": False}


def _of_matrices(case: dict[str, Any], dtype: str) -> dict[str, Any]:
    divisible = [*case["divisible"], "outputs", "inputs", "rank"]
    return case | {"divisible": divisible, "stages": 3, "wide": 4, "matrix": dtype != "fp32"}


def _case(
    module: str, kernel: str, target: str, signature: Mapping[str, str], constants: Mapping[str, Any]
) -> dict[str, Any]:
    pointers = [name for name, kind in signature.items() if kind.startswith("*")]
    return {
        "module": f"sdops_kernels.{module}",
        "kernel": kernel,
        "target": target,
        "signature": dict(signature),
        "constants": dict(constants),
        "divisible": pointers,
        "warps": 2 if target.startswith("gfx") and "BLOCK" in constants else 4,
        "stages": 2,
    }


def title(case: Mapping[str, Any]) -> str:
    """What a test of the case is called."""
    shown = "-".join(f"{name}{value}" for name, value in case["constants"].items() if name not in ("BLOCK", "WIDE"))
    return f"{case['kernel']}-{case['target']}-{shown}"


def complaints(case: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """What is wrong with the machine code of a case."""
    wants_tf32 = case["constants"].get("PRECISION") == "tf32x3"
    stores = "wide_stores" in facts and not case["target"].startswith("gfx")
    stores &= not (case["constants"].get("MEASURE") or case.get("counts"))
    found = {
        "registers are spilled": facts["spills"] > 0,
        "there is a stack": facts.get("stack", 0) > 0,
        "there is local memory": facts.get("local", 0) > 0,
        "loads are narrower than 16 bytes": facts["wide_loads"] < case["wide"],
        "stores are narrower than 16 bytes": stores and case["wide"] > 0 and facts["wide_stores"] == 0,
        "tensor cores are idle": case["matrix"] and not set(facts["matrix"]) & {MATRIX[case["target"]], "HMMA"},
        "products are rounded to TF32": (facts["tf32"] or "inputPrecision = tf32" in facts["ttir"]) and not wants_tf32,
        "subnormal numbers are flushed": bool(facts.get("flushes")),
        "sums are contracted": "fused" in case and case["target"] in NORMAL and facts["fused"] != case["fused"],
    }
    return [text for text, is_so in found.items() if is_so]

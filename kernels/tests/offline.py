"""Compile kernels for GPUs that are not there, and read what came out: registers, spills, widths of accesses, MMA.

Run as a program (Triton must not be in interpreter mode): reads cases as JSON from stdin, writes a report per case.

    {"module": "_linear_merge_kernels", "kernel": "merge_chunks", "target": "sm_90", "signature": {...},
     "constants": {...}, "divisible": ["table"], "warps": 4, "stages": 2}
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent.parent / "torch-ext"


def reports(cases: list[dict[str, Any]], cache: Path) -> list[dict[str, Any]]:
    """Compile all cases in one subprocess; raises CalledProcessError with its stderr shown if one does not compile."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{PACKAGE}{os.pathsep}{Path(__file__).parent}",
        "TRITON_CACHE_DIR": str(cache),
    }
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, __file__]
    done = subprocess.run(
        command, input=json.dumps(cases), capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise AssertionError(done.stderr[-4000:])
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def report(case: Mapping[str, Any]) -> dict[str, Any]:
    """Compile one case."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(import_module(case["module"], "sdops_kernels"), case["kernel"])
    constants = case["constants"]
    signature = {name: "constexpr" if name in constants else case["signature"][name] for name in kernel.arg_names}
    divisible = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in case["divisible"]}
    options = {"num_warps": case["warps"], "num_stages": case["stages"], "enable_fp_fusion": case.get("fusion", False)}
    name = case["target"]
    target = GPUTarget("cuda", int(name[3:]), 32) if name.startswith("sm_") else GPUTarget("hip", name, 64)
    made = triton.compile(ASTSource(kernel, signature, constants, divisible), target=target, options=options)
    facts: dict[str, Any] = {"shared": made.metadata.shared, "ttir": made.asm["ttir"]}
    facts |= _nvidia(made) if name.startswith("sm_") else _amd(made.asm["amdgcn"])
    return facts


def _nvidia(made: Any) -> dict[str, Any]:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        sass = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout)}
    return {
        "registers": numbers["REG"],
        "stack": numbers["STACK"],
        "local": numbers["LOCAL"],
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "wide_loads": len(re.findall(r"\bLDG(?:STS)?\.\S*128", sass)),
        "loads": len(re.findall(r"\bLDG(?:STS)?\b", sass)),
        "wide_stores": len(re.findall(r"\bSTG\.\S*128", sass)),
        "stores": len(re.findall(r"\bSTG\b", sass)),
        "matrix": sorted(set(re.findall(r"\b(HGMMA|HMMA|UTCHMMA|IMMA|QGMMA)\b", sass))),
        "tf32": "TF32" in sass or ".tf32" in made.asm["ptx"],
        "flushes": ".ftz" in made.asm["ptx"],
        "fused": len(re.findall(r"\bfma\.rn\.f(?:32|64)\b", made.asm["ptx"])),
    }


def _amd(text: str) -> dict[str, Any]:
    number = {name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count")}  # type: ignore[index]
    return {
        "registers": number["vgpr_count"],
        "spills": number["vgpr_spill_count"],
        "wide_loads": len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", text)),
        "wide_stores": len(re.findall(r"\b(?:global|buffer)_store_dwordx4\b", text)),
        "matrix": sorted(set(re.findall(r"\bv_(mfma|wmma)", text))),
        "tf32": "xf32" in text,
    }


if __name__ == "__main__":
    with ThreadPoolExecutor(2) as pool:
        json.dump(list(pool.map(report, json.load(sys.stdin))), sys.stdout)

"""Every operator, registered with a fake and for the CPU; and the package as kernel-builder lays it out."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import sdops_kernels
import torch
from sdops_kernels import reference
from torch.library import opcheck

ROOT = Path(sdops_kernels.__file__).parent
PROJECT = ROOT.parent.parent


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def examples():
    weights, outs = [normal(16, 24), normal(8, 8)], [torch.empty(16, 24), torch.empty(8, 8)]
    ups, downs = [normal(16, 2), normal(8, 2)], [normal(2, 24), normal(2, 8)]
    models = [normal(16, 24), normal(8, 8), normal(16, 24), normal(8, 8)]
    x, weight, bias, down, up, gradient = (
        normal(5, 6), normal(8, 6), normal(8), normal(2, 6), normal(8, 2), normal(5, 8),
    )  # fmt: skip
    inner = reference.lora_forward(x, weight, bias, down, up, 0.5)[1]
    return {
        "bake": (weights, outs, ups, downs, [0.5, 0.5]),
        "dora_gains": (weights, ups, downs, [0.5, 0.5], [torch.ones(16), torch.ones(8)]),
        "inner_products": (models, 2),
        "linear_merge": (models, outs, [0.5, 0.5]),
        "lora_backward": (gradient, x, weight, inner, down, up, 0.5),
        "lora_forward": (x, weight, bias, down, up, 0.5),
        "low_rank": (weights, 3, 0),
        "singular_factors": (ups, downs),
        "sparse_merge": (
            "dare_ties",
            weights,
            models,
            outs,
            [0.5, 0.5],
            [0.3, 0.3],
            1.0,
            True,
            [1, 2, 3, 4, 5, 6, 7, 8],
        ),
    }


def test_all_operators_are_here():
    text = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("*.py"))
    assert set(re.findall(r'^register\(\s*"(\w+)"', text, re.MULTILINE)) == examples().keys()


@pytest.mark.parametrize("name", examples())
def test_an_operator_keeps_its_promises(name):
    operator = getattr(torch.ops.sdops_kernels, name).default
    opcheck(operator, examples()[name], test_utils=["test_schema", "test_autograd_registration", "test_faketensor"])


@pytest.mark.parametrize("name", ["bake", "linear_merge", "sparse_merge"])
def test_what_is_written_is_what_the_function_gives(name):
    given = examples()[name]
    outs = given[1] if name != "sparse_merge" else given[3]
    getattr(torch.ops.sdops_kernels, name)(*given)
    assert all(bool(torch.isfinite(out).all()) for out in outs)
    assert float(outs[0].abs().max()) > 0


def test_every_operation_has_a_torch_reference_of_its_name():
    assert {name for name in examples() if not callable(getattr(reference, name, None))} == set()


def test_the_layout_is_that_of_kernel_builder():
    build = tomllib.loads((PROJECT / "build.toml").read_text(encoding="utf-8"))
    general = build["general"]
    assert general["name"].replace("-", "_") == ROOT.name
    assert isinstance(general["version"], int)
    assert general["edition"] == 5
    assert set(general["backends"]) <= {"cpu", "cuda", "metal", "rocm", "xpu"}
    assert "/" in general["hub"]["repo-id"]
    assert "torch-noarch" in build
    for name in ("CARD.md", "flake.nix", "example.py", "benchmarks/benchmark.py", "tests"):
        assert (PROJECT / name).exists(), name
    assert not (PROJECT / "__init__.py").exists()
    for path in ROOT.glob("*.py"):  # only torch, triton and the standard library; its own modules relatively
        found = re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert set(found) <= {"torch", "triton", *sys.stdlib_module_names}, path.name


def test_two_builds_live_side_by_side(tmp_path, monkeypatch):
    """As the Hub loads them: under another name, with operators in a namespace of their own."""
    copy = tmp_path / "a_build"
    copy.mkdir()
    for path in ROOT.glob("*.py"):
        (copy / path.name).write_bytes(path.read_bytes())
    prefix = 'def add_op_namespace_prefix(name):\n    return f"_sdops_kernels_1a2b3c::{name}"\n'
    (copy / "_ops.py").write_text(f"import torch\n\nops = torch.ops._sdops_kernels_1a2b3c\n\n\n{prefix}")
    monkeypatch.syspath_prepend(tmp_path)
    other = import_module("a_build")
    assert other.linear_merge is not sdops_kernels.linear_merge
    given = examples()["linear_merge"]
    torch.ops._sdops_kernels_1a2b3c.linear_merge(*given)
    wanted = sdops_kernels.linear_merge([given[0][:2], given[0][2:]], given[2])
    assert all(torch.equal(a, b) for a, b in zip(given[1], wanted, strict=True))
    assert sorted(other.__all__) == sorted(sdops_kernels.__all__)

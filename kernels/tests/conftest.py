"""Kernels run in Triton's interpreter on the CPU, or with `-m gpu` on the device; the same tests do both."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "torch-ext"), str(HERE), str(HERE.parent / "benchmarks")]

if find_spec("triton") is None:
    collect_ignore_glob = ["test_*_kernels.py", "test_offline.py"]


def pytest_configure(config: pytest.Config) -> None:
    """The interpreter has to be chosen before a kernel is imported; on a GPU it must be off."""
    wanted = config.option.markexpr
    if "gpu" not in wanted.replace("not gpu", ""):
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where the tensors of a test lie."""
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return str(request.param)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The interpreter computes with numpy, which warns where floats overflow or are no numbers."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fixtures import tiny_sd
from sdops.report import Report

SETTINGS = {"bucket_step": 8, "batch": 4, "force": True}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny trained model as a folder of diffusers; read only."""
    return tiny_sd.model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def circles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight yellow circles with captions; read only."""
    return tiny_sd.images(tmp_path_factory.mktemp("circles"))


@pytest.fixture
def train(tiny: Path, circles: Path, tmp_path: Path) -> Callable[..., Report]:
    """train("lora", steps=3) -> the report; the output is out.safetensors or out.pt in tmp_path."""
    from sdops.training.config import settings_of
    from sdops.verbs.train import run

    def go(method: str, **given: Any) -> Report:
        ending = ".pt" if method in ("ti", "dreamartist", "hypernetwork", "aesthetic") else ".safetensors"
        known = {each.name for each in settings_of(method)}
        settings = {"model": str(tiny), "images": str(circles), "output": str(tmp_path / f"out{ending}"), **SETTINGS}
        settings = {name: value for name, value in settings.items() if name in known}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of diffusers and transformers, when they are imported
            return run(method, **{**settings, **given})

    return go

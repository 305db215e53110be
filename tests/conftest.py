from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# The workers of pytest-xdist share the cores; torch reads this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A job in the background or under nohup ignores these, and so would the commands that the tests start and interrupt.
for _name, _usual in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    if hasattr(signal, _name) and signal.getsignal(getattr(signal, _name)) is signal.SIG_IGN:
        signal.signal(getattr(signal, _name), _usual)


@pytest.fixture(scope="session", autouse=True)
def isolated_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No network, and neither the user's settings nor the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("SDOPS_")]:
            patch.delenv(name)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("SDOPS_CACHE", str(tmp_path_factory.mktemp("sdops-cache")))
        yield


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """small_checkpoint("sdxl", tuned=1, dtype="F32") -> a file with real names and shrunk widths, made once; read only.

    See fixtures/make.py for the names; those of diffusers pipelines give a folder.
    """
    from fixtures import make

    folder = tmp_path_factory.mktemp("checkpoints")

    def get(name: str, *, tuned: int | None = None, dtype: str | None = None) -> Path:
        stem = f"{name}-{tuned}-{dtype}"
        path = folder / (stem if make.is_pipeline(name) else f"{stem}.safetensors")
        if not path.exists():
            make.small(name, path, tuned=tuned, dtype=dtype)
        return path

    return get

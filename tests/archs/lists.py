"""The key lists of fixtures/keys as specs."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path

from sdops.core.spec import Spec

KEYS = Path(__file__).parents[2] / "fixtures" / "keys"
NAMES = sorted(
    path.name.removesuffix(".json.gz") for path in KEYS.glob("*.json.gz") if not path.name.startswith("map-")
)


@cache
def _read(name: str) -> dict[str, Spec]:
    rows = json.loads(gzip.decompress((KEYS / f"{name}.json.gz").read_bytes()))
    return {key: Spec(dtype, tuple(shape)) for key, (dtype, shape) in rows.items()}


def load(name: str) -> dict[str, Spec]:
    return dict(_read(name))


def part(name: str, prefix: str, new: str = "") -> dict[str, Spec]:
    """The keys under a prefix, moved to another."""
    return {new + key.removeprefix(prefix): spec for key, spec in load(name).items() if key.startswith(prefix)}

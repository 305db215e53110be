"""LyCORIS as a library (SimpleTuner, early ai-toolkit): `lycoris_` and diffusers' names with underscores.

Only the denoiser: each model that LyCORIS wraps makes a file of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from sdops.core.patch import Adapter, Target
from sdops.dialects._names import Names
from sdops.dialects._read import Contents, Reading, read_stems, share_of
from sdops.dialects._recipes import Values
from sdops.dialects._spelling import Spelling, diffusers
from sdops.dialects._write import Written
from sdops.dialects._write import write as write_common


def _prefixes(names: Names, component: str) -> tuple[str, ...]:
    return ("lycoris_",) if component == names.denoiser else ()


SPELLING = Spelling("lycoris", "_", _prefixes, diffusers, norm_names=True)


def score(keys: Collection[str]) -> float:
    """The prefix."""
    return share_of(keys, lambda key: key.startswith("lycoris_"))


def stems(names: Names) -> Mapping[str, Target]:
    """All layers in both layouts."""
    return SPELLING.stems(names)


def read(file: Contents, names: Names) -> Reading:
    """Patches."""
    return read_stems(file.specs, stems(names))


def write(adapter: Adapter, names: Names, values: Values) -> Written:
    """Every family, the denoiser alone; alphas as tensors."""
    return write_common(adapter, SPELLING, names, values)

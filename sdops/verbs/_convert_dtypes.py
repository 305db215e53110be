"""Which tensors of a conversion get which dtype."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from sdops.archs.detect import MARKER, Detection
from sdops.core.source import Source
from sdops.core.spec import FP8
from sdops.core.view import View
from sdops.errors import UsageError
from sdops.text import suggest
from sdops.verbs._convert_draft import Entry
from sdops.verbs._convert_wish import ALL, Wish

_NEVER = (MARKER, "schedule", "training")


def wanted_dtypes(tensors: Mapping[str, Entry], detection: Detection, wish: Wish) -> dict[str, str]:
    """Name -> new dtype, of the tensors that get one.

    Integers, markers, noise schedules and scales keep theirs.

    Raises:
        UsageError: a component that was named is not there.
    """
    from sdops.archs.delicate import is_coarse
    from sdops.core.cast_view import castable

    _check_names(tensors, detection, wish)
    kinds = {part.name: part.kind for part in detection.components}
    found = {}
    for key, entry in tensors.items():
        spec = entry.made.spec
        dtype = _of_component(entry.component, kinds.get(entry.component, ""), wish)
        if not dtype or dtype == spec.dtype or entry.component in _NEVER or not castable(key, spec):
            continue
        if not asked_for(key, wish):
            continue
        if dtype in FP8 and (kinds.get(entry.component) == "vae" or not is_coarse(entry.name, spec)):
            continue
        found[key] = dtype
    return found


def casts(tensors: Mapping[str, Entry], output: Source) -> dict[str, tuple[str, str]]:
    """Tensor -> its type in the input and in the output, where they differ: dtypes, or GGML's types of a GGUF file."""
    types = {key: (type_before(entry), type_in(output, key)) for key, entry in tensors.items()}
    return {key: (old, new) for key, (old, new) in types.items() if old != new}


def type_before(entry: Entry) -> str:
    """A tensor's type in its file: that of fp8 which is multiplied by its scales is fp8."""
    first = entry.made.ranges[0]
    return type_in(first.source.source if isinstance(first.source, View) else first.source, first.key)


def type_in(source: Source, key: str) -> str:
    """A tensor's dtype, or its GGML type in a GGUF file."""
    kind: str = getattr(source, "types", {}).get(key) or source.specs[key].dtype
    return kind


def _of_component(component: str, kind: str, wish: Wish) -> str:
    for name in (component, kind):
        if name and name in wish.dtypes:
            return wish.dtypes[name]
    return wish.dtypes.get(ALL, "")


def asked_for(key: str, wish: Wish) -> bool:
    """Whether the patterns let a tensor be cast."""
    included = not wish.include or any(fnmatchcase(key, pattern) for pattern in wish.include)
    return included and not any(fnmatchcase(key, pattern) for pattern in wish.exclude)


def _check_names(tensors: Mapping[str, Entry], detection: Detection, wish: Wish) -> None:
    known = {entry.component for entry in tensors.values()}
    known |= {part.kind for part in detection.components if part.name in known}
    for name in wish.dtypes:
        if name != ALL and name not in known:
            close = suggest(name, known)
            raise UsageError(
                f"`--dtype {name}=...`: there is no component `{name}`"
                + (f"; did you mean `{close}`?" if close else ""),
                hint=f"there are {', '.join(sorted(known))}",
            )

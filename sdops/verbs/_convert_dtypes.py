"""Which tensors of a conversion get which dtype."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase

from sdops.archs.detect import MARKER, Detection
from sdops.core.source import Source
from sdops.core.spec import FP8, Spec
from sdops.core.view import View
from sdops.errors import UsageError
from sdops.text import suggest
from sdops.verbs._convert_draft import Entry
from sdops.verbs._convert_wish import ALL, Wish

# Of fp8 outputs: matrices of linear layers inside the blocks, and no others. Everything near the ends of a network, and
# whatever carries position, time or scale, keeps its dtype (as diffusers' layerwise casting and ComfyUI do).
_DELICATE = re.compile(
    r"norm|embed|modulation|(^|\.)(proj_in|proj_out|final_layer|shared|relative_attention_bias|time_in|vector_in|guidance_in"
    r"|img_in|txt_in|txt_norm|scale_shift_table|pos_embed|label_emb|time_embed|condition_embedder|distilled_guidance_layer"
    r"|refiner|head)(\.|$)"
)
_IN_BLOCK = re.compile(r"\.\d+\.")
_NEVER = (MARKER, "schedule", "training")


def wanted_dtypes(tensors: Mapping[str, Entry], detection: Detection, wish: Wish) -> dict[str, str]:
    """Name -> new dtype, of the tensors that get one.

    Integers, markers, noise schedules and scales keep theirs.

    Raises:
        UsageError: a component that was named is not there.
    """
    from sdops.core.cast_view import castable

    _check_names(tensors, detection, wish)
    kinds = {part.name: part.kind for part in detection.components}
    found = {}
    for key, entry in tensors.items():
        spec = entry.made.spec
        dtype = _of_component(entry.component, kinds.get(entry.component, ""), wish)
        if not dtype or dtype == spec.dtype or entry.component in _NEVER or not castable(key, spec):
            continue
        if not _matches(key, wish):
            continue
        if dtype in FP8 and (kinds.get(entry.component) == "vae" or not is_linear(entry.name, spec)):
            continue
        found[key] = dtype
    return found


def casts(tensors: Mapping[str, Entry], output: Source) -> dict[str, tuple[str, str]]:
    """Tensor -> its type in the input and in the output, where they differ: dtypes, or GGML's types of a GGUF file."""
    found = {}
    for key, entry in tensors.items():
        source = entry.made.ranges[0].source
        file = source.source if isinstance(source, View) else source  # fp8 that is multiplied by its scales is fp8
        types = _type_of(file, entry.made.ranges[0].key), _type_of(output, key)
        if types[0] != types[1]:
            found[key] = types
    return found


def _type_of(source: Source, key: str) -> str:
    kind: str = getattr(source, "types", {}).get(key) or source.specs[key].dtype
    return kind


def is_linear(name: str, spec: Spec) -> bool:
    """Whether a tensor is the matrix of a linear layer inside a block."""
    inside = _IN_BLOCK.search(name) is not None and _DELICATE.search(name) is None
    return inside and name.endswith((".weight", "in_proj_weight")) and len(spec.shape) == 2


def _of_component(component: str, kind: str, wish: Wish) -> str:
    for name in (component, kind):
        if name and name in wish.dtypes:
            return wish.dtypes[name]
    return wish.dtypes.get(ALL, "")


def _matches(key: str, wish: Wish) -> bool:
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

"""What LoRAs are applied to: is it the right model, and in which form is the result written."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdops.archs.detect import detect
from sdops.core.hashing import cached_sha256
from sdops.core.source import Source
from sdops.core.spec import FP8, Spec
from sdops.errors import FormatError, MismatchError, UsageError
from sdops.formats import open_source
from sdops.formats._file import InputFile
from sdops.text import count
from sdops.verbs._adapter_family import check_family
from sdops.verbs._apply_loras import Lora
from sdops.verbs._inputs import Model, Opened, open_model

if TYPE_CHECKING:
    from sdops.core.applied import Applied
    from sdops.verbs._apply_changes import Changes

_SHOWN = 5
_DENOISERS = ("unet", "transformer")
_LEGACY = 0x100000, 0x10000  # start and length of what kohya's old hash is made of


def open_base(model: Model) -> Opened:
    """Open the model, which must not be an adapter itself.

    Raises:
        UsageError: it is one.
        FormatError: its weights are quantised in a way that nothing can be added to.
    """
    origin: Source = open_source(model) if isinstance(model, str | os.PathLike) else model
    detection = detect(origin.specs)
    if detection.family == "adapter":
        raise UsageError(
            f"`{origin.name}` is an adapter itself (LoRA or the like)",
            hint="give the checkpoint first, and the adapter with `--lora`; `sdops merge` adds LoRAs to LoRAs",
        )
    for weight, how in detection.quantised.items():
        if how.kind not in ("fp8", "fp8-scaled"):
            raise FormatError(
                f"`{origin.name}` is quantised ({how.kind}, `{weight}`): its numbers are codes, not weights",
                hint="apply to the model that it was made from and quantise the result, or load the LoRA beside it",
                key=weight,
            )
    return open_model(origin)


def packed_types(model: Opened) -> dict[str, str]:
    """Tensors of a GGUF file that lie there in blocks of few bits per number -> their type."""
    from sdops.core.ggml import PLAIN
    from sdops.formats.gguf import GgufFile

    origin = model.origin
    if not isinstance(origin, GgufFile):
        return {}
    return {key: kind for key, kind in origin.types.items() if kind not in PLAIN}


def unpacked(model: Opened) -> list[str]:
    """A sentence if the model's weights are written in another form than they have."""
    kinds = Counter(packed_types(model).values())
    if not kinds:
        return []
    kind = kinds.most_common(1)[0][0]
    return [
        f"the {kind} weights of `{model.name}` are written as F16, where nothing else is asked for; "
        f"`sdops convert RESULT --to gguf --dtype {kind.lower()}` packs them again"
    ]


def check_architectures(loras: Sequence[Lora], model: Opened, problem: str = "") -> None:
    """Refuse adapters that were made for another family of models.

    Those for text encoders alone fit whatever has such encoders.

    Args:
        loras: All adapters.
        model: The model.
        problem: What does not fit.

    Raises:
        MismatchError: names both.
    """
    main = model.detection.main
    if main is None or main.kind != "model":
        return
    for lora in loras:
        if any(patch.target.component in _DENOISERS for patch in lora.adapter.patches):
            check_family(lora.adapter, model.detection, model.name, problem)


def check_matched(loras: Sequence[Lora], changes: Changes, model: Opened, *, allowed: bool) -> None:
    """Refuse adapters with layers that the model does not have.

    Raises:
        MismatchError: names them, unless they are allowed and the adapter is for this family.
    """
    for lora, matched in zip(loras, changes.matched, strict=True):
        if matched.unmatched and not allowed:
            names = [f"`{name}`" for name in matched.unmatched]
            shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} others" if names[_SHOWN:] else "")
            raise MismatchError(
                f"`{lora.name}` changes {count(len(names), 'layer')} that `{model.name}` does not have: {shown}",
                hint="`--allow-unmatched` leaves them out" + _missing(matched.unmatched, model),
                unmatched=matched.unmatched,
            )


def _missing(unmatched: Sequence[str], model: Opened) -> str:
    absent = {name.partition(":")[0] for name in unmatched} - {part.name for part in model.detection.components}
    return f"; the model has no {', '.join(sorted(absent))}" if absent else ""


def foreign_base(lora: Lora, model: Opened) -> list[str]:
    """A sentence if the adapter says that it was trained on another file."""
    said = lora.adapter.source.metadata
    if len(model.files) != 1:
        return []
    known = cached_sha256(model.files[0])
    if known and said.get("ss_new_sd_model_hash"):
        other = known != said["ss_new_sd_model_hash"]
    elif said.get("ss_sd_model_hash"):
        other = _legacy_hash(model.files[0]) != said["ss_sd_model_hash"]
    else:
        return []
    base = said.get("ss_sd_model_name", "another file")
    text = (
        f"`{lora.name}` was trained on `{base}`, whose hash is not that of `{model.name}`: it may act differently here"
    )
    return [text] if other else []


def _legacy_hash(path: Path) -> str:
    """First 8 digits of the SHA-256 of 64 KiB, as trainers record it."""
    file = InputFile(path)
    try:
        start = min(_LEGACY[0], file.size)
        return hashlib.sha256(file.read(start, min(_LEGACY[1], file.size - start))).hexdigest()[:8]
    finally:
        file.close()


def output_of(
    model: Opened,
    weights: Source,
    changes: Changes,
    dtypes: tuple[str, str],
    *,
    sequential: bool,
    seed: int | None,
) -> Applied:
    """The Source of the result.

    Args:
        model: What is written where nothing changes.
        weights: Where the values of changed tensors are read.
        changes: What is added.
        dtypes: Of the result, of the changed tensors; empty = as the model's. fp8 weights get a new scale.
        sequential, seed: As in core.applied.

    Raises:
        FormatError: a changed tensor is of a dtype that cannot be written.
    """
    from sdops.core.applied import Applied
    from sdops.core.cast_view import Cast, castable
    from sdops.core.casting import CASTABLE
    from sdops.core.views import Dequantised, Renamed

    scales = model.source.scales if isinstance(model.source, Dequantised) else {}
    source = model.source if dtypes[0] else model.origin if isinstance(model.source, Dequantised) else model.source
    target = dtypes[1] or dtypes[0]
    packed = packed_types(model)
    if packed and not dtypes[0]:
        source = Cast(source, {key: "F16" for key in packed if castable(key, source.specs[key])})
    specs = {key: Spec(target or source.specs[key].dtype, source.specs[key].shape) for key in changes.terms}
    for key, spec in specs.items():
        if spec.dtype not in CASTABLE:
            raise FormatError(
                f"`{key}` of `{model.name}` is {spec.dtype}, which cannot be written",
                hint="`--touched-dtype bf16` writes the layers that change as bf16",
                key=key,
            )
    if dtypes[0]:
        source = Cast(source, {key: dtypes[0] for key, spec in source.specs.items() if castable(key, spec)})
    elif target:
        quantised = model.detection.quantised
        gone = {side for key in specs if key in quantised for side in quantised[key].sides}
        source = Renamed(source, {key: key for key in source.specs if key not in gone})
    kept = {key: scale for key, scale in scales.items() if key in specs and specs[key].dtype in FP8}
    return Applied(source, changes.changes(specs, kept), weights=weights, sequential=sequential, seed=seed)

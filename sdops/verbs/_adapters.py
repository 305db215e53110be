"""Open an adapter file of any dialect, read its tensors, and write adapters in any dialect.

open_adapter(path) -> Adapter            names, shapes and alphas; everything is checked here
read_parts(adapter, patch) -> tensors    of one patch, for the adapters shelf
spelled(adapter, dialect) -> Source      the same adapter in another dialect, made while it is read
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdops import adapters
from sdops.core.patch import Adapter, Patch
from sdops.core.source import Source
from sdops.dialects import ORDER, Contents, best, dialect
from sdops.dialects.cloneofsimo import list_names
from sdops.dialects.peft import CONFIG
from sdops.errors import FormatError, MismatchError, SdopsError
from sdops.formats import open_file, open_list, open_source, read_json
from sdops.hub import located
from sdops.text import count
from sdops.verbs._adapter_family import read_as_any, title_of
from sdops.verbs._adapter_names import names_of
from sdops.verbs._adapter_source import AdapterSource, SourceValues, lazy, not_finite, values_of
from sdops.verbs._split_qkv import warning

if TYPE_CHECKING:
    from torch import Tensor

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_SHOWN = 5
# Families whose scale is alpha / r. An alpha of 0 means nothing to some programs and r to others.
_SCALED = ("lora", "lora_embedding", "loha", "lokr", "glora")


AdapterFile = str | os.PathLike[str] | Source  # a LoRA as verbs take it


def open_adapter(path: AdapterFile, *, allow_unknown: bool = False, architecture: str | None = None) -> Adapter:
    """Open a LoRA-like file, or a PEFT folder, whatever its dialect.

    Args:
        path: A file, a folder with `adapter_config.json`, or an opened file.
        allow_unknown: Leave tensors that are not understood in `Adapter.unknown` instead of refusing the file.
        architecture: The family that it is for, if the user says so; otherwise it is told from the file.

    Raises:
        FormatError: it is no adapter, is damaged, holds tensors that are not understood, or its numbers make no sense.
        UsageError: there is no such architecture.
        SdopsError: there is no such file.
    """
    if not isinstance(path, str | os.PathLike):
        return _read(Path(path.name), path, None, architecture, allow_unknown=allow_unknown)
    path = located(path)
    source, config = _open(path)
    try:
        return _read(path, source, config, architecture, allow_unknown=allow_unknown)
    except BaseException:
        source.close()
        raise


def name_of(file: AdapterFile) -> str:
    """The file's name, without its folders."""
    return Path(file if isinstance(file, str | os.PathLike) else file.name).name


def open_alike(files: Sequence[AdapterFile], *, allow_unknown: bool = False) -> list[Adapter]:
    """Open adapters for one model; those that could be for several are read as the others are.

    Raises:
        MismatchError: they are for different models.
        FormatError, SdopsError: as `open_adapter`.
    """
    adapters: list[Adapter] = []
    try:
        adapters += (open_adapter(file, allow_unknown=allow_unknown) for file in files)
        sure = next((adapter.architecture for adapter in adapters if not adapter.rivals), adapters[0].architecture)
        for index, adapter in enumerate(adapters):
            if sure in adapter.rivals:
                adapters[index] = open_adapter(files[index], allow_unknown=allow_unknown, architecture=sure)
                adapter.source.close()
        _check_alike(adapters)
    except BaseException:
        for adapter in adapters:
            adapter.source.close()
        raise
    return adapters


def _check_alike(adapters: Sequence[Adapter]) -> None:
    """Refuse adapters for different models; layers of different shapes are found when they are read."""
    first = adapters[0]
    for other in adapters[1:]:
        if (other.architecture, other.variant) != (first.architecture, first.variant):
            names = [f"{title_of(a.architecture)} {a.variant}".strip() for a in (first, other)]
            raise MismatchError(
                f"`{first.source.name}` is for {names[0]}, `{other.source.name}` for {names[1]}",
                hint=f"`sdops inspect {first.source.name} {other.source.name}` shows both",
            )


def _open(path: Path) -> tuple[Source, Mapping[str, Any] | None]:
    """The file with the tensors, and PEFT's configuration beside it."""
    folder = path if path.is_dir() else path.parent
    config = folder / CONFIG
    if path.is_dir() and config.is_file():
        weights = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
        if weights is None:
            raise SdopsError(
                f"`{path}` has an `{CONFIG}` but none of {', '.join(f'`{name}`' for name in _WEIGHTS)}",
                hint="copy the weights beside it",
                path=path,
            )
        return open_file(weights), read_json(config)
    beside = read_json(config) if path.name in _WEIGHTS and config.is_file() else None
    return open_list(path, list_names) or open_source(path), beside


def read_adapter(source: Source) -> Adapter:
    """An adapter file that is open already; tensors that are not understood are left in `Adapter.unknown`.

    Raises:
        FormatError: it is no adapter, is damaged, or its numbers make no sense.
    """
    return _read(Path(source.name), source, None, None, allow_unknown=True)


def _read(
    path: Path, source: Source, config: Mapping[str, Any] | None, wanted: str | None, *, allow_unknown: bool
) -> Adapter:
    file = Contents(source.specs, source.metadata, config)
    if "lora_controlnet" in source.specs:
        raise FormatError(
            f"`{path}` is a Control-LoRA: a ControlNet of which only the difference to the U-Net is saved",
            hint="use it where a ControlNet is expected",
            path=path,
        )
    name = best(source.specs)
    if name is None:
        raise FormatError(f"`{path}` is no adapter file", hint=f"see what it is: `sdops inspect {path}`", path=path)
    meant = read_as_any(file, dialect(name), wanted)
    architecture, reading = meant.architecture, meant.reading
    if reading.unknown and not allow_unknown:
        raise _not_understood(path, reading.unknown)
    if not reading.patches and not reading.extras:
        raise FormatError(f"`{path}` is no adapter file", hint=f"see what it is: `sdops inspect {path}`", path=path)
    adapter = Adapter(
        source,
        name,
        architecture.family,
        tuple(reading.patches),
        reading.extras,
        tuple(reading.unknown),
        tuple(reading.notes),
        architecture.variant,
        meant.rivals,
    )
    if architecture.family == "flux1" and (note := warning(source, adapter.patches)):
        adapter = replace(adapter, notes=(*adapter.notes, note))
    _check(adapter)
    return adapter


def _not_understood(path: Path, unknown: list[str]) -> FormatError:
    shown = ", ".join(f"`{key}`" for key in unknown[:_SHOWN])
    more = f" and {count(len(unknown) - _SHOWN, 'other')}" if len(unknown) > _SHOWN else ""
    return FormatError(
        f"`{path}` holds {count(len(unknown), 'tensor')} that nothing here understands: {shown}{more}",
        hint="`--allow-unknown` of `apply`, `convert` and `resize` leaves them out",
        path=path,
        unknown=unknown,
    )


# -------------------------------------------------------------------------------------------------------------- checks


def _check(adapter: Adapter) -> None:
    """Shapes of all patches against each other, and alphas, before anybody computes.

    Raises:
        FormatError: naming the tensor.
    """
    for patch in adapter.patches:
        try:
            adapters.family(patch.family).check(adapter.shapes(patch), None)
        except SdopsError as error:
            where = f"`{_blamed(patch, error)}` of `{adapter.source.name}`"
            raise FormatError(f"{where}: {error.message}", hint=error.hint, target=patch.target) from None
        _check_alpha(adapter, patch)


def check_fits(adapter: Adapter, patch: Patch, shape: tuple[int, ...]) -> None:
    """Look at a patch's shapes beside that of the weight which it is for.

    Raises:
        MismatchError: naming the tensor and the layer.
    """
    try:
        adapters.family(patch.family).check(adapter.shapes(patch), shape)
    except SdopsError as error:
        raise unfit(adapter, patch, error) from None


def unfit(adapter: Adapter, patch: Patch, error: SdopsError) -> MismatchError:
    """An error about a part, with the tensor's and the layer's name."""
    where = f"`{_blamed(patch, error)}` of `{adapter.source.name}`, for `{patch.target}`"
    return MismatchError(f"{where}: {error.message}", hint=error.hint, target=patch.target)


def _blamed(patch: Patch, error: SdopsError) -> str:
    """The tensor that an error is about."""
    return patch.parts.get(str(error.data.get("part")), next(iter(patch.parts.values())))


def _check_alpha(adapter: Adapter, patch: Patch) -> None:
    part = next((part for part in ("lora_alpha", "constraint") if part in patch.parts), None)
    key = patch.parts[part] if part else "lora_alpha in the configuration"
    alpha = float(values_of(adapter.source, key)[0, 0]) if part else float(patch.settings.get("lora_alpha", 1.0))
    unscaled = patch.family == "lokr" and {"w1", "w2"} <= patch.parts.keys()
    if not isfinite(alpha) or (alpha == 0 and patch.family in _SCALED and not unscaled):
        raise FormatError(
            f"`{key}` of `{adapter.source.name}` is {alpha:g}; programs disagree on what that means",
            hint="remove the tensor if the alpha should be the rank",
            key=key,
            target=patch.target,
        )


# ------------------------------------------------------------------------------------------------------------- reading


def read_parts(adapter: Adapter, patch: Patch) -> dict[str, Tensor]:
    """The tensors of one patch as float32 (float64 where the file has that) in the file's shapes.

    Raises:
        FormatError: one holds NaN or infinity, or no numbers.
    """
    import torch

    found: dict[str, Tensor] = {}
    for part, key in patch.parts.items():
        spec = adapter.source.specs[key]
        values = torch.from_numpy(values_of(adapter.source, key)).reshape(spec.shape)
        wrong = int((~torch.isfinite(values)).sum())
        if wrong:
            raise not_finite(adapter.source, key, wrong)
        found[part] = values if spec.dtype == "F64" else values.float()
    return found


def patch_bytes(adapter: Adapter, patch: Patch) -> int:
    """Of a patch's tensors in its file."""
    return sum(adapter.source.specs[key].nbytes for key in patch.parts.values())


# ------------------------------------------------------------------------------------------------------------- writing


@dataclass(slots=True)
class Spelled:
    """An adapter in another dialect.

    Attributes:
        source: Its tensors, made while they are read.
        companions: Name of a file that belongs beside it -> its text (PEFT's `adapter_config.json`).
        left_out: Extras that have no place in the dialect.
    """

    source: AdapterSource
    companions: Mapping[str, str]
    left_out: tuple[str, ...]


def spelled(adapter: Adapter, to: str, metadata: Mapping[str, str] | None = None) -> Spelled:
    """The same adapter in the dialect `to`, for a sink. Nothing is read yet but what decides on names and shapes.

    Args:
        adapter: Any, also one whose source computes.
        to: Name of a file on the dialects shelf.
        metadata: Text for the header; the source's own if not given. What the dialect needs is added.

    Raises:
        UsageError: there is no such dialect.
        MismatchError: it cannot hold the adapter.
    """
    names = names_of(adapter.architecture, adapter.variant)
    written = dialect(to).write(adapter, names, SourceValues(adapter.source))
    kept = adapter.source.metadata if metadata is None else metadata
    tensors = {key: lazy(recipe, adapter.source) for key, recipe in written.tensors.items()}
    header = {**_without_dialect(kept), **written.metadata}
    source = AdapterSource(adapter.source.name, tensors, header, adapter.source.close)
    return Spelled(source, written.companions, tuple(written.left_out))


def holders(adapter: Adapter) -> Iterable[str]:
    """The dialects that can hold an adapter."""
    names = names_of(adapter.architecture, adapter.variant)
    for name in ORDER:
        try:
            dialect(name).write(adapter, names, SourceValues(adapter.source))
        except SdopsError:
            continue
        yield name


def _without_dialect(metadata: Mapping[str, str]) -> dict[str, str]:
    """The header without what only describes the spelling that it came in."""
    own = ("unet", "text_encoder", "lora_adapter_metadata")
    return {
        key: text
        for key, text in metadata.items()
        if key not in own and not key.startswith(("unet:", "text_encoder:")) and text != "<embed>"
    }

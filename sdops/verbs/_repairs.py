"""The known repairs of model files: small functions that change a draft of the file and say what they did."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from sdops.text import count

if TYPE_CHECKING:
    from sdops.archs.detect import Detection
    from sdops.core.source import Source
    from sdops.core.spec import Spec


@dataclass(slots=True)
class Draft:
    """A file as it shall be; the file itself is only read.

    Attributes:
        source: The file.
        detection: What it is.
        names: Name in the new file -> name in the source, in the order of the data.
        values: Name in the new file -> other dtype and shape, and the bytes.
        metadata: Of the new file.
        offsets: Name in the source -> position of its first byte; empty where that does not matter.
        surplus: Bytes after the last tensor.
        mode: Permissions; None where they are not to be changed.
        reorder: Whether the tensors take the usual order instead of that of the file.
    """

    source: Source
    detection: Detection
    names: dict[str, str]
    metadata: dict[str, str]
    values: dict[str, tuple[Spec, bytes]] = field(default_factory=dict)
    offsets: Mapping[str, int] = field(default_factory=dict)
    surplus: int = 0
    mode: int | None = None
    reorder: bool = False

    @property
    def specs(self) -> dict[str, Spec]:
        """Of the new file."""
        return {
            name: self.values[name][0] if name in self.values else self.source.specs[old]
            for name, old in self.names.items()
        }

    @property
    def same_data(self) -> bool:
        """Whether all bytes of tensors stay, and where they are."""
        return not (self.values or self.reorder) and len(self.names) == len(self.source.specs)

    def drop(self, keys: set[str]) -> None:
        """Leave tensors of the source out."""
        self.names = {name: old for name, old in self.names.items() if old not in keys}
        self.values = {name: value for name, value in self.values.items() if name in self.names}

    def copy(self) -> Draft:
        """A draft that can be changed without changing this one."""
        return replace(self, names=dict(self.names), metadata=dict(self.metadata), values=dict(self.values))


def cut_surplus(draft: Draft) -> list[str]:
    """Bytes after the last tensor are cut off."""
    if not draft.surplus:
        return []
    done = f"cut off {draft.surplus:,} bytes after the last tensor"
    draft.surplus = 0
    return [done]


def align(draft: Draft) -> list[str]:
    """Tensors at odd places are moved, so that their numbers can be read directly."""
    odd = [key for key, offset in draft.offsets.items() if offset % _itemsize(draft.source.specs[key])]
    draft.reorder |= bool(odd)
    return [f"aligned {count(len(odd), 'tensor')}"] if odd else []


def position_ids(draft: Draft) -> list[str]:
    """Positions of text encoders, broken by merging or floats, become 0, 1, 2 ... again."""
    from sdops.core.spec import Spec
    from sdops.verbs._values import position_ids as find

    done = []
    for found in find(draft.source):
        name = _new_name(draft, found.key)
        if found.state != "ok" and name:
            spec = Spec("I64", draft.source.specs[found.key].shape)
            draft.values[name] = spec, struct.pack(f"<{found.total}q", *range(found.total))
            done.append(f"`{found.key}` was {found}")
    return done


def text_model(draft: Draft) -> list[str]:
    """Names get the `text_model.` that NAI files and transformers from 5.6 on leave out."""
    done = []
    for part in draft.detection.components:
        if not part.table.strip:
            continue
        renamed = {}
        for name, old in draft.names.items():
            rest = name.removeprefix(part.prefix)
            moves = old in set(part.keys) and rest.partition(".")[0] not in ("text_projection", "logit_scale")
            renamed[part.prefix + part.table.strip + rest if moves else name] = old
        if len(renamed) == len(draft.names):  # else some names are there with and without
            done.append(f"renamed {count(len(part.keys), 'key')} of {part.name}")
            olds = {old: name for name, old in draft.names.items()}
            draft.values = {new: draft.values[olds[old]] for new, old in renamed.items() if olds[old] in draft.values}
            draft.names = renamed
    return done


# `unet.unet.`: diffusers until 0.23 (huggingface/diffusers#5977); with PEFT's prefix inside: bghira/SimpleTuner#779.
_DOUBLED = re.compile(r"(unet|transformer|text_encoder(?:_2)?)\.(?:\1|base_model\.model)\.")


def prefixes(draft: Draft) -> list[str]:
    """Names of LoRA layers with two prefixes, as some trainers wrote them, keep the first."""
    if draft.detection.family != "adapter":
        return []
    renamed = {_DOUBLED.sub(r"\1.", name, count=1) if _DOUBLED.match(name) else name: name for name in draft.names}
    changed = sum(new != old for new, old in renamed.items())
    if not changed or len(renamed) < len(draft.names):  # some names are there with and without
        return []
    draft.names = {new: draft.names[old] for new, old in renamed.items()}
    draft.values = {new: draft.values[old] for new, old in renamed.items() if old in draft.values}
    return [f"renamed {count(changed, 'key')}"]


_INTEGERS = re.compile(r"(num_batches_tracked|num_updates|relative_position_index|token_type_ids)$")


def integers(draft: Draft) -> list[str]:
    """Counters and indexes that a conversion made floats become integers again."""
    from sdops.core.spec import Spec
    from sdops.verbs._values import values

    done = []
    for name, old in draft.names.items():
        spec = draft.source.specs[old]
        if not (_INTEGERS.search(old) and spec.is_float and (numbers := values(draft.source, old))):
            continue
        if all(abs(number) < 2**31 for number in numbers):  # not NaN
            dtype, code = ("I32", "i") if old.endswith("num_updates") else ("I64", "q")
            data = struct.pack(f"<{spec.numel}{code}", *map(round, numbers))
            draft.values[name] = Spec(dtype, spec.shape), data
            done.append(f"`{old}` was {spec.dtype}")
    return done


def alphas(draft: Draft) -> list[str]:
    """The alpha of a LoRA becomes one float32 number, as all programs read it."""
    from sdops.core.spec import Spec
    from sdops.verbs._values import values

    changed: dict[str, int] = {}
    for name, old in draft.names.items():
        spec = draft.source.specs[old]
        if not old.endswith(".alpha") or spec.numel != 1 or (spec.dtype in ("F32", "F16", "BF16") and not spec.shape):
            continue
        if numbers := values(draft.source, old):
            draft.values[name] = Spec("F32", ()), struct.pack("<f", numbers[0])
            changed[str(spec)] = changed.get(str(spec), 0) + 1
    return [f"{count(number, 'alpha')} of {spec} became F32[]" for spec, number in changed.items()]


def split_qkv(draft: Draft) -> list[str]:
    """Alphas of Flux LoRAs that `split_qkv` left too small get their trained strength."""
    if draft.detection.family != "adapter" or "split_qkv" not in draft.metadata.get("ss_network_args", ""):
        return []
    from sdops.core.spec import Spec
    from sdops.errors import SdopsError
    from sdops.verbs._adapters import read_adapter
    from sdops.verbs._split_qkv import weakened, without_word

    try:
        adapter = read_adapter(draft.source)
    except SdopsError:
        return []  # damaged in another way
    found = weakened(draft.source, adapter.patches)
    for old, alpha in found.items():
        if name := _new_name(draft, old):
            draft.values[name] = Spec("F32", ()), struct.pack("<f", alpha)
    if found:
        draft.metadata = without_word(draft.metadata)
    return [f"multiplied {count(len(found), 'alpha')} by 3, of `linear1` by 4"] if found else []


def file_format(draft: Draft) -> list[str]:
    """`format: pt` is written: some programs refuse files without it."""
    if draft.metadata.get("format"):
        return []
    draft.metadata = {"format": "pt", **draft.metadata}
    return ["wrote `format: pt`"]


def permissions(draft: Draft) -> list[str]:
    """A file that only its owner may read gets the usual permissions."""
    if draft.mode is None or draft.mode & 0o077:
        return []
    umask = os.umask(0)
    os.umask(umask)
    before, draft.mode = draft.mode, 0o666 & ~umask
    return [f"{before:04o} became {draft.mode:04o}"] if draft.mode != before else []


def adapter_leftovers(draft: Draft) -> list[str]:
    """LoRA tensors that a merge left in a checkpoint are dropped."""
    if draft.detection.family == "adapter":
        return []
    stray = {key for part in draft.detection.components if part.family == "adapter" for key in part.keys}
    draft.drop(stray)
    return [f"dropped {count(len(stray), 'tensor')}"] if stray else []


def training_leftovers(draft: Draft) -> list[str]:
    """Optimizer states and other things of training are dropped."""
    stray = set(draft.detection.junk.get("training", ()))
    draft.drop(stray)
    return [f"dropped {count(len(stray), 'tensor')}"] if stray else []


@dataclass(frozen=True, slots=True)
class Repair:
    """One entry of the table; it changes the draft and returns what it did, one line each."""

    apply: Callable[[Draft], list[str]]
    by_default: bool = True

    @property
    def explanation(self) -> str:
        """One sentence."""
        return (self.apply.__doc__ or "").partition("\n")[0]


# In the order in which they are done. `hashes` comes last of all: see verbs/fix.py.
TABLE: dict[str, Repair] = {
    "trailing-bytes": Repair(cut_surplus),
    "alignment": Repair(align),
    "adapter-leftovers": Repair(adapter_leftovers, by_default=False),
    "training-leftovers": Repair(training_leftovers, by_default=False),
    "position-ids": Repair(position_ids),
    "text-model": Repair(text_model),
    "prefixes": Repair(prefixes),
    "integers": Repair(integers),
    "alphas": Repair(alphas),
    "split-qkv": Repair(split_qkv),
    "format": Repair(file_format),
    "permissions": Repair(permissions),
}
HASHES = "hashes"
HASHES_EXPLAINED = "Hashes of the tensors in the header that are wrong are computed anew."
NAMES = (*TABLE, HASHES)


def _itemsize(spec: Spec) -> int:
    from sdops.core.spec import DTYPE_BITS

    return max(DTYPE_BITS[spec.dtype] // 8, 1)


def _new_name(draft: Draft, old: str) -> str | None:
    return next((name for name, key in draft.names.items() if key == old), None)

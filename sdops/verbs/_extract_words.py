"""New words of a fine-tune: rows of its text encoders' tables that the base has not, on their way into a LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdops.core.patch import Target
from sdops.core.spec import Spec
from sdops.embeddings.checkpoint import VOCABULARY
from sdops.report import Report, Section
from sdops.verbs._apply_places import Places
from sdops.verbs._embed_added import added_names
from sdops.verbs._inputs import Opened

if TYPE_CHECKING:
    from sdops.verbs._extract_store import Store

_TABLE = "text_model.embeddings.token_embedding"


def added_rows(tuned: Opened, base: Opened) -> Iterator[tuple[str, str, int, int]]:
    """Encoder, tensor, first new row, rows: of tables that are longer than the base's and than CLIP's vocabulary."""
    for component in tuned.detection.components:
        if component.kind != "text_encoder":
            continue
        place = Places(tuned).find(Target(component.name, _TABLE), "weight")
        if place is None or place.shape[0] <= VOCABULARY:
            continue
        own = Places(base).find(Target(component.name, _TABLE), "weight")
        first = max(VOCABULARY, own.shape[0] if own is not None else 0)
        if place.shape[0] > first:
            yield component.name, place.parts[0].key, first, place.shape[0]


def word_name(names: dict[int, str], number: int) -> str:
    """As the tokenizer calls it, else `added0`, `added1` ..."""
    return names.get(number) or f"added{number - VOCABULARY}"


def add_words(store: Store, tuned: Opened, base: Opened) -> dict[str, str]:
    """Put the vectors of new words into the store; key -> what it is, as `core.patch.Adapter.extras` has it."""
    import torch

    from sdops.core.stream import TORCH_DTYPES

    extras = {}
    names = added_names(Path(tuned.files[0])) if tuned.files else {}
    for encoder, key, first, rows in added_rows(tuned, base):
        spec = tuned.source.specs[key]
        size = spec.nbytes // spec.shape[0]
        data = bytearray((rows - first) * size)
        tuned.source.read_into(key, first * size, memoryview(data))
        values = torch.frombuffer(data, dtype=TORCH_DTYPES[spec.dtype]).reshape(rows - first, spec.shape[1])
        for number in range(first, rows):
            name = f"embedding {encoder} {word_name(names, number)}"
            place = store.put(values[number - first : number - first + 1])
            store.name_tensor(name, Spec(spec.dtype, (1, spec.shape[1])), place)
            extras[name] = name
    return extras


def tell_words(report: Report, words: Mapping[str, str], left_out: Sequence[str], to: str) -> None:
    """Say which words came along, and which the dialect has no place for."""
    if not words:
        return
    names = list(dict.fromkeys(what.split(" ", 2)[2] for what in words.values()))
    shown = ", ".join(f"`{name}`" for name in names[:8]) + (" ..." if len(names) > 8 else "")
    report.data["words"] = [] if left_out else names
    if left_out:
        report.warnings.append(f"`{to}` has no place for the new words {shown}: they are left out")
        report.hints.append("`sdops embed convert TUNED --to a1111 -o FOLDER/` makes embeddings of them")
    else:
        report.sections.insert(1, Section("", [["words", f"{shown}, bundled as embeddings"]]))

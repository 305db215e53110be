"""Opens custom-diffusion files of all layouts, and shows them as a LoRA that every other verb can take.

factors u @ v   ->  .lora_up, .lora_down        delta  ->  .diff        whole weight  ->  .set_weight
whole bias      ->  .diff_b, which takes the model's bias               words  ->  bundle_emb.<new1>.clip_l
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sdops.core.patch import Target
from sdops.core.precision import decode, encode
from sdops.core.source import Source, read
from sdops.core.spec import FLOATS, Spec
from sdops.custom_diffusion import find, layout
from sdops.custom_diffusion._types import Concepts, Edit, Word
from sdops.embeddings._types import Vectors
from sdops.errors import FormatError, MismatchError, SdopsError
from sdops.hub import located
from sdops.verbs._adapter_names import names_of
from sdops.verbs._adapter_source import AdapterSource, Lazy, values_of
from sdops.verbs._apply_places import Places
from sdops.verbs._embed_open import open_embeddings
from sdops.verbs._inputs import Opened
from sdops.verbs._personal_files import open_saved

FilePath = str | os.PathLike[str]
Doubles = NDArray[np.float64]
_FAMILIES = {768: "sd1", 1024: "sd2", 2048: "sdxl"}  # width of texts -> family
_WORD_ENDINGS = (".safetensors", ".bin", ".pt")


@dataclass(slots=True)
class ConceptFile:
    """An opened file.

    Attributes:
        path: As it was given.
        source: Where its tensors are.
        layout: Name of a file on the shelf.
        concepts: What it holds.
        family: The models that it is for.
        words: New word -> encoder -> vectors; also of files that lie beside it.
        paths: Every file that was read.
        notes: What the user should know, one sentence each, without a full stop.
    """

    path: Path
    source: Source
    layout: str
    concepts: Concepts
    family: str
    words: dict[str, Mapping[str, Vectors]] = field(default_factory=dict)
    paths: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def values(self, edit: Edit) -> list[Doubles]:
        """The tensors of an edit."""
        return [values_of(self.source, leaf.key).reshape(leaf.spec.shape) for leaf in edit.tensors]

    def check_finite(self) -> None:
        """Raises FormatError if a number is NaN or infinite."""
        for edit in self.concepts.edits:
            if not all(np.isfinite(values).all() for values in self.values(edit)):
                raise FormatError(
                    f"`{self.path}` holds numbers that are NaN or infinite, in `{edit.layer}`",
                    hint="the training diverged or the file is damaged; use an earlier save",
                    path=self.path,
                )

    def target(self, edit: Edit) -> Target:
        """The layer in the canonical layout."""
        return _targets(self.family)[edit.layer]

    @property
    def needs_base(self) -> bool:
        """Whether what it changes is only known beside the model that it was trained on."""
        return any(edit.kind == "whole" for edit in self.concepts.edits)

    @property
    def has_dense(self) -> bool:
        """Whether there is anything but factors."""
        return any(edit.kind != "factors" for edit in self.concepts.edits)


def open_concepts(path: FilePath, words: Sequence[FilePath] = ()) -> ConceptFile:
    """A custom-diffusion file of any layout, with the words that lie beside it.

    Args:
        path: The file, or the folder that diffusers' training wrote.
        words: Embeddings to use as its words, in place of those that it has.

    Raises:
        SdopsError: the file is missing or no model.
        FormatError: it holds no custom diffusion, or something else beside it.
    """
    path = _in_folder(located(path))
    saved, source, _ = open_saved(path)
    try:
        name = find(saved)
        if name is None:
            raise FormatError(
                f"`{path}` holds no custom diffusion", hint=f"`sdops inspect {path}` shows what it is", path=path
            )
        concepts = layout(name).read(saved)
        _check_shapes(path, concepts)
        found = ConceptFile(path, source, name, concepts, _family(path, concepts), paths=[path])
        _check(found)
        if not words:
            found.words |= {word.name: {_encoder(found): _vectors(source, word)} for word in concepts.words}
        for each in words:
            _add_words(found, each)
        for each in [] if found.words else _beside(found):
            with suppress(FormatError):  # something else of that name
                _add_words(found, each)
    except BaseException:
        source.close()
        raise
    return found


def _in_folder(path: Path) -> Path:
    names = [f"pytorch_custom_diffusion_weights{ending}" for ending in (".safetensors", ".bin")]
    return next((path / name for name in names if (path / name).is_file()), path)


def _check_shapes(path: Path, concepts: Concepts) -> None:
    """Refuse what is no weight [o, i] or bias [o], or factors that are no product.

    Raises:
        FormatError: names the first and its shapes.
    """
    for edit in concepts.edits:
        shapes = [leaf.spec.shape for leaf in edit.tensors]
        ranks = {len(shape) for shape in shapes}
        fits = len(shapes) == 1 or (edit.parameter == "weight" and shapes[0][-1:] == shapes[1][:1])
        if ranks != {2 if edit.parameter == "weight" else 1} or not fits:
            raise FormatError(
                f"`{path}` holds a {edit.parameter} for `{edit.layer}` of shape {' and '.join(map(_listed, shapes))}",
                hint="the file is damaged; get it again",
                path=path,
            )


def _listed(shape: tuple[int, ...]) -> str:
    return str(list(shape))


def _family(path: Path, concepts: Concepts) -> str:
    """The family whose texts are as wide as the keys and values say.

    Raises:
        FormatError: there is none.
    """
    widths = {edit.tensors[-1].spec.shape[-1] for edit in concepts.edits if edit.layer.endswith((".to_k", ".to_v"))}
    if len(widths) != 1 or not widths <= _FAMILIES.keys():
        raise FormatError(
            f"`{path}` is for texts of {', '.join(map(str, sorted(widths))) or 'no'} numbers, which no known model has",
            hint="custom diffusion is for SD1 (768), SD2 (1024) and SDXL (2048)",
            path=path,
        )
    return _FAMILIES[widths.pop()]


def _encoder(file: ConceptFile) -> str:
    return {"sd1": "clip_l", "sd2": "clip_h"}.get(file.family, "clip_l")


def _targets(family: str) -> Mapping[str, Target]:
    """Dotted name in any layout -> layer."""
    names = names_of(family)
    return {
        name: target
        for each in names.layouts(names.denoiser)
        for name, target in names.modules(names.denoiser, each).items()
    }


def _check(file: ConceptFile) -> None:
    """Refuse layers that the family does not have.

    Raises:
        FormatError: names the first.
    """
    known = _targets(file.family)
    for edit in file.concepts.edits:
        if edit.layer not in known:
            raise FormatError(
                f"`{file.path}` changes `{edit.layer}`, which {file.family} does not have",
                hint="the file is damaged, or for a model that is not known",
                path=file.path,
            )
    if file.concepts.unknown:
        shown = ", ".join(f"`{name}`" for name in file.concepts.unknown[:3])
        more = f" and {len(file.concepts.unknown) - 3} others" if len(file.concepts.unknown) > 3 else ""
        file.notes.append(f"not understood and left out: {shown}{more}")


def _vectors(source: Source, word: Word) -> Vectors:
    """A word's vectors [n, width], float32."""
    shape = word.leaf.spec.shape
    values = values_of(source, word.leaf.key).reshape(shape)
    rows = values[word.row : word.row + 1] if word.row is not None else values.reshape(-1, shape[-1])
    return Vectors(rows.astype(np.float32), word.leaf.spec.dtype)


def _beside(file: ConceptFile) -> list[Path]:
    """Files with words: `<new1>.bin` of diffusers, `name.pt` beside the web UI's `name.delta.safetensors`."""
    if file.layout == "diffusers":
        return sorted(p for p in file.path.parent.glob("<*>.*") if p.suffix in _WORD_ENDINGS)
    if file.layout == "webui":
        stem = file.path.stem.removesuffix(".delta")
        beside = (file.path.with_name(stem + ending) for ending in (".pt", ".bin"))
        return [path for path in beside if path.is_file() and path != file.path]
    return []


def _add_words(file: ConceptFile, path: FilePath) -> None:
    """The words of another file."""
    found = open_embeddings(path)
    for one in found.embeddings:
        file.words[one.label] = one.vectors
    file.paths += found.paths
    named = ", ".join(f"`{one.label}`" for one in found.embeddings)
    file.notes.append(f"`{Path(path).name}` holds its {'words' if len(found.embeddings) > 1 else 'word'} {named}")


# ------------------------------------------------------------------------------------------------------------ as LoRA


class AsLora(AdapterSource):
    """A custom-diffusion file under the names of a LoRA.

    Attributes:
        files: It lies in.
    """

    def __init__(self, file: ConceptFile, base: Opened | None, *, words: bool) -> None:
        super().__init__(file.source.name, _tensors(file, base, words=words), {})
        self.files = tuple(file.paths)
        self._source = file.source

    def check_unchanged(self) -> None:
        """As the file's."""
        if check := getattr(self._source, "check_unchanged", None):
            check()


def as_lora(file: ConceptFile, base: Opened | None = None, *, words: bool = True) -> AsLora:
    """The file as a Source with a LoRA's names.

    Args:
        file: The file.
        base: The model that it was trained on; only biases need it here.
        words: Whether the new words are among the tensors.

    Raises:
        MismatchError: a bias needs the model, and there is none, or it lacks the layer.
    """
    return AsLora(file, base, words=words)


def _tensors(file: ConceptFile, base: Opened | None, *, words: bool) -> dict[str, Lazy]:
    made: dict[str, Lazy] = {}
    for edit in file.concepts.edits:
        stem = "lora_unet_" + edit.layer.replace(".", "_")
        leaves = edit.tensors
        if edit.parameter == "bias" and edit.kind == "whole":
            made[f"{stem}.diff_b"] = _bias(file, edit, base)
            continue
        suffixes = {
            "factors": (".lora_up.weight", ".lora_down.weight"),
            "delta": (".diff_b",) if edit.parameter == "bias" else (".diff",),
            "whole": (".set_weight",),
        }[edit.kind]
        for suffix, leaf in zip(suffixes, leaves, strict=True):
            made[stem + suffix] = Lazy(leaf.spec, partial(read, file.source, leaf.key))
    for word, parts in file.words.items() if words else ():
        for encoder, vectors in parts.items():
            made[f"bundle_emb.{word}.{encoder}"] = word_tensor(vectors)
    return made


def word_tensor(vectors: Vectors) -> Lazy:
    """A word's vectors as a tensor to be written, in the dtype that they were stored in."""
    dtype = vectors.dtype if vectors.dtype in FLOATS else "F32"
    bits, _ = encode(vectors.values.astype(np.float64).reshape(-1), dtype)
    return Lazy(Spec(dtype, vectors.values.shape), bits.tobytes)


def _bias(file: ConceptFile, edit: Edit, base: Opened | None) -> Lazy:
    """What is added to the model's bias."""
    if base is None:
        raise MismatchError(
            f"`{file.path}` holds a whole bias for `{edit.layer}`, so what it changes is not known without the model",
            hint="name the checkpoint that it was trained on with `--model`",
        )
    place = Places(base).find(file.target(edit), "bias")
    if place is None:
        raise MismatchError(f"`{base.name}` has no bias for `{edit.layer}`", hint=f"give a {file.family} checkpoint")
    key, leaf = place.parts[0].key, edit.tensors[0]

    def make() -> bytes:
        own = values_of(base.source, key).reshape(-1)
        bits, _ = encode(file.values(edit)[0].reshape(-1) - own, "F32")
        return bits.tobytes()

    return Lazy(Spec("F32", leaf.spec.shape), make)


def base_values(base: Opened, target: Target) -> Doubles:
    """A layer's weight in a model, in the canonical layout.

    Raises:
        MismatchError: the model has no such layer.
    """
    place = Places(base).find(target, "weight")
    if place is None or len(place.parts) != 1:
        raise MismatchError(
            f"`{base.name}` has no `{target}`", hint="give the checkpoint that it was trained on with `--model`"
        )
    spec = base.source.specs[place.parts[0].key]
    raw = np.frombuffer(read(base.source, place.parts[0].key), f"u{spec.nbytes // max(spec.numel, 1)}")
    values: Doubles = decode(raw, spec.dtype).reshape(spec.shape[:2])
    return values


def check_model(file: ConceptFile, model: Opened) -> None:
    """Refuse a model of another family, and one whose layers have other shapes.

    Raises:
        MismatchError: names both, and the first layer's shapes.
    """
    if model.detection.family != file.family:
        raise MismatchError(
            f"`{file.path}` is for {file.family}, `{model.name}` is {model.detection.title}",
            hint=f"give a {file.family} checkpoint, best the one that it was trained on",
        )
    places = Places(model)
    for edit in file.concepts.edits:
        place = places.find(file.target(edit), edit.parameter)
        if place is not None and place.shape != edit.shape:
            raise MismatchError(
                f"`{edit.layer}` has shape {_listed(edit.shape)} in `{file.path}`, {_listed(place.shape)} in "
                f"`{model.name}`",
                hint="give the checkpoint that it was trained on; `sdops inspect` shows what a file is",
                layer=edit.layer,
            )


def is_concepts(path: FilePath) -> bool:
    """Whether a file holds custom diffusion; False also for what cannot be read."""
    try:
        open_concepts(path).source.close()
    except SdopsError:
        return False
    return True

"""Which tensor of one adapter file is which of another: through dialects. No torch.

One file is written in the other's dialect, in mind, and then names can be compared. Where one of the two dialects has
no place for alphas, that is the one in which both are compared: there they are in `up`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from sdops.archs.detect import detect
from sdops.core.patch import Adapter
from sdops.core.source import Source
from sdops.core.view import View
from sdops.dialects import Recipe, dialect
from sdops.dialects._recipes import number, whole
from sdops.errors import SdopsError
from sdops.formats import FileSource
from sdops.verbs._adapter_names import names_of
from sdops.verbs._adapter_peek import is_adapter
from sdops.verbs._adapter_source import AdapterSource, SourceValues, lazy
from sdops.verbs._adapters import open_adapter
from sdops.verbs._counterparts import Counterparts, Model

_COMPLETE, _WITHOUT_ALPHAS = "comfy", "peft"  # dialects: with everything as tensors; with alphas in another file
_DOWN = (".lora_down.weight", ".lora_A.weight")


class FileView(View):
    """A file under other names."""

    def __init__(self, origin: FileSource, source: Source) -> None:
        super().__init__(source, source.specs)
        self.path, self.files, self.warnings = origin.path, origin.files, origin.warnings
        self.check_unchanged = origin.check_unchanged


def open_as_adapter(path: Path) -> tuple[Model, Adapter] | None:
    """An adapter file, a PEFT folder or a torch list as what is looked at; None if it is none that can be read.

    Raises:
        SdopsError: it cannot be read at all.
    """
    if not is_adapter(path):
        return None
    try:
        adapter = open_adapter(path, allow_unknown=True)
    except SdopsError:
        return None
    origin = cast("FileSource", adapter.source)
    return Model(origin, origin, detect(origin.specs)), adapter


def adapter_counterparts(
    a: Model, b: Model, adapters: tuple[Adapter, Adapter]
) -> tuple[Model, Model, Counterparts] | None:
    """Two adapters, and the second through the first's names: those of that dialect of the two which suits both best.

    None if they are for different models, or have no more in common than as they are.
    """
    one, other = adapters
    if (one.architecture, one.variant) != (other.architecture, other.variant):
        return None
    has_settings = any(patch.settings for each in adapters for patch in each.patches)  # alphas that are no tensors
    best, before = None, -1.0 if has_settings else _common(a.source.specs, b.source.specs)
    for name in dict.fromkeys((one.dialect, other.dialect, *([_COMPLETE] if has_settings else []))):
        if has_settings and name == _WITHOUT_ALPHAS:
            continue
        try:
            left, right = _written(one, name), _written(other, name)
        except SdopsError:  # the dialect cannot hold it
            continue
        if (common := _common(left, right)) > before:
            best, before = (name, left, right), common
    if best is None:
        return None
    name, left, right = best
    _complete_alphas(left, right)
    _complete_alphas(right, left)
    notes = {}
    if one.dialect != other.dialect:
        compared = f"; both are compared as `{name}`" if name != one.dialect else ""
        notes["adapter"] = f"dialect `{other.dialect}`{compared}"
    if name == one.dialect:  # the file may spell names in another way that the dialect knows, too
        own = {key: recipe.copied or key for key, recipe in left.items()}
        left = {own[key]: recipe for key, recipe in left.items()}
        right = {own.get(key, key): recipe for key, recipe in right.items()}
    first, second = _seen(a, left), _seen(b, right)
    return first, second, Counterparts(second.source, {key: key for key in right}, notes)


def _seen(model: Model, recipes: Mapping[str, Recipe]) -> Model:
    """A file as other tensors made of its own."""
    tensors = {key: lazy(recipe, model.source) for key, recipe in recipes.items()}
    source = FileView(model.origin, AdapterSource(model.origin.name, tensors, model.origin.metadata))
    return Model(source, source, detect(source.specs))


def _complete_alphas(recipes: dict[str, Recipe], others: Mapping[str, Recipe]) -> None:
    """Alphas where the other file has some: none at all means that it is the rank."""
    for key in others.keys() - recipes.keys():
        stem = key.removesuffix(".alpha")
        down = next((recipes[stem + end] for end in _DOWN if stem + end in recipes), None)
        if stem != key and down is not None:
            recipes[key] = number(float(down.spec.shape[0]))


def _written(adapter: Adapter, to: str) -> dict[str, Recipe]:
    """What a file in a dialect would be made of; tensors without a place there keep their names.

    Raises:
        SdopsError: the dialect cannot hold it.
    """
    names = names_of(adapter.architecture, adapter.variant)
    written = dialect(to).write(adapter, names, SourceValues(adapter.source))
    rest = {key: whole(key, adapter.source.specs) for key in (*written.left_out, *adapter.unknown)}
    return {**written.tensors, **rest}


def _common(one: Mapping[str, object], other: Mapping[str, object]) -> float:
    """The share of all names that both have."""
    return len(one.keys() & other.keys()) / max(len(one.keys() | other.keys()), 1)

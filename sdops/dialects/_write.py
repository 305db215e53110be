"""From patches to the tensors of a file, in any dialect that is a Spelling."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from sdops.core.patch import Adapter, Patch, Target
from sdops.dialects._names import Names
from sdops.dialects._recipes import Recipe, Values, matrix, number, reshaped, scaled, shifted, whole
from sdops.dialects._shares import ALL, Draft, alpha_of, draft, fitted, is_idle, overlap, rank_of, scale
from sdops.dialects._spelling import Spelling
from sdops.dialects._suffixes import LYCORIS
from sdops.errors import MismatchError
from sdops.text import count

_SHOWN = 3


@dataclass(slots=True)
class Written:
    """A file to be.

    Attributes:
        tensors: Name -> what it is made of.
        metadata: Entries that the dialect adds to the header.
        companions: Name of a file that belongs beside it -> its text.
        left_out: Extras of the adapter that have no place in this dialect.
    """

    tensors: dict[str, Recipe] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    companions: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def write(adapter: Adapter, spelling: Spelling, names: Names, values: Values) -> Written:
    """Every patch of an adapter under the dialect's names.

    Raises:
        MismatchError: the dialect cannot hold a patch: no name for the layer, no such family, no such split.
    """
    written = Written()
    homeless: list[str] = []
    for patches in grouped(adapter.patches):
        target = patches[0].target
        layout = spelling.writes(names, target.component)
        places = [
            (stem, place)
            for module, place in names.places(target.component, layout, target.module)
            if (stem := spelling.stem(names, target.component, module)) is not None
        ]
        has_bias = target.module in names.biased.get(target.component, ())
        drafts = [draft(patch, adapter.source.specs) for patch in patches]
        drafts = [_with_multiplier(item, spelling, values, has_bias=has_bias) for item in drafts]
        if not all(_is_housed(item, places) for item in drafts):
            homeless.append(str(target))
            continue
        for stem, item in placed_drafts(drafts, places, values):
            emit(written.tensors, stem, item, spelling, values)
    if homeless:
        raise cannot_hold(spelling.name, homeless, "it has no name for these layers")
    _place_extras(adapter, spelling, written)
    if not written.tensors and spelling.name != "cloneofsimo":  # which places tokens itself
        raise cannot_hold(spelling.name, list(adapter.extras), "it has no place for embeddings")
    return written


def _is_housed(item: Draft, places: Sequence[tuple[str, Target]]) -> bool:
    """Whether the places have all rows that the patch changes."""
    return sum(overlap(item, place.share or ALL) for _, place in places) == item.reach[1] - item.reach[0]


def grouped(patches: Iterable[Patch]) -> list[list[Patch]]:
    """Patches of one family and module together, in the order of the first of each."""
    groups: dict[tuple[str, str, str], list[Patch]] = {}
    for patch in patches:
        groups.setdefault((patch.target.component, patch.target.module, patch.family), []).append(patch)
    return list(groups.values())


def placed_drafts(
    drafts: Sequence[Draft], places: Sequence[tuple[str, Target]], values: Values
) -> list[tuple[str, Draft]]:
    """Each place that the patches reach, with the one patch that goes there.

    Where a fused patch is split, shares in which it changes nothing are left out, unless that is all of them.
    """
    found = []
    for stem, place in places:
        hits = [item for item in drafts if overlap(item, place.share or ALL)]
        if hits:
            found.append((stem, fitted(hits, place.share or ALL, place.swapped, values)))
    if len(found) > len(drafts):
        return [(stem, item) for stem, item in found if not is_idle(item, values)] or found
    return found


def emit(tensors: dict[str, Recipe], stem: str, item: Draft, spelling: Spelling, values: Values) -> None:
    """Add one patch's tensors under their names.

    Raises:
        MismatchError: the dialect has no name for a part, or for two patches of one layer.
    """
    item = _with_dora(_with_alpha(item, spelling, values), spelling)
    for part, recipe in item.parts.items():
        key = stem + _suffix(item, part, recipe, spelling)
        if key in tensors:
            raise cannot_hold(spelling.name, [item.name], f"two of its tensors would be called `{key}`")
        tensors[key] = recipe


def _suffix(item: Draft, part: str, recipe: Recipe, spelling: Spelling) -> str:
    is_norm = item.family == "full" and "diff" in item.parts and len(item.parts["diff"].spec.shape) == 1
    if spelling.norm_names and is_norm and part in ("diff", "diff_b"):
        return ".w_norm" if part == "diff" else ".b_norm"
    suffixes = spelling.suffixes
    if "mid" in item.parts and ("lora", "mid") in suffixes:
        suffixes = LYCORIS  # nobody looks for a Tucker core beside `lora_A` and `lora_B`
    suffix = suffixes.get((item.family, part))
    if suffix is None:
        raise cannot_hold(spelling.name, [item.name], f"it has no `{part}` of {item.family}, {recipe.spec}")
    return suffix


def _with_alpha(item: Draft, spelling: Spelling, values: Values) -> Draft:
    """The alpha where the dialect keeps it."""
    if item.family not in ("lora", "lora_embedding"):
        item = _with_scale(item, values)
        return _with_alpha_tensor(item) if item.family in ("loha", "lokr", "glora") else item
    if spelling.alphas == "tensor" and not item.settings.get("use_rslora"):
        return _with_bias(_with_alpha_tensor(item), spelling, values)
    factor = scale(item, values)
    parts = {part: recipe for part, recipe in item.parts.items() if part != "lora_alpha"}
    if spelling.alphas == "tensor":
        parts["lora_alpha"] = number(factor * rank_of(item))
    else:
        parts |= {part: scaled(parts[part], factor) for part in ("up", "up_bias") if part in parts}
    settings = {key: value for key, value in item.settings.items() if key not in ("lora_alpha", "use_rslora")}
    return replace(item, parts=parts, settings=settings)


def _with_scale(item: Draft, values: Values) -> Draft:
    """A LoKr of two whole matrices: PEFT scales it by alpha / r of its configuration, all others take it as it is."""
    if not {"w1", "w2"} <= item.parts.keys() or "rank" not in item.settings:
        return item
    alpha = alpha_of(item, values)
    factor = 1.0 if alpha is None else alpha / float(item.settings["rank"])
    parts = {part: recipe for part, recipe in item.parts.items() if part != "lora_alpha"}
    return replace(item, parts={**parts, "w1": scaled(parts["w1"], factor)}, settings={})


def _with_alpha_tensor(item: Draft) -> Draft:
    if "lora_alpha" in item.parts or "lora_alpha" not in item.settings:
        return item
    return replace(item, parts={**item.parts, "lora_alpha": number(float(item.settings["lora_alpha"]))})


def _with_bias(item: Draft, spelling: Spelling, values: Values) -> Draft:
    """A bias of `up` as a change of the layer's bias, where the dialect knows only that."""
    if "up_bias" not in item.parts or ("lora", "up_bias") in spelling.suffixes:
        return item
    parts = dict(item.parts)
    parts["diff_b"] = scaled(parts.pop("up_bias"), scale(item, values))
    return replace(item, parts=parts)


def _with_multiplier(item: Draft, spelling: Spelling, values: Values, *, has_bias: bool) -> Draft:
    """(IA)^3 as the dialect has it: PEFT multiplies by 1 + x, and the bias with the outputs; LyCORIS by x, alone.

    Raises:
        MismatchError: the outputs' bias would be treated in another way than in training.
    """
    ours = "multiplier" if ("ia3", "multiplier") in spelling.suffixes else "weight"
    if item.family != "ia3" or ours in item.parts:
        return item
    (theirs,) = {"multiplier", "weight"} & item.parts.keys()
    recipe = item.parts[theirs]
    shape, count = recipe.spec.shape, recipe.spec.numel
    on_input = multiplies_inputs(item, values)
    if has_bias and not on_input:
        raise cannot_hold(
            spelling.name, [item.name], "its layer has a bias, which PEFT's (IA)^3 multiplies and LyCORIS' does not"
        )
    if ours == "weight":
        flat = reshaped(shifted(recipe, -1.0), shape if len(shape) > 2 else (count,))
        return replace(item, parts={"weight": flat, "on_input": number(float(on_input))}, settings={})
    flat = reshaped(shifted(recipe, 1.0), shape if len(shape) > 2 else (1, count) if on_input else (count, 1))
    return replace(item, parts={"multiplier": flat}, settings={"on_input": on_input})


def multiplies_inputs(item: Draft, values: Values) -> bool:
    """Whether the channels that an (IA)^3 multiplies are the layer's inputs."""
    if "on_input" in item.parts:
        return bool(item.parts["on_input"].number(values))
    return bool(item.settings.get("on_input", item.parts["multiplier"].spec.shape[0] == 1))


def _with_dora(item: Draft, spelling: Spelling) -> Draft:
    """DoRA's vector under the dialect's name and in its shape.

    LyCORIS: `dora_scale` [o, 1] or [o, 1, 1, 1] per output, [1, i(, 1, 1)] per input. PEFT: `magnitude` [o] or
    [1, o, 1, 1], per output only.
    """
    kept = next((part for part in ("dora_scale", "magnitude") if part in item.parts), None)
    if kept is None or kept == spelling.dora or spelling.dora == "none":
        return item
    recipe = item.parts[kept]
    is_convolution = len(item.parts["down"].spec.shape) == 4 if "down" in item.parts else len(recipe.spec.shape) == 4
    outputs = recipe.spec.numel
    if kept == "dora_scale" and len(recipe.spec.shape) > 1 and matrix(recipe.spec.shape)[1] != 1:
        raise cannot_hold(spelling.name, [item.name], "its DoRA scales the inputs, this dialect's scales the outputs")
    shape: tuple[int, ...]
    if spelling.dora == "dora_scale":
        shape = (outputs, 1, 1, 1) if is_convolution else (outputs, 1)
    else:
        shape = (1, outputs, 1, 1) if is_convolution else (outputs,)
    parts = {part: value for part, value in item.parts.items() if part != kept}
    return replace(item, parts={**parts, spelling.dora: reshaped(recipe, shape)})


def _place_extras(adapter: Adapter, spelling: Spelling, written: Written) -> None:
    """Embeddings go along where they may."""
    for key, what in adapter.extras.items():
        word = what.split(" ", 2)
        if spelling.bundles and word[0] == "embedding":
            written.tensors[f"bundle_emb.{word[2]}.{word[1]}"] = whole(key, adapter.source.specs)
        else:
            written.left_out.append(key)


def cannot_hold(dialect: str, targets: Sequence[str], why: str) -> MismatchError:
    """The error for what a dialect has no place for."""
    shown = ", ".join(f"`{target}`" for target in targets[:_SHOWN])
    more = f" and {count(len(targets) - _SHOWN, 'other')}" if len(targets) > _SHOWN else ""
    return MismatchError(
        f"the dialect `{dialect}` cannot hold {shown}{more}: {why}",
        hint="`--to kohya` and `--to comfy` hold everything; `--family lora` makes plain LoRA of other families",
        dialect=dialect,
        targets=list(targets),
    )

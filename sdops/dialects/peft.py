"""PEFT folders: `adapter_model.safetensors` with `base_model.model.` before every name, and `adapter_config.json`.

The alphas are in the configuration alone, and of (IA)^3 which channels are multiplied. Such a folder holds one kind of
adapter for one model: the denoiser, in diffusers' names, or the text encoder where there is only one. Files that wrap a
whole pipeline or original names are read as well.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from sdops.core.patch import Adapter, Patch, Target
from sdops.dialects._names import CANONICAL, Names
from sdops.dialects._peft import configuration, multipliers, settings_of
from sdops.dialects._read import Contents, Reading, Settings, read_stems, share_of
from sdops.dialects._recipes import Values
from sdops.dialects._shares import draft
from sdops.dialects._spelling import Spelling, diffusers, pipeline_prefixes
from sdops.dialects._write import Written, cannot_hold, multiplies_inputs
from sdops.dialects._write import write as write_common
from sdops.errors import FormatError

PREFIX = "base_model.model."
CONFIG = "adapter_config.json"
SUFFIXES = {
    ("lora", "up"): ".lora_B.weight",
    ("lora", "down"): ".lora_A.weight",
    ("lora", "up_bias"): ".lora_B.bias",
    ("lora", "magnitude"): ".lora_magnitude_vector",
    ("lora", "lora_alpha"): ".alpha",  # taken out again below
    ("lora_embedding", "a"): ".lora_embedding_A",
    ("lora_embedding", "b"): ".lora_embedding_B",
    ("lora_embedding", "lora_alpha"): ".alpha",
    ("ia3", "multiplier"): ".ia3_l",
}


def _prefixes(names: Names, component: str) -> tuple[str, ...]:
    if component == names.denoiser:
        return PREFIX, f"{PREFIX}{component}.", f"{PREFIX}diffusion_model.", f"{PREFIX}model.diffusion_model."
    bare = (PREFIX,) if len(names.text_encoders) == 1 else ()
    return (*bare, *(PREFIX + prefix for prefix in pipeline_prefixes(names, component)))


SPELLING = Spelling("peft", ".", _prefixes, diffusers, dora="magnitude", suffixes=SUFFIXES)


def score(keys: Collection[str]) -> float:
    """The prefix."""
    return share_of(keys, lambda key: key.startswith(PREFIX))


def stems(names: Names) -> Mapping[str, Target]:
    """All layers in both layouts; of a text encoder also without `text_model.`, which transformers 5 leaves out."""
    found = SPELLING.stems(names)
    short = {
        PREFIX + module.removeprefix("text_model."): target
        for component in names.text_encoders[: len(names.text_encoders) == 1]
        for module, target in names.modules(component, CANONICAL).items()
    }
    return {**short, **found}


def read(file: Contents, names: Names) -> Reading:
    """Patches, with what the configuration says of each."""
    reading = read_stems(file.specs, stems(names), settings=_settings(file))
    unclear = [p.parts["multiplier"] for p in reading.patches if p.family == "ia3" and not _tells(file, p)]
    if unclear:
        reading.problem = reading.problem or FormatError(
            f"`{unclear[0]}` may be for the inputs or the outputs of its layer, and only `{CONFIG}` tells",
            hint=f"put the `{CONFIG}` that PEFT saved beside the file",
        )
    scaled = any(patch.family == "lora" for patch in reading.patches)
    if file.config is None and scaled and not any("lora_alpha" in patch.parts for patch in reading.patches):
        reading.notes.append(f"there is no `{CONFIG}` beside it, so every alpha is taken to be the rank")
    return reading


def _tells(file: Contents, patch: Patch) -> bool:
    """Whether an (IA)^3 tells which channels it is for: the configuration does, and the shape of linear layers."""
    shape = file.specs[patch.parts["multiplier"]].shape if "multiplier" in patch.parts else ()
    return file.config is not None or "multiplier" not in patch.parts or (len(shape) == 2 and shape != (1, 1))


def _settings(file: Contents) -> Callable[[str], Settings]:
    config = file.config
    if config is None:
        return lambda _stem: {}
    return lambda stem: settings_of(config, stem.removeprefix(PREFIX))


def write(adapter: Adapter, names: Names, values: Values) -> Written:
    """LoRA, DoRA per output, or (IA)^3 of one model; alphas go to the companion `adapter_config.json`.

    Raises:
        MismatchError: they are for several models, or for one of several text encoders, or of several kinds.
    """
    components = {patch.target.component for patch in adapter.patches}
    if len(components) > 1 or not components <= {names.denoiser, *names.text_encoders[: len(names.text_encoders) == 1]}:
        others = [str(patch.target) for patch in adapter.patches if patch.target.component != names.denoiser]
        raise cannot_hold("peft", others, "a PEFT folder holds the adapter of one model")
    scaling = [str(patch.target) for patch in adapter.patches if patch.family == "ia3"]
    if 0 < len(scaling) < len(adapter.patches):
        raise cannot_hold("peft", scaling, "a PEFT folder holds one kind of adapter, and others are LoRA")
    written = write_common(adapter, SPELLING, names, values)
    if written.tensors:
        made = _multipliers(adapter, written, names, values) if scaling else _configuration(written, values)
        written.companions[CONFIG] = made
    return written


def _configuration(written: Written, values: Values) -> str:
    """Of LoRA; takes the alphas out of the tensors."""
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for end in (SUFFIXES["lora", "down"], SUFFIXES["lora_embedding", "a"]):
        for key in [key for key in written.tensors if key.endswith(end)]:
            stem = key.removesuffix(end)
            module = stem.removeprefix(PREFIX)
            ranks[module] = written.tensors[key].spec.shape[0]
            alpha = written.tensors.pop(f"{stem}.alpha", None)
            alphas[module] = float(ranks[module]) if alpha is None else alpha.number(values)
    use_dora = any(key.endswith(SUFFIXES["lora", "magnitude"]) for key in written.tensors)
    lora_bias = any(key.endswith(SUFFIXES["lora", "up_bias"]) for key in written.tensors)
    return configuration(ranks, alphas, use_dora=use_dora, lora_bias=lora_bias)


def _multipliers(adapter: Adapter, written: Written, names: Names, values: Values) -> str:
    """Of (IA)^3."""
    layers, end = stems(names), SUFFIXES["ia3", "multiplier"]
    inputs = {
        patch.target.module: multiplies_inputs(draft(patch, adapter.source.specs), values) for patch in adapter.patches
    }
    found = [key.removesuffix(end) for key in written.tensors]
    return multipliers({stem.removeprefix(PREFIX): inputs[layers[stem].module] for stem in found})

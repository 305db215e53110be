"""PEFT folders: `adapter_model.safetensors` with `base_model.model.` before every name, and `adapter_config.json`.

The alphas are in the configuration alone. Such a folder holds one model's adapter: here the denoiser's, in diffusers'
names; files that wrap a whole pipeline or original names are read as well.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from sdops.core.patch import Adapter, Target
from sdops.dialects._names import Names
from sdops.dialects._peft import configuration, settings_of
from sdops.dialects._read import Contents, Reading, Settings, read_stems, share_of
from sdops.dialects._recipes import Values
from sdops.dialects._spelling import Spelling, diffusers, pipeline_prefixes
from sdops.dialects._write import Written, cannot_hold
from sdops.dialects._write import write as write_common

PREFIX = "base_model.model."
CONFIG = "adapter_config.json"
SUFFIXES = {
    ("lora", "up"): ".lora_B.weight",
    ("lora", "down"): ".lora_A.weight",
    ("lora", "up_bias"): ".lora_B.bias",
    ("lora", "magnitude"): ".lora_magnitude_vector",
    ("lora", "lora_alpha"): ".alpha",  # taken out again below
}


def _prefixes(names: Names, component: str) -> tuple[str, ...]:
    if component == names.denoiser:
        return PREFIX, f"{PREFIX}{component}.", f"{PREFIX}diffusion_model.", f"{PREFIX}model.diffusion_model."
    bare = (PREFIX,) if len(names.text_encoders) == 1 else ()
    return (*(PREFIX + prefix for prefix in pipeline_prefixes(names, component)), *bare)


SPELLING = Spelling("peft", ".", _prefixes, diffusers, dora="magnitude", suffixes=SUFFIXES)


def score(keys: Collection[str]) -> float:
    """The prefix."""
    return share_of(keys, lambda key: key.startswith(PREFIX))


def stems(names: Names) -> Mapping[str, Target]:
    """All layers in both layouts."""
    return SPELLING.stems(names)


def read(file: Contents, names: Names) -> Reading:
    """Patches, with what the configuration says of each."""
    reading = read_stems(file.specs, stems(names), settings=_settings(file))
    if file.config is None and not any("lora_alpha" in patch.parts for patch in reading.patches):
        reading.notes.append(f"there is no `{CONFIG}` beside it, so every alpha is taken to be the rank")
    return reading


def _settings(file: Contents) -> Callable[[str], Settings]:
    config = file.config
    if config is None:
        return lambda _stem: {}
    return lambda stem: settings_of(config, stem.removeprefix(PREFIX))


def write(adapter: Adapter, names: Names, values: Values) -> Written:
    """Plain LoRA and DoRA per output of the denoiser; alphas go to the companion `adapter_config.json`."""
    others = [str(patch.target) for patch in adapter.patches if patch.target.component != names.denoiser]
    if others:
        raise cannot_hold("peft", others, "a PEFT folder holds the adapter of one model")
    written = write_common(adapter, SPELLING, names, values)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for key in [key for key in written.tensors if key.endswith(SUFFIXES["lora", "down"])]:
        stem = key.removesuffix(SUFFIXES["lora", "down"])
        module = stem.removeprefix(PREFIX)
        ranks[module] = written.tensors[key].spec.shape[0]
        alpha = written.tensors.pop(f"{stem}.alpha", None)
        alphas[module] = float(ranks[module]) if alpha is None else alpha.number(values)
    use_dora = any(key.endswith(SUFFIXES["lora", "magnitude"]) for key in written.tensors)
    lora_bias = any(key.endswith(SUFFIXES["lora", "up_bias"]) for key in written.tensors)
    if ranks:
        written.companions[CONFIG] = configuration(ranks, alphas, use_dora=use_dora, lora_bias=lora_bias)
    return written

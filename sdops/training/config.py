"""Every setting of the trainer: the one place that has its name, default, range and help.

A setting is a key of the TOML file, an option of the command line (`--min-snr`) and a keyword in Python.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import Field, dataclass, field, fields
from math import isfinite
from pathlib import Path
from typing import Any

from sdops.errors import UsageError
from sdops.text import instead_of, suggest

GROUPS = ("model", "data", "train", "loss", "lora", "words", "prior", "hypernetwork", "inversion", "output")
# Settings that may change between a run and its continuation.
FREE = (
    "steps", "until", "batch", "save_every", "sample_every", "sample_prompts", "sample_steps", "validate_every",
    "device", "latents", "resume", "force", "graph", "checkpointing", "output", "name", "to", "save_dtype",
)  # fmt: skip


def _key(
    group: str,
    default: Any,
    help: str,  # noqa: A002 -- it is the option's help
    *,
    choices: tuple[str, ...] = (),
    least: float | None = None,
    most: float | None = None,
    only: tuple[str, ...] = (),
) -> Any:
    """A setting; `only` names the methods that have it, none = all."""
    told = {"group": group, "help": help, "choices": choices, "least": least, "most": most, "only": only}
    return field(default=default, metadata=told)


_LORA = ("lora", "pivotal")
_WORDS = ("ti", "pivotal", "dreamartist", "custom-diffusion")
_TEXT = ("lora", "pivotal", "dreambooth")  # can change text encoders
_PRIOR = (*_TEXT, "custom-diffusion")
_NOISE = ("lora", "ti", "pivotal", "dreamartist", "custom-diffusion", "dreambooth", "hypernetwork")  # learn to denoise
_MANY = (*_NOISE, "aesthetic")  # learn from many pictures
_NETWORK = ("hypernetwork",)
# Defaults of a method that are not those of the others.
USUAL: Mapping[str, Mapping[str, Any]] = {
    "null-text": {"steps": 500, "guidance": 7.5, "clip": 0.0, "most_tokens": 75},
    "aesthetic": {"steps": 5, "validate_every": 5, "clip": 0.0, "most_tokens": 75},
}


@dataclass(frozen=True)
class Config:
    """The settings of one run. `0` and an empty text mean "as the model or the method has it"."""

    model: str = _key("model", "", "A checkpoint or a diffusers folder: SD1, SD2 or SDXL")
    prediction: str = _key(
        "model", "auto", "What the model predicts; auto reads it from the model", choices=("auto", "epsilon", "v")
    )
    zero_terminal_snr: bool = _key("model", False, "Rescale the noise schedule so that the last step is pure noise")
    clip_skip: int = _key("model", 0, "Leave out so many of the text encoder's last layers (0: as trained)", least=0)
    dtype: str = _key(
        "model", "auto", "To compute in; auto: bf16 on a GPU that has it, else fp32",
        choices=("auto", "fp32", "bf16", "fp16"),
    )  # fmt: skip
    image_encoder: str = _key(
        "model", "", "Folder of the CLIP whose image encoder looks at the pictures, e.g. of clip-vit-large-patch14",
        only=("aesthetic",),
    )  # fmt: skip
    device: str = _key("model", "auto", "auto, cpu, cuda, cuda:1, mps ...")

    images: str = _key("data", "", "Folder of pictures; captions lie beside them")
    caption: str = _key(
        "data", "auto", "Where captions come from; auto: .txt, else .caption, else the template",
        choices=("auto", "txt", "caption", "filename", "template"),
    )  # fmt: skip
    template: str = _key("data", "", "Caption of pictures that have none, e.g. 'a photo of sks dog'; {} = the new word")
    resolution: int = _key("data", 0, "Pixels of a square; other shapes have as many (0: as the model)", least=8)
    bucket_step: int = _key("data", 64, "Sides of the buckets are multiples of this", least=8)
    buckets: bool = _key("data", True, "Keep the shapes of pictures; else everything is cropped to squares")
    repeats: int = _key("data", 1, "Every picture so many times in an epoch", least=1, only=_NOISE)
    flip: bool = _key("data", False, "Also the mirror image of every picture; not for faces and letters", only=_NOISE)
    masks: str = _key(
        "data", "", "Folder of masks with the pictures' names, or `alpha`: white counts, black does not", only=_NOISE
    )
    most_tokens: int = _key(
        "data", 225, "Tokens of a caption that are read, in chunks of 75 as the web UIs do; the rest is cut", least=75,
        only=_NOISE,
    )  # fmt: skip
    latents: str = _key("data", "", "Folder to keep latents in for later runs (empty: they are kept in memory only)")
    caption_dropout: float = _key("data", 0.0, "Share of samples that have no caption", least=0, most=1, only=_NOISE)
    shuffle_tags: bool = _key("data", False, "Put the tags between commas in a random order each time", only=_NOISE)
    keep_tags: int = _key("data", 0, "So many tags stay in front when the others are shuffled", least=0, only=_NOISE)

    steps: int = _key("train", 1000, "Steps of the optimizer", least=0)
    batch: int = _key("train", 1, "Pictures at a time", least=1, only=_MANY)
    accumulate: int = _key("train", 1, "Batches per step", least=1, only=_MANY)
    lr: float = _key("train", 0.0, "Learning rate (0: the method's)", least=0)
    text_lr: float = _key("train", 0.0, "Learning rate in the text encoders (0: as `lr`)", least=0, only=_TEXT)
    schedule: str = _key(
        "train",
        "constant",
        "How the rate falls",
        choices=("constant", "linear", "cosine", "restarts", "polynomial"),
        only=_MANY,
    )
    warmup: int = _key("train", 0, "Steps in which the rate rises from 0", least=0, only=_MANY)
    least_lr: float = _key("train", 0.0, "Share of the rate that is left at the end", least=0, most=1, only=_MANY)
    cycles: int = _key("train", 1, "Cycles of the schedule `restarts`", least=1, only=_MANY)
    weight_decay: float = _key("train", -1.0, "Of AdamW (-1: the method's)", least=-1, only=_MANY)
    beta1: float = _key("train", 0.9, "Of AdamW", least=0, most=0.99999)
    beta2: float = _key("train", 0.999, "Of AdamW", least=0, most=0.99999)
    adam_epsilon: float = _key("train", 1e-8, "Of AdamW", least=0)
    clip: float = _key("train", 1.0, "Largest norm of the gradient of everything (0: no limit)", least=0)
    ema: float = _key(
        "train",
        0.0,
        "Save a moving average with this decay, e.g. 0.999 (0: none)",
        least=0,
        most=0.99999,
        only=_MANY,
    )
    checkpointing: bool = _key("train", False, "Compute activations again instead of keeping them: less memory, slower")
    graph: bool = _key("train", True, "On CUDA: record a step once for each shape and replay it", only=_MANY)
    seed: int = _key("train", 0, "Of everything random", least=0)
    until: int = _key("train", 0, "Stop after this step, to go on later with --resume", least=0)

    min_snr: float = _key(
        "loss", 0.0, "Weigh steps by min(SNR, this) / SNR, usually 5 (0: all alike)", least=0, only=_NOISE
    )
    debiased: bool = _key("loss", False, "Weigh steps by 1 / sqrt(SNR), of v by 1 / (SNR + 1)", only=_NOISE)
    noise_offset: float = _key(
        "loss", 0.0, "Shift the noise of whole channels, usually 0.05 (0: not)", least=0, only=_NOISE
    )
    least_step: int = _key("loss", 0, "Learn only from noise steps from this one on", least=0, most=999, only=_NOISE)
    most_step: int = _key("loss", 999, "Learn only from noise steps up to this one", least=0, most=999, only=_NOISE)

    family: str = _key("lora", "lora", "Family of the adapter", choices=("lora", "loha", "lokr"), only=_LORA)
    rank: int = _key("lora", 16, "Rank of every layer that `ranks` does not name", least=1, only=_LORA)
    lora_alpha: float = _key("lora", 0.0, "The change is scaled by this / rank (0: the rank)", least=0, only=_LORA)
    ranks: str = _key(
        "lora", "attention feedforward projection",
        "Kinds of layers to train, with RANK or RANK/ALPHA: 'attention=16/8 resnet=4 text=8'; there are attention, "
        "cross, feedforward, projection, resnet, sampler, time, text", only=_LORA,
    )  # fmt: skip
    text_encoder: bool = _key("lora", False, "Train the text encoders, too", only=_TEXT)
    dora: bool = _key("lora", False, "Learn lengths and directions apart (DoRA)", only=_LORA)
    rslora: bool = _key("lora", False, "Scale by alpha / sqrt(rank)", only=_LORA)
    dropout: float = _key("lora", 0.0, "Share of a layer's inputs that the adapter does not see", least=0, most=1,
                          only=_LORA + _NETWORK)  # fmt: skip
    factor: int = _key("lora", 8, "LoKr: size of the small factor, at most", least=2, only=_LORA)
    block_lr: str = _key("lora", "1", "Rates by block: '1,IN04=0.5,M00=0'", only=_LORA)

    tokens: tuple[str, ...] = _key("words", (), "New words, NAME or NAME:VECTORS, as captions have them", only=_WORDS)
    init: tuple[str, ...] = _key(
        "words", (), "What each new word begins as: words, or a formula as in `sdops embed make`", only=_WORDS
    )
    keep_norm: bool = _key("words", True, "Keep vectors as long as the vocabulary's", only=_WORDS)
    word_lr: float = _key("words", 0.0, "Learning rate of the vectors (0: the method's)", least=0, only=_WORDS)
    words_until: float = _key("words", 0.5, "Share of the steps in which the vectors learn", least=0, most=1,
                              only=("pivotal",))  # fmt: skip
    negative_vectors: int = _key("words", 6, "Vectors of the negative word", least=1, only=("dreamartist",))
    guidance: float = _key("words", 3.0, "Guidance to learn with", least=0, only=("dreamartist", "null-text"))

    class_images: str = _key("prior", "", "Folder of pictures of the class, to preserve it", only=_PRIOR)
    class_prompt: str = _key("prior", "", "Caption of all of them, e.g. 'a photo of a dog'", only=_PRIOR)
    prior_weight: float = _key("prior", 1.0, "Weight of their loss", least=0, only=_PRIOR)

    widths: str = _key(
        "hypernetwork", "", "Widths of attention's contexts that get networks, e.g. '768,320' (empty: all)",
        only=_NETWORK,
    )  # fmt: skip
    layer_structure: str = _key("hypernetwork", "1, 2, 1", "Widths of the layers, as multiples", only=_NETWORK)
    activation: str = _key(
        "hypernetwork", "linear", "Between layers",
        choices=("linear", "relu", "leakyrelu", "elu", "swish", "tanh", "sigmoid", "mish", "gelu", "silu", "softsign"),
        only=_NETWORK,
    )  # fmt: skip
    activate_output: bool = _key("hypernetwork", False, "Also behind the last layer", only=_NETWORK)
    layer_norm: bool = _key("hypernetwork", False, "A layer norm behind every layer", only=_NETWORK)
    weight_init: str = _key(
        "hypernetwork", "Normal", "How weights begin; Normal: with deviation 0.01",
        choices=("Normal", "XavierUniform", "XavierNormal", "KaimingUniform", "KaimingNormal"), only=_NETWORK,
    )  # fmt: skip

    inner_steps: int = _key(
        "inversion", 10, "Steps of the optimizer for every DDIM step; there are `steps` / this", least=1,
        only=("null-text",),
    )  # fmt: skip
    enough: float = _key(
        "inversion", 1e-5, "A DDIM step is done at this error, plus 2e-5 for each step before", least=0,
        only=("null-text",),
    )  # fmt: skip

    output: str = _key("output", "", "Where to write; default: named after the images, in this folder")
    name: str = _key("output", "", "Name in the metadata; default: the output's")
    to: str = _key("output", "", "Dialect or layout; default: what most programs read")
    save_dtype: str = _key(
        "output",
        "auto",
        "Of what is saved; auto: fp16 of layers, fp32 of all else",
        choices=("auto", "fp16", "bf16", "fp32"),
    )
    save_every: int = _key("output", 0, "Also save after every so many steps (0: only at the end)", least=0)
    validate_every: int = _key("output", 100, "Measure the loss with fixed noise that often (0: never)", least=0)
    validation: int = _key("output", 8, "Pictures that it is measured on", least=1, only=_MANY)
    sample_every: int = _key("output", 0, "Paint the sample prompts that often (0: at the end)", least=0, only=_MANY)
    sample_prompts: tuple[str, ...] = _key("output", (), "Prompts to paint", only=_MANY)
    sample_steps: int = _key("output", 20, "DDIM steps of a sample", least=1, only=_MANY)
    resume: bool = _key("output", False, "Go on where the last run of this output stopped")
    force: bool = _key("output", False, "Replace an existing output")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for metadata and logs."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}

    @property
    def chunks(self) -> int:
        """Chunks of 75 tokens that a caption may have."""
        return -(-self.most_tokens // 75)

    def fixed(self) -> dict[str, Any]:
        """The settings that a continuation must share."""
        return {name: value for name, value in self.as_dict().items() if name not in FREE}


def settings_of(method: str) -> list[Field[Any]]:
    """The settings that a method has, with its own defaults, in the order of the file."""
    found = [copy(each) for each in fields(Config) if not each.metadata["only"] or method in each.metadata["only"]]
    for each in found:
        each.default = USUAL.get(method, {}).get(each.name, each.default)
    return found


def read(method: str, file: Path | None, given: Mapping[str, Any]) -> Config:
    """The settings of a run: those given, then those of the file, then the defaults.

    Args:
        method: Name of a trainer.
        file: A TOML file; its tables are only headings.
        given: Of the command line or Python; None counts as not given.

    Raises:
        UsageError: a key does not exist, or its value makes no sense; the message names the file and the key.
    """
    known = {each.name: each for each in settings_of(method)}
    values: dict[str, Any] = {}
    for name, value, where in _entries(file):
        plain = name.replace("-", "_")
        if plain not in known:
            raise _no_such_key(method, name, where, known)
        if plain in values:
            raise UsageError(f"{where}: `{name}` is given twice", hint="keep one of the two")
        values[plain] = _checked(known[plain], value, where)
    for name, value in given.items():
        if value is None:
            continue
        if name not in known:
            raise _no_such_key(method, name, "", known)
        values[name] = _checked(known[name], value, "")
    return Config(**{**USUAL.get(method, {}), **values})


def _entries(file: Path | None) -> Iterable[tuple[str, Any, str]]:
    """Key, value and place of everything in a file; paths in it are relative to its folder."""
    if file is None:
        return
    for name, value in _document(file).items():
        if isinstance(value, dict):
            if name not in GROUPS:
                close = suggest(name, GROUPS)
                hint = f"did you mean `[{close}]`?" if close else f"there are {', '.join(GROUPS)}, or none at all"
                raise UsageError(f"`{file}`: there is no table `[{name}]`", hint=hint)
            for inner, each in value.items():
                yield inner, _placed(inner, each, file), f"`{file}`, [{name}]"
        else:
            yield name, _placed(name, value, file), f"`{file}`"


def _document(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"`{file}` cannot be read: {error.strerror}", hint="name a TOML file, or none") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"`{file}` is no TOML: {error}", hint='keys are written `steps = 500`, texts in "..."'
        ) from error


_EXAMPLES = {bool: "true", int: "10", float: "0.5", str: '"..."', tuple: '["..."]'}  # in TOML
_PATHS = ("model", "images", "masks", "class_images", "image_encoder", "latents", "output")


def _placed(name: str, value: Any, file: Path) -> Any:
    """A path of the file as seen from here."""
    if name not in _PATHS or not isinstance(value, str) or not value or value == "alpha":
        return value
    path = Path(value).expanduser()
    return str(path if path.is_absolute() else file.parent / path)


def _no_such_key(method: str, name: str, where: str, known: Mapping[str, Any]) -> UsageError:
    close = suggest(name, known)
    start = f"{where}: " if where else ""
    everywhere = {each.name: each.metadata["only"] for each in fields(Config)}
    plain = name.replace("-", "_")
    if plain in everywhere:
        return UsageError(
            f"{start}`{name}` is not for `{method}`", hint=f"it belongs to {', '.join(everywhere[plain])}", key=name
        )
    hint = f"did you mean `{close}`?" if close else f"`sdops train {method} --help` lists all keys"
    return UsageError(f"{start}there is no key `{name}`", hint=hint, key=name)


def _checked(setting: Field[Any], value: Any, where: str) -> Any:
    """The value in the setting's type.

    Raises:
        UsageError: it is of another type, or out of range.
    """
    told, name = setting.metadata, setting.name
    start = f"{where}: " if where else ""
    default: Any = setting.default
    kind: Any = type(default)
    if kind is tuple and isinstance(value, str):
        value = (value,)
    if kind is tuple and isinstance(value, list):
        value = tuple(value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is tuple and not all(type(item) is str for item in value)):
        words = {
            bool: "true or false",
            int: "a whole number",
            float: "a number",
            str: "a text",
            tuple: "a list of texts",
        }
        raise UsageError(
            f"{start}`{name}` is `{value!r}`, not {words[kind]}",
            hint=f"{told['help']}: `{name} = {_EXAMPLES[kind]}`",
            key=name,
        )
    if told["choices"] and value not in told["choices"]:
        raise UsageError(f"{start}`{name}` cannot be `{value}`", hint=instead_of(value, told["choices"]), key=name)
    if kind in (int, float) and not _in_range(told, value, default):
        raise UsageError(f"{start}`{name}` cannot be {value:g}", hint=_range(told), key=name)
    return value


def _in_range(told: Mapping[str, Any], value: float, default: float) -> bool:
    least, most = told["least"], told["most"]
    inside = (least is None or value >= least) and (most is None or value <= most)
    return value == default or (isfinite(value) and inside)


def _range(told: Mapping[str, Any]) -> str:
    least, most = told["least"], told["most"]
    return f"{told['help']}; from {least:g}" + (f" to {most:g}" if most is not None else " on")

"""What a conversion of a checkpoint is asked to do, checked before any file is opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sdops.errors import UsageError
from sdops.text import suggest
from sdops.verbs._convert_select import EMA

CONTAINERS = ("safetensors", "original", "ckpt", "gguf")  # of checkpoints alone; LoRAs become `diffusers`, too
TARGETS = ("diffusers", *CONTAINERS)
DTYPES = {"fp64": "F64", "fp32": "F32", "fp16": "F16", "bf16": "BF16", "fp8_e4m3": "F8_E4M3", "fp8_e5m2": "F8_E5M2"}
SCALED = {"fp8_e4m3_scaled": "fp8_e4m3", "fp8_e5m2_scaled": "fp8_e5m2"}  # with a scale per tensor
_OTHER_WORDS = {
    "fp8": "fp8_e4m3",
    "fp8_scaled": "fp8_e4m3_scaled",
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "half": "fp16",
}
GGUF_TYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"} | {
    name.lower(): name for name in ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
}
ALL = ""  # the key of `dtypes` for components that are not named


@dataclass(frozen=True, slots=True)
class Wish:
    """The request.

    Attributes:
        to: One of TARGETS.
        dtypes: Component -> safetensors dtype; ALL for the others.
        gguf_type: GGML type of a GGUF output; "" = as the tensors are.
        scaled: Whether fp8 weights get scales: "" | new | old (the two spellings of ComfyUI).
        include, exclude: Patterns of names: cast only these, do not cast those.
        components: Those to convert; none = all.
        ema: keep | drop | use.
        prune: Leave out ballast.
        unknown: refuse | keep | drop.
        prefix: Whether a component that is alone keeps what stands before its names; None = as files of its kind have.
        shard: Largest size of a file in bytes; 0 = no limit.
        reference: A folder of diffusers whose configurations and tokenizers are taken over.
        strict: Refuse to clamp.
        seed: Round at random.
        tokenizer: A file or folder that T5's tokenizer is taken from.
        dtype: What was said of dtypes, as it was.
    """

    to: str
    dtypes: Mapping[str, str] = field(default_factory=dict)
    gguf_type: str = ""
    scaled: str = ""
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    components: Sequence[str] = ()
    ema: str = "keep"
    prune: bool = False
    unknown: str = "refuse"
    prefix: bool | None = None
    shard: int = 0
    reference: Path | None = None
    strict: bool = False
    seed: int | None = None
    tokenizer: Path | None = None
    dtype: str = ""

    @property
    def keeps_everything(self) -> bool:
        """Whether the tensors come out as they went in."""
        return not (self.dtypes or self.components or self.prune) and self.ema == "keep" and self.unknown != "drop"


def check(to: str, ema: str, shard: int | None) -> None:
    """Refuse words that nobody knows.

    Raises:
        UsageError: with what there is.
    """
    for option, value, allowed in (("to", to, TARGETS), ("ema", ema, EMA)):
        if value not in allowed:
            close = suggest(value, allowed)
            raise UsageError(
                f"`--{option}` cannot be `{value}`" + (f"; did you mean `{close}`?" if close else ""),
                hint=f"choose one of {', '.join(allowed)}",
            )
    if shard is not None and to in ("ckpt", "gguf"):
        raise UsageError(f"a {to} file cannot be cut into shards", hint="`--to safetensors` and `--to diffusers` can")


def parse_dtypes(text: str | None, to: str) -> tuple[dict[str, str], str, str]:
    """`fp16`, or `fp16,vae=fp32`: safetensors dtypes by component, the type of a GGUF file, and how fp8 is scaled.

    Raises:
        UsageError: there is no such dtype.
    """
    found: dict[str, str] = {}
    gguf, scaled = "", ""
    for item in filter(None, map(str.strip, (text or "").lower().split(","))):
        component, equals, name = item.rpartition("=")
        name, old = name.removesuffix("_old"), name.endswith("_scaled_old")
        name = _OTHER_WORDS.get(name, name)
        if name in SCALED and to not in ("diffusers", "gguf"):
            name, scaled = SCALED[name], "old" if old else "new"
        if to == "gguf" and not equals and name in GGUF_TYPES:
            gguf = GGUF_TYPES[name]
        elif name == "keep" and not equals:
            continue
        elif name in DTYPES or (name == "keep" and equals):
            found[component.strip() if equals else ALL] = DTYPES.get(name, "")
        else:
            known = [*(GGUF_TYPES if to == "gguf" else DTYPES), "keep"]
            known += SCALED if to not in ("diffusers", "gguf") else []
            close = suggest(name, known)
            raise UsageError(
                f"there is no dtype `{name}`" + (f"; did you mean `{close}`?" if close else ""),
                hint=f"choose one of {', '.join(known)}, or several: `--dtype fp16,vae=fp32`",
            )
    return found, gguf, scaled

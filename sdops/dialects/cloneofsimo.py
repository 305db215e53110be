"""cloneofsimo/lora, the first of all: layers without names, `unet:0:up`, `text_encoder:0:down`, and tokens `<s1>`.

The numbers count the attention layers in the order of diffusers' modules in early 2023: down blocks, up blocks, and
the middle last; within a transformer block attn1, then (if it is among the targets) ff.net.0.proj, then attn2. Text
encoders: k, v, q, out of each layer. `.pt` files are plain lists `[up0, down0, up1, ...]`; the caller names their
tensors with `list_names`. There is no alpha.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence

from sdops.core.patch import Adapter, Target
from sdops.core.spec import Spec
from sdops.dialects._names import CANONICAL, DIFFUSERS, Names
from sdops.dialects._read import Contents, Reading, read_stems, share_of
from sdops.dialects._recipes import Values, whole
from sdops.dialects._spelling import Spelling
from sdops.dialects._write import Written, cannot_hold
from sdops.dialects._write import write as write_common

_KEYS = re.compile(r"(?:unet|text_encoder):\d+:(?:up|down)|<[^<>]+>")
_TOKEN = re.compile(r"<[^<>]+>")
_BLOCK = re.compile(r"(?P<block>.+\.transformer_blocks\.\d+)\.attn1\.to_q")
_LAYER = re.compile(r"(?P<layer>.+)\.self_attn\.k_proj")
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_TEXT = ("k_proj", "v_proj", "q_proj", "out_proj")
_STAGES = ("down_blocks", "up_blocks", "mid_block")
_LAYOUT = "cloneofsimo"
_TARGETS = {"unet": ["CrossAttention", "Attention", "GEGLU"], "text_encoder": ["CLIPAttention"]}
_FIRST_WIDTH = 320  # of the U-Nets of SD1 and SD2
_SD2_LAYERS = 23  # of 24: diffusers leaves out the last, which is not used
SUFFIXES = {("lora", "up"): ":up", ("lora", "down"): ":down"}
SPELLING = Spelling(
    "cloneofsimo",
    ".",
    lambda _names, _component: ("",),
    lambda _names, _component: _LAYOUT,
    alphas="fold",
    dora="none",
    suffixes=SUFFIXES,
)


def list_names(specs: Sequence[Spec]) -> list[str]:
    """Names for the tensors of a `.pt` list: the U-Net begins with 320 channels, a text encoder is as wide as it is."""
    kind = "unet" if specs and specs[0].shape[:1] == (_FIRST_WIDTH,) else "text_encoder"
    return [f"{kind}:{index // 2}:{'down' if index % 2 else 'up'}" for index in range(len(specs))]


def score(keys: Collection[str]) -> float:
    """The numbers and tokens."""
    return share_of(keys, _KEYS.fullmatch)


def stems(names: Names) -> Mapping[str, Target]:
    """The layers with `ff.net.0.proj` among them, as most files have it."""
    return _stems(names, feed_forward=True)


def _stems(names: Names, *, feed_forward: bool) -> dict[str, Target]:
    if names.denoiser != "unet" or not names.text_encoders:
        return {}
    unet = names.modules(names.denoiser, DIFFUSERS)
    encoder = names.text_encoders[0]
    text = names.modules(encoder, CANONICAL)
    numbered = {f"unet:{i}": unet[name] for i, name in enumerate(_unet_order(unet, feed_forward)) if name in unet}
    return numbered | {f"text_encoder:{i}": text[name] for i, name in enumerate(_text_order(text, encoder))}


def _unet_order(modules: Collection[str], feed_forward: bool) -> list[str]:
    blocks = [found["block"] for name in modules if (found := _BLOCK.fullmatch(name))]
    blocks.sort(key=lambda block: (_STAGES.index(block.partition(".")[0]), _numbers(block)))
    order: list[str] = []
    for block in blocks:
        order += [f"{block}.attn1.{layer}" for layer in _ATTENTION]
        order += [f"{block}.ff.net.0.proj"] if feed_forward else []
        order += [f"{block}.attn2.{layer}" for layer in _ATTENTION]
    return order


def _text_order(modules: Collection[str], encoder: str) -> list[str]:
    layers = sorted((found["layer"] for name in modules if (found := _LAYER.fullmatch(name))), key=_numbers)
    layers = layers[:_SD2_LAYERS] if encoder == "clip_h" else layers
    return [f"{layer}.self_attn.{projection}" for layer in layers for projection in _TEXT]


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def read(file: Contents, names: Names) -> Reading:
    """Patches and tokens; whether the feed-forward layers are among them shows in the count."""
    with_feed_forward = _stems(names, feed_forward=True)
    without = _stems(names, feed_forward=False)
    count = len({key.rpartition(":")[0] for key in file.specs if key.startswith("unet:")})
    fits = count == sum(stem.startswith("unet:") for stem in without)
    encoder = names.text_encoders[0] if names.text_encoders else ""

    def token(key: str) -> str | None:
        return f"embedding {encoder} {key}" if _TOKEN.fullmatch(key) else None

    return read_stems(file.specs, without if fits else with_feed_forward, extra=token)


def write(adapter: Adapter, names: Names, values: Values) -> Written:
    """Plain LoRA of every attention layer, with or without all `ff.net.0.proj`; alphas folded into `up`.

    Raises:
        MismatchError: a layer is missing (it could not be skipped: layers are counted), or one has no number.
    """
    unet = [patch.target for patch in adapter.patches if patch.target.component == names.denoiser]
    numbered = _stems(names, feed_forward=True)
    feed_forward = {stem for stem, target in numbered.items() if target.module.endswith("ff.net.0.proj")}
    with_feed_forward = any(numbered[stem] in unet for stem in feed_forward)
    chosen = _stems(names, feed_forward=with_feed_forward)
    components = {patch.target.component for patch in adapter.patches}
    present = {patch.target for patch in adapter.patches}
    missing = [str(t) for t in chosen.values() if t.component in components and t not in present]
    if missing:
        raise cannot_hold("cloneofsimo", missing, "it counts the layers, and these are not in the adapter")
    written = write_common(adapter, SPELLING, _with_layout(names, chosen), values)
    _add_metadata(written, with_feed_forward)
    _add_tokens(adapter, written)
    return written


def _with_layout(names: Names, chosen: Mapping[str, Target]) -> Names:
    layouts: dict[tuple[str, str], dict[str, Target]] = {}
    for stem, target in chosen.items():
        layouts.setdefault((target.component, _LAYOUT), {})[stem] = target
    return Names(names.architecture, names.denoiser, names.text_encoders, layouts)


def _add_metadata(written: Written, with_feed_forward: bool) -> None:
    """The target classes, and the rank of each layer."""
    for key, recipe in written.tensors.items():
        model, number, part = key.split(":")
        if part == "down":
            classes = _TARGETS[model] if with_feed_forward or model != "unet" else _TARGETS[model][:2]
            written.metadata[model] = json.dumps(classes)
            written.metadata[f"{model}:{number}:rank"] = str(recipe.spec.shape[0])


def _add_tokens(adapter: Adapter, written: Written) -> None:
    """Embeddings under their tokens, which must look like `<s1>`."""
    for key in list(written.left_out):
        token = adapter.extras[key].split(" ", 2)[2]
        if _TOKEN.fullmatch(token):
            written.tensors[token] = whole(key, adapter.source.specs)
            written.metadata[token] = "<embed>"
            written.left_out.remove(key)

"""Compare hypernetworks with a forward pass through diffusers' UNet whose attention has them hooked in.

    python tools/oracles/hypernetworks.py      in an environment with diffusers, transformers and this package

The UNet is small and real: diffusers' own classes with random weights, written with diffusers' names. Hooked means:
keys and values of every attention see c + m g(c), g made of torch's modules as AUTOMATIC1111's web UI makes them. Baked
by `sdops hypernet apply` the same UNet must give the same picture without any hook, to 1e-6 of it in float32. float32
itself loses as much on the way, so both are compared with a pass in float64, too. CLIP's text encoder is compared with
that of transformers.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

import sdops
from fixtures import tiny_sd
from sdops.archs.detect import detect
from sdops.formats import open_source
from sdops.verbs._clip_text import END, PLACES, TextEncoder, encoders, features, text_of
from sdops.verbs._inputs import Opened
from tests import tiny
from tests.hypernetworks import files

CONTEXT = 32
STRENGTH = 0.7


def unet(folder: Path) -> UNet2DConditionModel:
    """The trained one of the fixtures."""
    return UNet2DConditionModel.from_pretrained(folder / "model" / "unet").eval()


class Hooked:
    """diffusers' attention, with networks in front of keys and values."""

    def __init__(self, chains: list[tuple[files.Modules, float]]) -> None:
        self.chains = chains

    def _network(self, module: files.Module, c: torch.Tensor, strength: float) -> torch.Tensor:
        return module.to(c.dtype)(c, strength)

    def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, **_: Any) -> Any:
        """One attention, written out."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        k = v = context
        for made, strength in self.chains:
            if context.shape[-1] in made:
                k, v = (self._network(f, c, strength) for f, c in zip(made[context.shape[-1]], (k, v), strict=True))
        q, k, v = attn.to_q(hidden_states), attn.to_k(k), attn.to_v(v)
        q, k, v = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in (q, k, v))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](mixed))


def run(model: UNet2DConditionModel) -> torch.Tensor:
    """A prediction for fixed noise, time and text."""
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 4, 16, 16, generator=generator)
    text = torch.randn(2, 77, CONTEXT, generator=generator)
    with torch.no_grad():
        dtype = next(model.parameters()).dtype
        return model(sample.to(dtype), 500, encoder_hidden_states=text.to(dtype)).sample


def difference(what: str, found: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Print and return |found - expected| / |expected|, of all numbers by their norm, and of the largest of each."""
    rest, scale = found.double() - expected.double(), expected.double()
    by_norm, largest = float(rest.norm() / scale.norm()), float(rest.abs().max() / scale.abs().max())
    print(f"    {what}: {by_norm:.1e} by norm, largest number {largest:.1e} ({float(rest.abs().max()):.1e} as it is)")
    return by_norm, largest


def check_baked(folder: Path) -> None:
    """One network, two in a row, deep ones, half ones."""
    tiny_sd.model(folder / "model")
    model = unet(folder)
    plain = run(model)
    save_file(model.state_dict(), folder / "unet.safetensors")
    everywhere, text = (32, 64), (32,)
    cases = {
        "as the web UI makes them": [files.modules(everywhere, spread=0.2)],
        "deeper, of fractions": [files.modules(everywhere, structure=[1, 1.5, 0.7, 1], spread=0.25)],
        "two, one behind the other": [files.modules(everywhere, 1, spread=0.2), files.modules(text, 2, spread=0.2)],
    }
    for name, chains in cases.items():
        paths = []
        for number, made in enumerate(chains):
            structure = [1, 1.5, 0.7, 1] if "fractions" in name else [1, 2, 1]
            paths.append((files.write(folder / f"{number}.pt", made, layer_structure=structure), STRENGTH))
        hooked_model = unet(folder)
        hooked_model.set_attn_processor(Hooked([(made, STRENGTH) for made in chains]))
        hooked = run(hooked_model)
        sdops.hypernet.apply(folder / "unet.safetensors", *paths, output=folder / "baked.safetensors", force=True)
        baked_model = unet(folder)
        baked_model.load_state_dict(load_file(folder / "baked.safetensors"))
        baked = run(baked_model)
        change = float((hooked - plain).norm() / hooked.norm())
        exact = run(hooked_model.double())
        print(f"baked, {name}: a change of {change:.0%}, of numbers up to {float(hooked.abs().max()):.1f}")
        apart = difference("baked from hooked, both in float32", baked, hooked)
        difference("hooked in float32 from hooked in float64: what float32 loses without baking", hooked, exact)
        difference("baked in float32 from hooked in float64", baked, exact)
        difference(
            "baked in float64 from hooked in float64: what the baked weights' rounding does",
            run(baked_model.double()),
            exact,
        )
        assert max(apart) < 1e-6
        assert change > 0.05
    curved = files.write(folder / "c.pt", files.modules((64,), activation="relu"), activation_func="relu")
    report = sdops.hypernet.apply(
        folder / "unet.safetensors", (curved, 1.0), output=folder / "baked.safetensors", force=True, fit=True
    )
    print("curved:", [fact["explained"] for fact in report.data["contexts"]], report.warnings[-1])


def check_text(folder: Path) -> None:
    """CLIP-L as SD1 uses it, found in a checkpoint; bigG's kind as SDXL uses it: the last layer but one, no norm."""
    texts = [text_of(caption, {}) for caption in ("a photo of a cat", "oil on canvas, 1850", "")]
    ids = torch.tensor([text.numbers + [END] * (PLACES - len(text.numbers)) for text in texts])
    reference, state = clip("quick_gelu")
    marks = {key: torch.zeros(shape) for key, shape in tiny.shapes(clip=False, vae=False).items()}
    state = {f"cond_stage_model.transformer.{key}": value for key, value in state.items()}
    save_file(state | marks, folder / "sd1.safetensors")
    source = open_source(folder / "sd1.safetensors")
    ours = torch.stack(features(encoders(Opened(source, source, detect(source.specs))), texts, PLACES))
    with torch.no_grad():
        error = float((ours - reference(ids).last_hidden_state).abs().max())
    print(f"text encoder of SD1: largest difference from transformers' {error:.1e}")
    assert error < 2e-5
    reference, state = clip("gelu")
    save_file(state, folder / "bigg.safetensors")
    encoder = TextEncoder(open_source(folder / "bigg.safetensors"), is_quick=False, depth=11, is_normed=False)
    words = state["text_model.embeddings.token_embedding.weight"]
    with torch.no_grad():
        expected = reference(ids, output_hidden_states=True).hidden_states[-2]
        error = float((encoder([words[ids]])[0] - expected).abs().max())
    print(f"text encoder of SDXL: largest difference from transformers' {error:.1e}")
    assert error < 2e-5


def clip(activation: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """An encoder of transformers, and its tensors under the names of files."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "intermediate_size": 96, "num_hidden_layers": 12, "num_attention_heads": 12}
    model = CLIPTextModel(CLIPTextConfig(**sizes, hidden_act=activation)).eval()
    state = {"text_model." + key.removeprefix("text_model."): value for key, value in model.state_dict().items()}
    return model, {key: value.contiguous() for key, value in state.items() if "position_ids" not in key}


def main() -> None:
    """Check everything."""
    with tempfile.TemporaryDirectory() as name:
        check_baked(Path(name))
        check_text(Path(name))


if __name__ == "__main__":
    main()

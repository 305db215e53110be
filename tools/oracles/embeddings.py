"""Compare embeddings with other programs: diffusers loads what sdops writes, Pillow and transformers check the rest.

    python tools/oracles/embeddings.py

Needs torch, diffusers, transformers, safetensors and pillow, and sdops beside this file; no network.
1. diffusers' `load_textual_inversion` takes the files of every layout it knows, and the word's vectors in its text
   encoder are the ones that were written, bit for bit; for SDXL both encoders.
2. A picture that sdops writes is read by an own reading of the web UI's algorithm, number by number, and after Pillow
   has saved it as lossless WebP.
3. The tokenizer agrees with transformers' on random texts.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers.loaders import TextualInversionLoaderMixin  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer  # noqa: E402

from sdops.pipelines.clip_words import clip_words  # noqa: E402
from sdops.pipelines.tokenizer import clip_files  # noqa: E402
from sdops.verbs.embed import convert  # noqa: E402

LETTERS = "abcdefghij ABC '012.,!?-_éàüßΩжю中文字🙂👍½²ﬁ\t\n<|>"


class Pipeline(TextualInversionLoaderMixin):
    """As much of a pipeline as the loader looks at."""

    def __init__(self, tokenizer: CLIPTokenizer, width: int) -> None:
        config = CLIPTextConfig(
            hidden_size=width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=8, vocab_size=49408
        )
        self.tokenizer, self.text_encoder = tokenizer, CLIPTextModel(config)
        self.components: dict[str, object] = {}
        self.hf_device_map = None
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def vector(self, token: str) -> np.ndarray:
        """A word's vector."""
        number = self.tokenizer.convert_tokens_to_ids(token)
        return self.text_encoder.get_input_embeddings().weight[number].detach().numpy()


def tokenizer(folder: Path) -> CLIPTokenizer:
    """transformers' tokenizer from the files that sdops writes."""
    folder.mkdir(exist_ok=True)
    for name, data in clip_files("<|endoftext|>").items():
        (folder / name).write_bytes(data)
    return CLIPTokenizer.from_pretrained(folder)


def check_diffusers(folder: Path, vectors: torch.Tensor, start: Path) -> None:
    """One encoder."""
    for layout, ending in (("a1111", "pt"), ("diffusers", "bin"), ("diffusers", "safetensors"), ("kohya", "pt")):
        path = folder / f"{layout}.{ending}"
        convert(start, to=layout, output=path, name="oracle-style")
        pipeline = Pipeline(tokenizer(folder / "tokenizer"), 768)
        pipeline.load_textual_inversion(str(path), token="<oracle>", local_files_only=True)
        for number, row in enumerate(vectors):
            token = "<oracle>" if number == 0 else f"<oracle>_{number}"
            assert np.array_equal(pipeline.vector(token), row.numpy()), (layout, ending, number)
        print(f"diffusers loads {path.name}")


def check_sdxl(folder: Path) -> None:
    """Two files for two encoders."""
    parts = {"clip_l": torch.randn(1, 768), "clip_g": torch.randn(1, 1280)}
    torch.save(parts, folder / "xl.pt")
    report = convert(folder / "xl.pt", to="diffusers-sdxl", output=folder / "pair.safetensors", name="<xl>")
    for path, (name, part) in zip(report.data["outputs"], parts.items(), strict=True):
        pipeline = Pipeline(tokenizer(folder / "tokenizer"), part.shape[1])
        pipeline.load_textual_inversion(path, local_files_only=True)
        assert np.array_equal(pipeline.vector("<xl>"), part[0].numpy()), name
        print(f"diffusers loads {Path(path).name}")


def generator() -> Iterator[int]:
    """The web UI's pseudo-random numbers."""
    state = 0
    while True:
        state = (1664525 * state + 1013904223) % 2**32
        yield state % 255


def hidden(picture: Image.Image) -> dict[str, Any]:
    """What the web UI finds in a picture without a border, one number at a time."""
    low = np.asarray(picture.convert("RGB")) & 15
    empty = [column for column in range(low.shape[1]) if not low[:, column].any()]
    halves = []
    for block in (low[:, : min(empty)], low[:, max(empty) + 1 :]):
        numbers = generator()
        halves.append([int(value) ^ (next(numbers) & 15) for value in block.reshape(-1)])
    data = bytes(high << 4 | low for low, high in zip(*halves, strict=True))
    return json.loads(zlib.decompressobj().decompress(data))


def check_pictures(folder: Path, vectors: torch.Tensor, start: Path) -> None:
    """Text chunk and pixels."""
    convert(start, to="png-pixels", output=folder / "p.png")
    with Image.open(folder / "p.png") as picture:
        found = hidden(picture)
        picture.save(folder / "p.webp", lossless=True)
    rows = found["string_to_param"]["*"]["TORCHTENSOR"]
    assert np.array_equal(np.array(rows, np.float32), vectors.numpy())
    convert(start, to="png", output=folder / "c.png")
    with Image.open(folder / "c.png") as picture:
        assert "sd-ti-embedding" in picture.text
    for name in ("p.png", "p.webp", "c.png"):
        convert(folder / name, to="a1111", output=folder / f"{name}.pt")
        back = torch.load(folder / f"{name}.pt", weights_only=True)["string_to_param"]["*"]
        assert torch.equal(back, vectors), name
        print(f"pictures: {name}")


def check_tokens(folder: Path, count: int = 5000) -> None:
    """Random texts."""
    reference, words, chance = tokenizer(folder / "tokenizer"), clip_words(), random.Random(0)
    for _ in range(count):
        text = "".join(chance.choice(LETTERS) for _ in range(chance.randint(1, 30)))
        assert reference(text, add_special_tokens=False)["input_ids"] == words.numbers(text), text
    print(f"tokenizer: {count} texts")


def main() -> None:
    """Check everything."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vectors = torch.randn(3, 768, generator=torch.Generator().manual_seed(0)) * 0.4
        torch.save({"emb_params": vectors}, folder / "start.pt")
        check_tokens(folder)
        check_pictures(folder, vectors, folder / "start.pt")
        check_diffusers(folder, vectors, folder / "start.pt")
        check_sdxl(folder)


if __name__ == "__main__":
    main()

"""Compare training with diffusers' own scripts: the same tiny model, pictures, noise and noise steps, loss by loss.

    python tools/oracles/train_diffusers.py --scripts FOLDER

FOLDER holds `train_text_to_image_lora.py` and `textual_inversion.py` out of huggingface/diffusers' `examples/`.
Needs torch, diffusers, transformers, accelerate, peft and Pillow, and sdops beside this file; no network. What the
scripts import beyond that (datasets, torchvision) is replaced by the little that they use of it.

sdops trains first, in float32, and what it drew is recorded. Then the script runs with `randn_like`, `randint` and the
VAE's latents answered from the record, and for LoRA with the same `down` matrices to begin with. The script for LoRA
does not clip gradients, whatever `--max_grad_norm` says: its list of parameters is an iterator that the optimizer has
used up. So neither side clips. At the end diffusers loads the files that sdops wrote, and its UNet must say the same.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import runpy
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import accelerate  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from fixtures import tiny_sd  # noqa: E402
from sdops.pipelines.tokenizer import clip_files  # noqa: E402
from sdops.training import feeder  # noqa: E402
from sdops.verbs import _train_run  # noqa: E402
from sdops.verbs.train import run  # noqa: E402

STEPS, BATCH, SIZE, RANK = 20, 4, 32, 4
BOUND = 1e-4  # largest difference of a loss
CAPTION = "a photo of a yellow circle"


class Record:
    """What sdops drew, to be asked for by the scripts in the same order."""

    def __init__(self) -> None:
        self.batches: list[feeder.Batch] = []
        self.running: Any = None
        self.at = 0

    def train(self, method: str, **given: Any) -> list[float]:
        """Train with sdops; returns the losses."""
        plain, begin = feeder.Feeder.batch, _train_run.Running.run
        record = self

        def batch(self: feeder.Feeder, number: int) -> feeder.Batch:
            found = plain(self, number)
            record.batches.append(found)
            return found

        def remember(self: _train_run.Running) -> int:
            record.running = self
            record.initial = {name: value.clone() for name, value in self.parameters.views().items()}
            return begin(self)

        feeder.Feeder.batch, _train_run.Running.run = batch, remember  # type: ignore[method-assign]
        try:
            report = run(method, **given)
        finally:
            feeder.Feeder.batch, _train_run.Running.run = plain, begin  # type: ignore[method-assign]
        from sdops.training.log import read

        return [line["loss"] for line in read(Path(report.data["log"])) if "loss" in line]

    def patches(self, losses: list[float]) -> dict[tuple[Any, str], Any]:
        """What is replaced while a script runs."""
        record = self

        def randn_like(*_: Any, **__: Any) -> torch.Tensor:
            return record.batches[record.at].noise.clone()

        def randint(*_: Any, **__: Any) -> torch.Tensor:
            record.at += 1
            return record.batches[record.at - 1].steps.clone()

        def encode(self: AutoencoderKL, *_: Any) -> Any:
            latents = record.batches[record.at].latents / self.config.scaling_factor
            return types.SimpleNamespace(latent_dist=types.SimpleNamespace(sample=lambda: latents))

        def log(_: Any, values: dict[str, float], **__: Any) -> None:
            losses.append(float(values.get("train_loss", values.get("loss", 0))))

        begin = accelerate.Accelerator.__init__

        def quiet(self: Any, **given: Any) -> None:
            begin(self, **{**given, "log_with": None})

        return {
            (torch, "randn_like"): randn_like,
            (torch, "randint"): randint,
            (AutoencoderKL, "encode"): encode,
            (accelerate.Accelerator, "log"): log,
            (accelerate.Accelerator, "init_trackers"): lambda *_, **__: None,
            (accelerate.Accelerator, "__init__"): quiet,
        }


def script(path: Path, options: list[str], patches: dict[tuple[Any, str], Any]) -> None:
    """Run a script with things replaced."""
    before = {place: getattr(*place) for place in patches}
    arguments = sys.argv
    for (owner, name), value in patches.items():
        setattr(owner, name, value)
    sys.argv = [str(path), *options]
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv = arguments
        for (owner, name), value in before.items():
            setattr(owner, name, value)


class Rows:
    """A dataset of pictures with one caption."""

    column_names = ("image", "text")

    def __init__(self, pictures: list[Image.Image], transform: Any = None) -> None:
        self._pictures, self._transform = pictures, transform

    def with_transform(self, transform: Any) -> Rows:
        """The same through a transform."""
        return Rows(self._pictures, transform)

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._transform({"image": [self._pictures[index]], "text": [CAPTION]})
        return {key: value[0] for key, value in row.items()}


class Same:
    """A transform that changes nothing: latents come from the record anyway."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, x: Any) -> Any:
        """Transform."""
        return x


class ToTensor(Same):
    """A picture as numbers."""

    def __call__(self, x: Any) -> torch.Tensor:
        """Transform."""
        return torch.from_numpy(np.array(x)).permute(2, 0, 1).float() / 255


class Compose:
    """One transform after the other."""

    def __init__(self, steps: list[Any]) -> None:
        self._steps = steps

    def __call__(self, x: Any) -> Any:
        """Transform."""
        for step in self._steps:
            x = step(x)
        return x


def stub_modules(images: Path) -> None:
    """The little that the scripts use of datasets and torchvision."""
    pictures = [Image.open(path).convert("RGB") for path in sorted(images.glob("*.png"))]
    datasets: Any = types.ModuleType("datasets")
    datasets.load_dataset = lambda *_, **__: {"train": Rows(pictures)}
    datasets.utils = types.SimpleNamespace(
        logging=types.SimpleNamespace(set_verbosity_warning=lambda: None, set_verbosity_error=lambda: None)
    )
    transforms: Any = types.ModuleType("torchvision.transforms")
    for name in ("Resize", "CenterCrop", "RandomCrop", "RandomHorizontalFlip", "Lambda", "Normalize"):
        setattr(transforms, name, Same)
    transforms.ToTensor, transforms.Compose = ToTensor, Compose
    transforms.InterpolationMode = types.SimpleNamespace(LANCZOS="lanczos", BILINEAR="bilinear")
    torchvision: Any = types.ModuleType("torchvision")
    torchvision.transforms = transforms
    sys.modules |= {"datasets": datasets, "torchvision": torchvision, "torchvision.transforms": transforms}


def common(folder: Path, output: Path) -> list[str]:
    """Options that both scripts have."""
    return [
        *("--pretrained_model_name_or_path", str(folder / "model"), "--train_data_dir", str(folder / "images")),
        *("--resolution", str(SIZE), "--train_batch_size", str(BATCH), "--max_train_steps", str(STEPS)),
        *("--lr_scheduler", "constant", "--lr_warmup_steps", "0", "--output_dir", str(output), "--seed", "1"),
        *("--checkpointing_steps", "100000", "--adam_weight_decay", "0.01"),
    ]


def compare(what: str, ours: list[float], theirs: list[float]) -> bool:
    """Print both and the largest difference."""
    gap = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(f"{what}: {len(ours)} losses, sdops {ours[0]:.6f} .. {ours[-1]:.6f}, diffusers {theirs[0]:.6f} .. "
          f"{theirs[-1]:.6f}, largest difference {gap:.2e}")  # fmt: skip
    return gap <= BOUND


def lora(folder: Path, scripts: Path) -> bool:
    """train_text_to_image_lora.py."""
    record, losses = Record(), []
    output = folder / "lora.safetensors"
    ours = record.train(
        "lora", model=str(folder / "model"), images=str(folder / "images"), output=str(output), steps=STEPS,
        batch=BATCH, bucket_step=8, ranks="attention", rank=RANK, lr=1e-3, clip=0.0, validate_every=0,
        weight_decay=0.01, save_dtype="fp32",
    )  # fmt: skip
    add = UNet2DConditionModel.add_adapter

    def with_ours(self: UNet2DConditionModel, *args: Any, **kwargs: Any) -> None:
        add(self, *args, **kwargs)
        values = dict(self.named_parameters())
        for name, value in record.initial.items():
            layer, _, part = name.removeprefix("unet:").rpartition(".")
            letter = {"down": "A", "up": "B"}[part]
            values[f"{layer}.lora_{letter}.default.weight"].data.copy_(value)

    patches = record.patches(losses) | {(UNet2DConditionModel, "add_adapter"): with_ours}
    options = [*common(folder, folder / "their-lora"), "--rank", str(RANK), "--learning_rate", "1e-3"]
    script(scripts / "train_text_to_image_lora.py", [*options, "--max_grad_norm", "1e9"], patches)
    is_equal = compare("LoRA", ours, losses)
    theirs = load_file(folder / "their-lora" / "pytorch_lora_weights.safetensors")
    mine = record.running.parameters.views()
    worst = 0.0
    for key, value in theirs.items():
        layer, _, part = key.removeprefix("unet.").removesuffix(".weight").rpartition(".lora")
        name = f"unet:{layer}.{ {'_A': 'down', '_B': 'up', '.down': 'down', '.up': 'up'}[part] }"
        worst = max(worst, float((value - mine[name]).abs().max()))
    print(f"LoRA: largest difference of a weight after {STEPS} steps: {worst:.2e}")
    return is_equal & loads(folder, output, record)


@torch.no_grad()
def loads(folder: Path, output: Path, record: Record) -> bool:
    """Whether diffusers' UNet with the file says what the trained one says."""
    pipe = StableDiffusionPipeline.from_pretrained(folder / "model", safety_checker=None, feature_extractor=None)
    pipe.load_lora_weights(output)
    batch, model = record.batches[0], record.running.model
    text, _ = model.text(batch.ids) if batch.ids else (batch.context, None)
    theirs = pipe.unet(batch.latents, batch.steps, text).sample
    record.running.method.use(record.running.parameters.current())
    ours = model.predict(batch.latents, batch.steps, text, None, None)
    pipe.unload_lora_weights()
    plain = pipe.unet(batch.latents, batch.steps, text).sample
    gap, change = float((theirs - ours).abs().max()), float((plain - ours).abs().max())
    print(f"LoRA: loaded by diffusers, its UNet differs by {gap:.2e}; without the file by {change:.2e}")
    return gap < 1e-4 < change


def words(folder: Path, scripts: Path) -> bool:
    """textual_inversion.py."""
    record, losses = Record(), []
    output = folder / "words.safetensors"
    ours = record.train(
        "ti", model=str(folder / "model"), images=str(folder / "images"), output=str(output), to="diffusers",
        steps=STEPS, batch=BATCH, bucket_step=8, tokens=("<it>:2",), init=("shape",), caption="template",
        template="a photo of a {}", lr=5e-3, clip=0.0, keep_norm=False, weight_decay=0.01, validate_every=0,
    )  # fmt: skip
    choice = random.choice

    def one(values: Any) -> Any:
        return "a photo of a {}" if "a photo of a {}" in values else choice(values)

    pictures = folder / "pictures-alone"  # the script takes every file of the folder for a picture
    pictures.mkdir()
    for path in (folder / "images").glob("*.png"):
        (pictures / path.name).write_bytes(path.read_bytes())
    options = common(folder, folder / "their-words")
    options[options.index("--train_data_dir") + 1] = str(pictures)
    options += ["--placeholder_token", "<it>", "--initializer_token", "shape", "--num_vectors", "2"]
    options += ["--learning_rate", "5e-3", "--save_steps", "100000"]
    patches = record.patches(losses) | {(random, "choice"): one}
    script(scripts / "textual_inversion.py", options, patches)
    is_equal = compare("words", ours, losses)
    theirs = load_file(folder / "their-words" / "learned_embeds.safetensors")["<it>"]
    mine = record.running.parameters.views()["words:clip_l"]
    print(f"words: largest difference of a vector after {STEPS} steps: {float((theirs - mine).abs().max()):.2e}")
    pipe = StableDiffusionPipeline.from_pretrained(folder / "model", safety_checker=None, feature_extractor=None)
    pipe.load_textual_inversion(output, token="<it>")
    ids = pipe.tokenizer(pipe.maybe_convert_prompt("a photo of a <it>", pipe.tokenizer)).input_ids[5:7]
    loaded = pipe.text_encoder.get_input_embeddings().weight[ids]
    gap = float((loaded.detach() - mine).abs().max())
    print(f"words: loaded by diffusers as tokens {ids}, vectors differ by {gap:.2e}")
    return is_equal and gap == 0


def main() -> int:
    """Run both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scripts", type=Path, required=True)
    scripts = parser.parse_args().scripts.resolve()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_sd.model(folder / "model")
        tiny_sd.images(folder / "images", caption=CAPTION)
        (folder / "model" / "tokenizer").mkdir()
        for file, data in clip_files("<|endoftext|>").items():
            (folder / "model" / "tokenizer" / file).write_bytes(data)
        index = folder / "model" / "model_index.json"
        listed = json.loads(index.read_text()) | {"tokenizer": ["transformers", "CLIPTokenizer"]}
        index.write_text(json.dumps(listed))
        stub_modules(folder / "images")
        results = [lora(folder, scripts), words(folder, scripts)]
    print("equal" if all(results) else "NOT EQUAL")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())

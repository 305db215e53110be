"""Time a training step of a LoRA: sdops, and diffusers with PEFT as their scripts do it, on the same UNet.

    python tools/bench_train.py                          on the GPU: SD1.5 at 512 and SDXL at 1024, batch 1, rank 16
    python tools/bench_train.py --device cpu --tiny      a dry run on the CPU with a tiny UNet

UNets have random weights: how fast a step is does not depend on them. Text and latents are cached on both sides, as
sdops caches them. Reported are the median of the steps and the peak of memory, each side in a process of its own.
Needs diffusers, transformers and, for the comparison, peft (left out where it is missing).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

MODELS: dict[str, dict[str, Any]] = {
    "sd15": {"family": "sd1", "side": 64, "width": 768, "config": {"cross_attention_dim": 768}},
    "sdxl": {
        "family": "sdxl",
        "side": 128,
        "width": 2048,
        "config": {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    },
    "tiny": {
        "family": "sd1",
        "side": 16,
        "width": 32,
        "config": {
            "block_out_channels": (32, 64),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "cross_attention_dim": 32,
        },
    },
}


def unet(model: dict[str, Any], device: str, dtype: Any) -> Any:
    """A UNet with random weights, made where it is used."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device(device):
        return UNet2DConditionModel(sample_size=model["side"], **model["config"]).to(dtype).requires_grad_(False)


def tensors(model: dict[str, Any], batch: int, device: str, dtype: Any) -> dict[str, Any]:
    """A batch."""
    import torch

    shape = (batch, 4, model["side"], model["side"])
    is_xl = model["family"] == "sdxl"
    pixels = float(model["side"] * 8)
    return {
        "latents": torch.randn(shape, device=device),
        "noise": torch.randn(shape, device=device),
        "steps": torch.randint(0, 1000, (batch,), device=device),
        "context": torch.randn(batch, 77, model["width"], device=device, dtype=dtype),
        "pooled": torch.randn(batch, 1280, device=device, dtype=dtype) if is_xl else None,
        "sizes": torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]] * batch, device=device, dtype=dtype)
        if is_xl
        else None,
    }


def ours(model: dict[str, Any], options: argparse.Namespace, dtype: Any) -> Any:
    """A function that takes a step as `sdops train lora` does."""
    import torch

    from sdops.trainers import trainer
    from sdops.training.config import Config
    from sdops.training.diffusion import abar_of
    from sdops.training.feeder import Batch
    from sdops.training.loop import Course
    from sdops.training.model import Model
    from sdops.training.optimizer import Optimizer
    from sdops.training.parameters import Parameters
    from sdops.training.workers import Workers

    device, abar = torch.device(options.device), abar_of()
    config = Config(ranks="attention", rank=options.rank, graph=not options.eager, checkpointing=options.checkpointing)
    net = unet(model, options.device, dtype).to(memory_format=torch.channels_last).eval()
    whole = Model("random", model["family"], net, None, [], "epsilon", abar, 512, device, dtype, lambda _: {})
    if options.checkpointing:
        whole.save_memory(dropout=False)
    method = trainer("lora")(whole, config)
    parameters = Parameters(method.parameters(), device, dtype)
    optimizer = Optimizer(parameters, clip=1.0, scaled=dtype == torch.float16)
    optimizer.set_rates(1.0, 0)
    given = tensors(model, options.batch, options.device, dtype)
    ones = torch.ones(options.batch, device=device)
    batch = Batch(
        given["latents"], given["noise"], given["steps"], abar.float().to(device)[given["steps"]], ones,
        ones / options.batch, None, given["sizes"], {}, given["context"], given["pooled"],
    )  # fmt: skip
    feeder: Any = SimpleNamespace(model=whole, batch=lambda _: batch)
    loop = Course(
        method, config, parameters, optimizer, feeder, Workers(), None, [], print, print,
        lambda text: print(text, file=sys.stderr),
    )  # fmt: skip
    return loop._stepper()


def theirs(model: dict[str, Any], options: argparse.Namespace, dtype: Any) -> Any:
    """A function that takes a step as diffusers' train_text_to_image_lora.py does, text and latents cached."""
    import torch
    from diffusers import DDPMScheduler
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    net = unet(model, options.device, dtype)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    net.add_adapter(LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=targets))
    cast_training_params(net, dtype=torch.float32)
    if options.checkpointing:
        net.enable_gradient_checkpointing()
    net.train()
    learning = [weight for weight in net.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-4)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    given = tensors(model, options.batch, options.device, dtype)
    extra = {} if given["pooled"] is None else {"text_embeds": given["pooled"], "time_ids": given["sizes"]}

    def step(_: int) -> Any:
        with torch.autocast(options.device.split(":")[0], dtype, enabled=dtype != torch.float32):
            noisy = scheduler.add_noise(given["latents"], given["noise"], given["steps"])
            predicted = net(
                noisy, given["steps"], given["context"], added_cond_kwargs=extra or None, return_dict=False
            )[0]
            loss = torch.nn.functional.mse_loss(predicted.float(), given["noise"].float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def measure(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """Median milliseconds of a step, and the peak of memory."""
    import torch

    is_cuda = options.device.startswith("cuda")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options.dtype]
    step = {"sdops": ours, "diffusers": theirs}[side](MODELS[options.model], options, dtype)
    for number in range(options.warm):
        loss = step(number)
    if is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for number in range(options.steps):
        begin = time.perf_counter()
        loss = step(number)
        if is_cuda:
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - begin))
    if not bool(torch.isfinite(loss)):
        raise RuntimeError(f"{side}: the loss is {float(loss)}")
    peak = torch.cuda.max_memory_allocated() if is_cuda else _resident()
    return {"side": side, "milliseconds": round(statistics.median(times), 2), "peak_bytes": peak, "loss": float(loss)}


def _resident() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    """Measure every model on both sides."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--models", nargs="+", default=["sd15", "sdxl"], choices=list(MODELS))
    parser.add_argument("--tiny", action="store_true", help="a tiny UNet, few steps")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warm", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="sdops without CUDA graphs")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", choices=["sdops", "diffusers"], help=argparse.SUPPRESS)
    parser.add_argument("--model", choices=list(MODELS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.dtype = options.dtype or ("fp32" if options.device == "cpu" else "bf16")
    if options.tiny:
        options.models, options.steps, options.warm = ["tiny"], min(options.steps, 3), 1
    if options.side:
        print(json.dumps(measure(options.side, options)))
        return 0
    sides = ["sdops", "diffusers"] if find_spec("peft") else ["sdops"]
    found = {}
    for model in options.models:
        rows = [_apart(side, model, options) for side in sides]
        found[model] = rows
        for row in rows if not options.json else ():
            peak = row["peak_bytes"] / 2**30
            print(f"{model:6} {row['side']:10} {row['milliseconds']:9.2f} ms/step  {peak:.2f} GiB")
    if options.json:
        print(json.dumps(found, indent=2))
    return 0


def _apart(side: str, model: str, options: argparse.Namespace) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--model", model]
    for name in ("device", "dtype", "batch", "rank", "steps", "warm"):
        command += [f"--{name}", str(getattr(options, name))]
    command += [f"--{name}" for name in ("eager", "checkpointing") if getattr(options, name)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


if __name__ == "__main__":
    sys.exit(main())

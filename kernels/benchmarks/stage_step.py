"""A whole training step: a random U-Net of diffusers with LoRAs in all its attention blocks, forward to AdamW.

Arms differ in how a LoRA layer is computed and whether the step is replayed from a CUDA graph: that is what a trainer
can choose. The U-Net, the data and the optimizer (fused AdamW on float32 LoRAs, products in bfloat16) are the same.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import sdops_kernels as kernels
import torch
from bench import Bench
from timing import as_graph
from torch import Tensor, nn

RANK = 16
Formula = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor], Tensor]  # x, weight, bias, down, up
SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8, "block_out_channels": (320, 640, 1280, 1280)}
SDXL = {
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TINY = {
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
MODELS = {"sd15": (SD15, 64), "sdxl": (SDXL, 128), "tiny": (TINY, 8)}  # and the side of their latents


def run(bench: Bench) -> None:
    """SD1.5 at 512 and SDXL at 1024 pixels, batch 1 and 4."""
    for batch in (1,) if bench.dry else (1, 4):
        for model in ("tiny",) if bench.dry else ("sd15", "sdxl"):
            case = f"{model} batch {batch} rank {RANK}"
            made = bench.made(case, "U-Net", lambda model=model: _unet(bench, *MODELS[model]))
            if made is None:
                continue
            unet, side = made()
            _model(bench, case, unet, _inputs(bench, unet, side, batch))
            del made, unet
            gc.collect()
            if bench.on_gpu:
                torch.cuda.empty_cache()


def _unet(bench: Bench, config: dict[str, Any], side: int) -> Callable[[], tuple[nn.Module, int]]:
    from diffusers import UNet2DConditionModel

    dtype = torch.bfloat16 if bench.on_gpu else torch.float32
    with torch.device(bench.device):
        unet = UNet2DConditionModel(sample_size=side, **config).to(dtype)
    return lambda: (unet.requires_grad_(requires_grad=False), side)


def _inputs(bench: Bench, unet: Any, side: int, batch: int) -> dict[str, Any]:
    dtype = unet.dtype
    given: dict[str, Any] = {
        "sample": bench.normal(batch, 4, side, side, dtype=dtype),
        "timestep": torch.full((batch,), 500, device=bench.device),
        "encoder_hidden_states": bench.normal(batch, 77, unet.config.cross_attention_dim, dtype=dtype),
    }
    if unet.config.addition_embed_type == "text_time":
        times = torch.full((batch, 6), 1024.0, device=bench.device, dtype=dtype)
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        given["added_cond_kwargs"] = {"text_embeds": bench.normal(batch, pooled, dtype=dtype), "time_ids": times}
    return given


class Adapted(nn.Module):
    """A linear layer with a LoRA in float32, multiplied in the layer's dtype."""

    def __init__(self, layer: nn.Linear, formula: Formula) -> None:
        super().__init__()
        self.layer, self.formula = layer, formula
        make = {"device": layer.weight.device, "dtype": torch.float32}
        self.down = nn.Parameter(torch.randn(RANK, layer.in_features, **make) / layer.in_features**0.5)
        self.up = nn.Parameter(torch.randn(layer.out_features, RANK, **make) * 1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """y."""
        dtype = self.layer.weight.dtype
        return self.formula(x, self.layer.weight, self.layer.bias, self.down.to(dtype), self.up.to(dtype))


class Layers:
    """Puts LoRAs on a U-Net and takes them off."""

    def __init__(self, unet: nn.Module, formula: Formula) -> None:
        names = [
            name for name, own in unet.named_modules() if isinstance(own, nn.Linear) and "transformer_blocks" in name
        ]
        self._unet, self._plain = unet, {name: unet.get_submodule(name) for name in names}
        for name, layer in self._plain.items():
            self._set(name, Adapted(layer, formula))
        self.parameters = [own for own in unet.parameters() if own.requires_grad]

    def remove(self) -> None:
        """The U-Net as it was."""
        for name, layer in self._plain.items():
            self._set(name, layer)

    def _set(self, name: str, module: nn.Module) -> None:
        path, _, last = name.rpartition(".")
        setattr(self._unet.get_submodule(path), last, module)


def _model(bench: Bench, case: str, unet: nn.Module, given: dict[str, Any]) -> None:
    target = torch.randn_like(given["sample"])
    choices = _measured(bench, unet, given)

    def plain(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
        return kernels.lora_linear(x, weight, bias, down, up, 0.5)

    def fused(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
        return kernels.lora_linear(x, weight, bias, down, up, 0.5, choices=choices)

    def peft(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
        return nn.functional.linear(x, weight, bias) + ((x @ down.T) @ up.T) * 0.5

    arms: list[tuple[str, Formula, str]] = [
        ("ours, graph", fused, "graph"),
        ("ours plain, graph", plain, "graph"),
        ("PEFT order, eager", peft, ""),
        ("ours, eager", fused, ""),
        ("PEFT order, torch.compile", peft, "compile"),
    ]
    for arm, formula, how in arms:
        if how and not bench.on_gpu:
            continue
        layers = Layers(unet, formula)
        try:
            step = _step(unet, layers, given, target, compiled=how == "compile")
            work = bench.made(case, arm, lambda s=step, h=how: as_graph(s, bench.device) if h == "graph" else s)
            if work is not None:
                if bench.on_gpu:
                    torch.cuda.reset_peak_memory_stats()
                bench.time(case, arm, work, memory_gb=lambda: _peak(bench), launches=lambda w=work: _launches(bench, w))
        finally:
            layers.remove()
    _with_peft(bench, case, unet, given, target)


def _step(
    unet: nn.Module, layers: Any, given: dict[str, Any], target: Tensor, *, compiled: bool = False
) -> Callable[[], Any]:
    on_gpu = target.is_cuda
    optimizer = torch.optim.AdamW(layers.parameters, 1e-4, fused=on_gpu, capturable=on_gpu)
    forward = torch.compile(unet) if compiled else unet

    def work() -> None:
        loss = nn.functional.mse_loss(forward(**given).sample.float(), target.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(layers.parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return work


def _measured(bench: Bench, unet: nn.Module, given: dict[str, Any]) -> kernels.Choices:
    """Where the kernels are faster, for the shapes of this U-Net."""
    choices, seen = kernels.Choices(), set()

    def look(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
        seen.add((x.numel() // x.shape[-1], x.shape[-1], len(weight), len(down)))
        return kernels.lora_linear(x, weight, bias, down, up, 0.5)

    layers = Layers(unet, look)
    with torch.no_grad():
        unet(**given)
    layers.remove()
    if bench.on_gpu:
        choices.measure(sorted(seen), torch.bfloat16, bench.device)
    return choices


def _with_peft(bench: Bench, case: str, unet: Any, given: dict[str, Any], target: Tensor) -> None:
    """PEFT's own modules, where it is installed."""

    def make() -> Callable[[], Any]:
        from peft import LoraConfig

        unet.add_adapter(LoraConfig(r=RANK, target_modules=r".*transformer_blocks.*(to_[qkv]|to_out\.0|proj|net\.2)"))
        return _step(unet, _Trainable(unet), given, target)

    work = bench.made(case, "PEFT, eager", make)
    if work is not None:
        if bench.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        bench.time(case, "PEFT, eager", work, memory_gb=lambda: _peak(bench), launches=lambda: _launches(bench, work))
        unet.delete_adapters("default")


class _Trainable:
    def __init__(self, unet: nn.Module) -> None:
        self.parameters = [own for own in unet.parameters() if own.requires_grad]


def _peak(bench: Bench) -> float | None:
    return torch.cuda.max_memory_allocated() / 1e9 if bench.on_gpu else None


def _launches(bench: Bench, work: Callable[[], Any]) -> int:
    """Kernels of a step on the device; operators where there is none."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if bench.on_gpu else activity.CPU]) as profile:
        work()
        if bench.on_gpu:
            torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages())

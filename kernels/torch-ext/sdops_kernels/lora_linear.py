"""A linear layer with a LoRA, for training: y = x W^T + bias + s (x A^T) B^T, with gradients for x, A and B.

Plain formulation: the scale is folded into S = s x A^T [M, r], which is saved; three products forward, five backward,
all deterministic. Where a measurement on this GPU says so (`Choices.measure`), the forward pass is one kernel that
makes x W^T and S in the same loop; without a measurement it is never used, so that it can only be faster.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Choices", "lora_linear"]

Shape = tuple[int, int, int, int]  # tokens M, inputs K, outputs N, rank
TILE = (128, 128, 64)
REPEATS = 20


class Choices:
    """Which shapes the fused kernel is faster for, as measured on a GPU; nothing is measured behind one's back.

    Attributes:
        faster: GPU -> shapes, each with its dtype, where the fused forward pass won.
    """

    def __init__(self, faster: dict[str, list[list[Any]]] | None = None) -> None:
        self.faster = faster or {}

    def fused(self, x: Tensor, shape: Shape) -> bool:
        """Whether to use the kernel."""
        if not self.faster or not x.is_cuda:
            return False
        return [str(x.dtype), *shape] in self.faster.get(torch.cuda.get_device_name(x.device), [])

    def measure(self, shapes: Iterable[Shape], dtype: torch.dtype = torch.bfloat16) -> None:
        """Time both ways on the current GPU and remember where the kernel is at least 3 % faster."""
        name = torch.cuda.get_device_name()
        won = self.faster.setdefault(name, [])
        for shape in shapes:
            tokens, inputs, outputs, rank = shape
            make = [torch.randn(size, device="cuda", dtype=dtype) for size in ((tokens, inputs), (outputs, inputs))]
            make += [torch.randn(size, device="cuda", dtype=dtype) for size in ((rank, inputs), (outputs, rank))]
            plain = _milliseconds(lambda make=make: _forward(make[0], make[1], None, make[2], make[3], 1.0))
            fused = _milliseconds(lambda make=make: _forward_fused(make[0], make[1], None, make[2], make[3], 1.0))
            if fused < 0.97 * plain:
                won.append([str(dtype), *shape])

    def save(self, path: str | Path) -> None:
        """Write what was measured as JSON."""
        Path(path).write_text(json.dumps(self.faster, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Choices:
        """Read what `save` wrote."""
        return cls(json.loads(Path(path).read_text(encoding="utf-8")))


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: float = 1.0,
    *,
    choices: Choices | None = None,
) -> Tensor:
    """x W^T + bias + scale (x down^T) up^T.

    Args:
        x: [..., K].
        weight: [N, K], frozen: it gets no gradient.
        bias: [N], frozen, or None.
        down: [r, K] (A).
        up: [N, r] (B).
        scale: alpha / r.
        choices: Where the fused kernel is faster; None = plain everywhere.

    Returns:
        [..., N], in the dtype of x.
    """
    flat = x.reshape(-1, x.shape[-1])
    shape = (len(flat), flat.shape[1], len(weight), len(down))
    forward = _forward_fused if choices is not None and choices.fused(flat, shape) else _forward
    result: Tensor = _LoraLinear.apply(flat, weight, bias, down, up, scale, forward)
    return result.reshape(*x.shape[:-1], len(weight))


class _LoraLinear(torch.autograd.Function):
    """The plain formulation; S is saved instead of x A^T and of anything of the size of y."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
        forward: Callable[..., tuple[Tensor, Tensor]],
    ) -> Tensor:
        result, inner = forward(x, weight, bias, down, up, scale)
        ctx.save_for_backward(x, weight, down, up, inner)
        ctx.scale = scale
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, inner = ctx.saved_tensors
        gradient = gradients[0]
        low = torch.mm(gradient, up).mul_(ctx.scale)  # [M, r]
        for_x = torch.addmm(torch.mm(gradient, weight), low, down) if ctx.needs_input_grad[0] else None
        for_down = torch.mm(low.T, x) if ctx.needs_input_grad[3] else None
        for_up = torch.mm(gradient.T, inner) if ctx.needs_input_grad[4] else None
        return for_x, None, None, for_down, for_up, None, None


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """y [M, N] and S [M, r]."""
    inner = torch.mm(x, down.T).mul_(scale)
    base = torch.mm(x, weight.T) if bias is None else torch.addmm(bias, x, weight.T)
    return torch.addmm(base, inner, up.T), inner


def _forward_fused(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The same in one launch."""
    from ._lora_linear_kernels import forward

    x, weight, down, up = (each.contiguous() for each in (x, weight, down, up))
    tokens, inputs = x.shape
    outputs, rank = up.shape
    result = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    inner = torch.empty(tokens, rank, dtype=x.dtype, device=x.device)
    size = max(16, 1 << (rank - 1).bit_length())
    rows, columns, _ = TILE
    forward[(-(-tokens // rows), -(-outputs // columns))](
        x,
        weight,
        bias if bias is not None else x,
        down,
        up,
        result,
        inner,
        tokens,
        outputs,
        inputs,
        rank,
        float(scale),
        BIAS=bias is not None,
        ALIGNED=inputs % 16 == 0 and outputs % 16 == 0 and all(t.data_ptr() % 16 == 0 for t in (x, weight, down)),
        WIDE=x.device.type == "cpu",
        R=size,
        BM=TILE[0],
        BN=TILE[1],
        BK=TILE[2],
        num_warps=8,
        num_stages=3,
        enable_fp_fusion=True,
    )
    return result, inner


def _milliseconds(work: Callable[[], Any]) -> float:
    """Median of REPEATS runs, after as many to warm up, each after another buffer has filled the cache."""
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    times = []
    for turn in range(2 * REPEATS):
        flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if turn >= REPEATS:
            times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]

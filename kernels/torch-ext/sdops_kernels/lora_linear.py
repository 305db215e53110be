"""A linear layer with a LoRA, for training: y = x W^T + bias + s (x A^T) B^T, with gradients for x, A and B.

Plain formulation: the scale is folded into S = s x A^T [M, r], which is saved; three products forward, five backward,
all deterministic. Where a measurement on this GPU says so (`Choices.measure`), kernels take over: one for y and S, and
for the gradients one that makes dx and s dy B and one that makes dA and dB. Without a measurement they are never used,
so that they can only be faster.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._registration import operator, register
from ._tables import default_backend

__all__ = ["Choices", "lora_linear"]

Shape = tuple[int, int, int, int]  # tokens M, inputs K, outputs N, rank
PASSES = ("forward", "backward")
TILE, HIGH_RANK_TILE = (128, 128, 64), (64, 128, 64)  # tokens, columns, inputs at once; from rank 65 on
HALVES = (torch.float16, torch.bfloat16)  # float32 has no tensor cores that are exact: cuBLAS does it
TILE_OF_GRADIENTS = (64, 64)  # tokens, columns
SLABS, SLAB = 16, 256  # at most so many, of at least so many tokens: the shape alone decides, and so the bits
MOST = 1 << 31  # numbers of a matrix: the kernels count them in 32 bits
REPEATS = 20
FASTER = 0.97  # of the plain way's time


class Choices:
    """Which shapes the kernels are faster for, as measured on a GPU; nothing is measured behind one's back.

    Attributes:
        faster: GPU -> pass (forward, backward) -> [dtype, M, K, N, rank] of the layers where the kernels won.
    """

    def __init__(self, faster: Mapping[str, Mapping[str, list[list[Any]]]] | None = None) -> None:
        self.faster = {name: {way: list(own.get(way, [])) for way in PASSES} for name, own in (faster or {}).items()}

    def fused(self, x: Tensor, shape: Shape) -> tuple[bool, bool]:
        """Whether to use the kernels forward and backward."""
        own = self.faster.get(_name(x.device))
        if own is None:
            return False, False
        wanted = [str(x.dtype), *shape]
        return wanted in own["forward"], wanted in own["backward"]

    def measure(self, shapes: Iterable[Shape], dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> None:
        """Time both ways and remember where the kernels are at least 3 % faster."""
        own = self.faster.setdefault(_name(torch.device(device)), {way: [] for way in PASSES})
        for shape in shapes:
            tokens, inputs, outputs, rank = shape
            sizes = ((tokens, inputs), (outputs, inputs), (rank, inputs), (outputs, rank), (tokens, outputs))
            x, weight, down, up, gradient = (torch.randn(size, device=device, dtype=dtype) for size in sizes)
            forward = x, weight, None, down, up, 1.0
            backward = gradient, x, weight, reference.lora_forward(*forward)[1], down, up, 1.0
            for way, given in zip(PASSES, (forward, backward), strict=True):
                plain, fused = getattr(reference, f"lora_{way}"), operator(f"lora_{way}")
                times = [_milliseconds(lambda f=f, given=given: f(*given), device) for f in (plain, fused)]
                wanted = [str(dtype), *shape]
                own[way] = [each for each in own[way] if each != wanted]
                if times[1] < FASTER * times[0]:
                    own[way].append(wanted)

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
        choices: Where the kernels are faster; None = plain everywhere.

    Returns:
        [..., N], in the dtype of x.
    """
    flat = x.reshape(-1, x.shape[-1])
    shape = (len(flat), flat.shape[1], len(weight), len(down))
    fused = choices.fused(flat, shape) if choices is not None else (False, False)
    result: Tensor = _LoraLinear.apply(flat, weight, bias, down, up, scale, *fused)
    return result.reshape(*x.shape[:-1], len(weight))


class _LoraLinear(torch.autograd.Function):
    """S is saved instead of x A^T and of anything of the size of y."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
        fused_forward: bool,
        fused_backward: bool,
    ) -> Tensor:
        forward = operator("lora_forward") if fused_forward else reference.lora_forward
        result, inner = forward(x, weight, bias, down, up, scale)
        ctx.save_for_backward(x, weight, down, up, inner)
        ctx.scale, ctx.fused = scale, fused_backward
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, inner = ctx.saved_tensors
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[3], ctx.needs_input_grad[4])
        given = gradients[0], x, weight, inner, down, up, ctx.scale
        if ctx.fused and all(wanted):
            for_x, for_down, for_up = operator("lora_backward")(*given)
        else:
            for_x, for_down, for_up = reference.lora_backward(*given, wanted)
        return for_x, None, None, for_down, for_up, None, None, None


def forward_by_kernel(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """y [M, N] and S [M, r] in one launch."""
    return _product(x, weight, bias, down, up, scale, turned=False)


def backward_by_kernel(
    gradient: Tensor, x: Tensor, weight: Tensor, inner: Tensor, down: Tensor, up: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for x, A and B: two launches and a sum."""
    from ._lora_linear_kernels import add_gradients

    gradient, x, inner = gradient.contiguous(), x.contiguous(), inner.contiguous()
    for_x, low = _product(gradient, weight, None, up, down, scale, turned=True)
    (tokens, inputs), (outputs, rank) = x.shape, up.shape
    slabs = max(1, min(SLABS, tokens // SLAB))
    slab = -(-tokens // slabs)
    rows, columns = TILE_OF_GRADIENTS
    across = -(-outputs // columns)
    partial = torch.empty(slabs, outputs + inputs, rank, dtype=torch.float32, device=x.device)
    add_gradients[(across + -(-inputs // columns), slabs)](
        gradient,
        x,
        inner,
        low,
        partial,
        tokens,
        outputs,
        inputs,
        rank,
        across,
        slab,
        WIDE=x.device.type == "cpu",
        R=_filled(rank),
        BM=rows,
        BN=columns,
        num_warps=4,
        num_stages=3,
        enable_fp_fusion=True,
    )
    total = partial.sum(0).to(x.dtype)  # in the order of the slabs
    return for_x, total[outputs:].T.contiguous(), total[:outputs].contiguous()


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, first: Tensor, second: Tensor, scale: float, *, turned: bool
) -> tuple[Tensor, Tensor]:
    """x W^T + (scale x first^T) second^T, or `turned` x W + (scale x first) second, and what is in brackets."""
    from ._lora_linear_kernels import product

    x, weight, first, second = (each.contiguous() for each in (x, weight, first, second))
    tokens, inputs = x.shape
    outputs, rank = (weight.shape[1], first.shape[1]) if turned else (weight.shape[0], first.shape[0])
    result = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    inner = torch.empty(tokens, rank, dtype=x.dtype, device=x.device)
    rows, columns, depth = TILE if rank <= 64 else HIGH_RANK_TILE
    product[(-(-tokens // rows), -(-outputs // columns))](
        x,
        weight,
        bias if bias is not None else x,
        first,
        second,
        result,
        inner,
        tokens,
        outputs,
        inputs,
        rank,
        float(scale),
        BIAS=bias is not None,
        TURNED=turned,
        WIDE=x.device.type == "cpu",
        R=_filled(rank),
        BM=rows,
        BN=columns,
        BK=depth,
        num_warps=8,
        num_stages=3,
        enable_fp_fusion=True,
    )
    return result, inner


def _filled(rank: int) -> int:
    """A power of two that tensor cores take."""
    return max(16, 1 << (rank - 1).bit_length())


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _milliseconds(work: Callable[[], Any], device: str) -> float:
    """Median of REPEATS runs, after as many to warm up, each after another buffer has filled the cache."""
    flush = torch.empty(64 << 20, dtype=torch.int32, device=device)
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


def _by_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether there is a kernel for these; what is larger than it can count is left to torch."""
    largest = max(x.numel(), len(x) * len(weight), weight.numel())
    return x.dtype in HALVES and default_backend(x.device) == "triton" and largest < MOST


def _forward_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return (forward_by_kernel if _by_kernel(x, weight) else reference.lora_forward)(x, weight, bias, down, up, scale)


def _backward_op(
    gradient: Tensor, x: Tensor, weight: Tensor, inner: Tensor, down: Tensor, up: Tensor, scale: float
) -> tuple[Tensor | None, ...]:
    return (backward_by_kernel if _by_kernel(x, weight) else reference.lora_backward)(
        gradient, x, weight, inner, down, up, scale
    )


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    del bias, up, scale
    return x.new_empty(len(x), len(weight)), x.new_empty(len(x), len(down))


def _backward_fake(
    gradient: Tensor, x: Tensor, weight: Tensor, inner: Tensor, down: Tensor, up: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    del gradient, weight, inner, scale
    return x.new_empty(x.shape), x.new_empty(down.shape), x.new_empty(up.shape)


register(
    "lora_forward",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor down, Tensor up, float scale) -> (Tensor, Tensor)",
    _forward_op,
    _forward_fake,
)
register(
    "lora_backward",
    "(Tensor gradient, Tensor x, Tensor weight, Tensor inner, Tensor down, Tensor up, float scale)"
    " -> (Tensor, Tensor, Tensor)",
    _backward_op,
    _backward_fake,
)

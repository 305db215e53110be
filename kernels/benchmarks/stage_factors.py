"""The factors of all differences of a model, and the singular vectors of all layers of a LoRA."""

from __future__ import annotations

import sdops_kernels as kernels
import shapes
import torch
from bench import Bench


def run(bench: Bench) -> None:
    """Rank 32 for the 788 matrices of SDXL; random matrices are the hardest ones."""
    sizes = shapes.matrices(shapes.TINY)
    if not bench.dry:
        sizes = shapes.matrices(shapes.SDXL) + shapes.matrices(shapes.SDXL_LOCON)
    sizes = sizes if bench.fits(6 * sum(o * i for o, i in sizes)) else sizes[::8]
    matrices = [bench.normal(*size, scale=1e-3) for size in sizes]
    case, rank = f"{len(sizes)} matrices, rank {4 if bench.dry else 32}", 4 if bench.dry else 32
    bench.time(case, "ours", lambda: kernels.low_rank(matrices, rank))
    few = matrices[:: max(len(matrices) // 24, 1)]
    part = f"{len(few)} of them"
    bench.time(part, "ours", lambda: kernels.low_rank(few, rank))
    bench.time(part, "torch.svd_lowrank", lambda: [torch.svd_lowrank(m.float(), rank + 8) for m in few])
    bench.time(part, "torch.linalg.svd (kohya)", lambda: [torch.linalg.svd(m.float()) for m in few[:2]])
    for own, factors in zip(few[:4], kernels.low_rank(few[:4], rank), strict=True):
        best = torch.linalg.svdvals(own.double())[rank:].square().sum().sqrt()
        error = (own.double() - factors.up.double() @ factors.down.double()).norm() / best
        bench.note(f"error over the least possible, {tuple(own.shape)}", "ours", ratio=float(error))
    pairs = [(bench.normal(o, rank, dtype=torch.float32), bench.normal(rank, i, dtype=torch.float32)) for o, i in sizes]
    ups, downs = zip(*pairs, strict=True)
    case = f"resize of {len(sizes)} layers"
    bench.time(case, "ours", lambda: kernels.singular_factors(ups, downs))
    bench.time(case, "QR and SVD, layer by layer", lambda: [_exact(*pair) for pair in pairs])


def _exact(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    left, right = torch.linalg.qr(up), torch.linalg.qr(down.T)
    return torch.linalg.svd(left.R @ right.R.T).S

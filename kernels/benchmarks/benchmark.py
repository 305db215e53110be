"""For `kernels benchmark`: a LoRA into layers of SDXL, and a merge of three models. bench_all.py tells more."""

import torch
from kernels.benchmark import Benchmark

SHAPES = [(1280, 1280)] * 40 + [(10240, 1280)] * 6 + [(1280, 5120)] * 6


class Weights(Benchmark):
    """The outputs are compared as one tensor."""

    seed = 0

    def setup(self):
        """Weights of three models and factors."""

        def normal(*size):
            return torch.randn(size, device=self.device, dtype=torch.float16)

        self.models = [[normal(*shape) * 0.03 for shape in SHAPES] for _ in range(3)]
        self.factors = [(normal(rows, 16) * 0.01, normal(16, columns)) for rows, columns in SHAPES]
        self.out = torch.empty(sum(rows * columns for rows, columns in SHAPES), device=self.device, dtype=torch.float16)
        sizes = [rows * columns for rows, columns in SHAPES]
        outs = [part.view(shape) for part, shape in zip(self.out.split(sizes), SHAPES, strict=True)]
        changes = [[self.kernel.LoRA(*own, 0.5)] for own in self.factors]
        self.bake = self.kernel.Bake(self.models[0], outs, changes)
        self.merge = self.kernel.LinearMerge(self.models, outs, [0.5, 0.25, 0.25])

    def benchmark_bake(self):
        """W + LoRA of all layers."""
        self.bake.run()

    def verify_bake(self):
        """By torch, layer by layer."""
        pairs = zip(self.models[0], self.factors, strict=True)
        return torch.cat([torch.addmm(weight, *own, alpha=0.5).flatten() for weight, own in pairs])

    def benchmark_merge(self):
        """The weighted sum of three models."""
        self.merge.run()

    def verify_merge(self):
        """By torch, layer by layer."""
        return torch.cat([(0.5 * a + 0.25 * b + 0.25 * c).flatten() for a, b, c in zip(*self.models, strict=True)])

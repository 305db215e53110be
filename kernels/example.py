# /// script
# dependencies = ["kernels", "torch"]
# ///
"""Two LoRAs into all layers of a model in one launch, at strengths that change; on a CPU torch computes the same."""

import torch

from kernels import get_kernel

sdops_kernels = get_kernel("sdops/sdops-kernels", version=0, trust_remote_code=True)

device = "cuda" if torch.cuda.is_available() else "cpu"
weights = [torch.randn(640, 640, device=device, dtype=torch.float16) for _ in range(8)]
live = [weight.clone() for weight in weights]
loras = [
    [
        sdops_kernels.LoRA(
            torch.randn(640, 16, device=device, dtype=torch.float16),
            torch.randn(16, 640, device=device, dtype=torch.float16),
            scale=0.5,
            slot=slot,
        )
        for slot in range(2)
    ]
    for _ in weights
]

plan = sdops_kernels.Bake(weights, live, loras)
plan.run([0.8, -0.3])
plan.run([0.0, 0.0])
if not all(torch.equal(a, b) for a, b in zip(weights, live, strict=True)):
    raise SystemExit("the weights are not the pristine ones again")

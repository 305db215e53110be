"""Layers of Stable Diffusion as shapes: (outputs, inputs) of the matrices that kohya's LoRA adapts -> how many."""

from __future__ import annotations

# Linear layers and 1x1 convolutions inside Transformer2DModel.
SDXL = {
    (10240, 1280): 60,
    (1280, 1280): 372,
    (1280, 5120): 60,
    (5120, 640): 10,
    (640, 640): 70,
    (640, 2560): 10,
    (1280, 2048): 120,
    (640, 2048): 20,
}
SD15 = {
    (2560, 320): 5,
    (320, 320): 40,
    (320, 1280): 5,
    (5120, 640): 5,
    (640, 640): 40,
    (640, 2560): 5,
    (10240, 1280): 6,
    (1280, 1280): 48,
    (1280, 5120): 6,
    (1280, 768): 12,
    (640, 768): 10,
    (320, 768): 10,
}
# What LoCon adds to them: layers of the resnets and samplers, kernels as matrices. 66, so that there are 788.
SDXL_LOCON = {
    (320, 2880): 8,
    (320, 1280): 5,
    (640, 2880): 1,
    (640, 1280): 6,
    (640, 5760): 8,
    (640, 320): 1,
    (1280, 5760): 1,
    (1280, 1280): 7,
    (1280, 11520): 11,
    (1280, 640): 1,
    (1280, 23040): 2,
    (1280, 2560): 2,
    (1280, 17280): 1,
    (1280, 1920): 1,
    (640, 17280): 1,
    (640, 1920): 1,
    (640, 11520): 1,
    (640, 8640): 1,
    (640, 960): 1,
    (320, 8640): 1,
    (320, 960): 1,
    (320, 5760): 2,
    (320, 640): 2,
}
TINY = {(64, 48): 2, (96, 64): 1}
# Forward passes of one step at batch 1: tokens, inputs, outputs. SD1.5 at 512 x 512, SDXL at 1024 x 1024.
LINEARS = {
    "sd15": [
        (4096, 320, 2560),
        (4096, 320, 320),
        (4096, 1280, 320),
        (1024, 640, 5120),
        (1024, 640, 640),
        (1024, 2560, 640),
        (256, 1280, 10240),
        (256, 1280, 1280),
        (256, 5120, 1280),
        (77, 768, 1280),
        (77, 768, 640),
        (77, 768, 320),
    ],
    "sdxl": [
        (1024, 1280, 10240),
        (1024, 1280, 1280),
        (1024, 5120, 1280),
        (4096, 640, 5120),
        (4096, 640, 640),
        (4096, 2560, 640),
        (77, 2048, 1280),
        (77, 2048, 640),
    ],
    "tiny": [(16, 32, 48)],
}


def matrices(shapes: dict[tuple[int, int], int]) -> list[tuple[int, int]]:
    """One shape per layer."""
    return [shape for shape, count in shapes.items() for _ in range(count)]

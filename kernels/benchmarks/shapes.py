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
TINY = {(64, 48): 2, (96, 64): 1}
# Forward passes of one step at batch 1: tokens, inputs, outputs. SD1.5 at 512 x 512, SDXL at 1024 x 1024.
LINEARS = {
    "sd15": [
        (4096, 320, 2560),
        (4096, 320, 320),
        (4096, 1280, 320),
        (1024, 640, 5120),
        (1024, 640, 640),
        (256, 1280, 1280),
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

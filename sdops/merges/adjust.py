"""Change detail, contrast, brightness and colour of a model's pictures (SD1, SD2, SDXL)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sdops.errors import UsageError

EXECUTION = "model"

UNET = "model.diffusion_model."
TOUCHED = frozenset(
    f"{UNET}{layer}.{part}" for layer in ("input_blocks.0.0", "out.0", "out.2") for part in ("weight", "bias")
)
STEP = 0.02

# What one unit of brightness, color1, color2, color3 does to the latent channels 1, 2, 3.
COLORS_SD = ((-1, 1 / 3, 2 / 3), (1, 1, 0), (0, -1, -1), (1, 0, 1))
COLORS_SDXL = ((0, 0, 1), (1, 0, 0), (-1, -1, 0), (-1, 1, 0))


def prepare(keys: Sequence[str], _read: Callable[[str], list[Tensor]]) -> bool:
    """Whether the latents are SDXL's: told by UNet blocks with more than one transformer layer.

    Raises:
        UsageError: none of the six tensors is there.
    """
    if TOUCHED.isdisjoint(keys):
        raise UsageError(
            f"there is nothing to adjust: no tensor `{UNET}out.2.bias` or the like",
            hint="`adjust` works on SD1, SD2 and SDXL checkpoints in the original layout; see `sdops inspect FILE`",
        )
    return any(key.startswith(UNET) and ".transformer_blocks.1." in key for key in keys)


def adjust(
    a: Tensor,
    *,
    state: bool,
    key: str,
    input_detail: float = 0.0,
    output_detail: float = 0.0,
    final_detail: float = 0.0,
    contrast: float = 0.0,
    brightness: float = 0.0,
    color1: float = 0.0,
    color2: float = 0.0,
    color3: float = 0.0,
) -> Tensor:
    """Scale or shift six tensors of the UNet, leave all others as they are.

        input_blocks.0.0   weight (1 - input_detail / 100),    bias (1 + input_detail / 50)
        out.0              weight (1 - output_detail / 100),   bias (1 + output_detail / 50)
        out.2              weight (1 - final_detail / 100),    bias (4 values) + [contrast, v1, v2, v3] / 50

    v = brightness C_0 + color1 C_1 + color2 C_2 + color3 C_3, rows of COLORS_SDXL for SDXL and COLORS_SD otherwise.

    Source: hako-mikan/sd-webui-supermerger, "adjust", whose eight numbers (IN, OUT, OUT2, CONT, BRI, COL1, COL2,
    COL3) are the knobs in this order.

    Args:
        input_detail: More or less detail, at the entrance of the UNet.
        output_detail: More or less detail, in the norm before its exit.
        final_detail: More or less detail, in its last convolution.
        contrast: More or less contrast.
        brightness: Brighter or darker.
        color1: First colour axis, cyan to red in SD1.
        color2: Second colour axis, magenta to green in SD1.
        color3: Third colour axis, yellow to blue in SD1.
    """
    layer, _, part = key.removeprefix(UNET).rpartition(".")
    if key not in TOUCHED:
        return a
    if key == f"{UNET}out.2.bias":
        colors = torch.tensor(COLORS_SDXL if state else COLORS_SD, dtype=torch.float64)  # (4, 3)
        shift = torch.zeros(4, dtype=torch.float64)
        shift[0] = contrast
        shift[1:] = torch.tensor([brightness, color1, color2, color3], dtype=torch.float64) @ colors
        return a + (STEP * shift).to(a)
    detail = {"input_blocks.0.0": input_detail, "out.0": output_detail, "out.2": final_detail}[layer]
    return a * (1 + STEP * detail if part == "bias" else 1 - STEP / 2 * detail)

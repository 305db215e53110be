"""What keys, dtypes, metadata and a few small tensors tell of a model beside its architecture."""

from __future__ import annotations

from math import sqrt

from sdops.core.source import Source
from sdops.core.spec import FP8
from sdops.text import count
from sdops.verbs._values import values

# Tensors that exist only to be found: ending of the name -> what the model predicts.
_MARKERS = {
    "v_pred": "v",
    "edm_vpred.sigma_max": "EDM v (CosXL)",
    "edm_mean": "EDM (Playground 2.5)",
}
_SD2_PROBE = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
_SD2_V_SPREAD = 0.09  # ComfyUI's test: the standard deviation of that bias is larger in v models

# Ending of a name -> the scheme of quantisation that uses it.
_QUANTISED = {
    ".scale_weight": "fp8 with scales (`scale_weight`)",
    ".weight_scale": "with scales (`weight_scale`)",
    ".comfy_quant": "marked by ComfyUI (`comfy_quant`)",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes NF4",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes FP4",
    ".qweight": "packed weights (`qweight`)",
}


def prediction(source: Source, *, sd2: bool) -> list[str]:
    """What the model predicts and how that is known, strongest evidence first; empty if nothing says so.

    Args:
        source: The model.
        sd2: Whether it is an SD 2.x UNet in the original layout, where only a value tells.
    """
    found = [f"{what} (tensor `{key}`)" for key, what in _MARKERS.items() if key in source.specs]
    if "ztsnr" in source.specs:
        found.append("zero terminal SNR (tensor `ztsnr`)")
    stated = source.metadata.get("modelspec.prediction_type") or source.metadata.get("modelspec.predict_key")
    if stated:
        found.append(f"{stated} (metadata)")
    if "alphas_cumprod" in source.specs and (values(source, "alphas_cumprod") or [1.0])[-1] == 0:
        found.append("zero terminal SNR (`alphas_cumprod` ends in 0)")
    if sd2 and _SD2_PROBE in source.specs and (bias := values(source, _SD2_PROBE)):
        found.append(f"likely {'v' if _spread(bias) > _SD2_V_SPREAD else 'epsilon'} (spread of a bias)")
    return found


def _spread(numbers: list[float]) -> float:
    """Population standard deviation."""
    mean = sum(numbers) / len(numbers)
    return sqrt(sum((x - mean) ** 2 for x in numbers) / len(numbers))  # NaN if one is NaN


def quantisation(source: Source) -> list[str]:
    """The ways in which weights are stored with fewer bits, with the number of tensors."""
    found = {}
    for dtype in sorted(FP8):
        if number := sum(spec.dtype == dtype for spec in source.specs.values()):
            found[dtype] = number
    for ending, scheme in _QUANTISED.items():
        if number := sum(key.endswith(ending) for key in source.specs):
            found[scheme] = number
    lines = [f"{what}: {count(number, 'tensor')}" for what, number in found.items()]
    if "_quantization_metadata" in source.metadata:
        lines.append("described in metadata (`_quantization_metadata`)")
    return lines

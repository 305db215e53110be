"""Keys that are no part of any model: what they are called, and which odd ones must be kept all the same."""

from __future__ import annotations

import re

# The noise schedule that the first trainers stored; every program computes it anew.
SCHEDULE = frozenset({
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "logvar", "denoiser.sigmas",
    "model.model_sampling.sigmas", "model_sampling.sigmas",
})  # fmt: skip

# Tensors that say what a model is. Some are empty: their presence is the message. Never dropped.
_PREDICTION = r"(^|.*\.)(v_pred|ztsnr|edm_mean|edm_std|edm_vpred\.sigma_(max|min))$"
_MARKER = re.compile(
    _PREDICTION + r"|(^|.*\.)(scaled_fp8|difference|lora_controlnet|control_type"
    r"|pixel_space_vae|__\w+__|spiece_model|tekken_model)$|cc_projection\."
)
_TRAINING = re.compile(
    r"^(optimizer_states|lr_schedulers|callbacks|loops|hyper_parameters|global_step|epoch|accum_.*)(\.|$)|_extra_state$"
)


def is_ema(key: str) -> bool:
    """Whether the key belongs to the moving average that training keeps beside the UNet."""
    return key.startswith("model_ema.")


def is_schedule(key: str) -> bool:
    """Whether the key is a part of the stored noise schedule."""
    return key in SCHEDULE


def is_position_ids(key: str) -> bool:
    """Whether the key holds the positions 0..76 of a CLIP text encoder."""
    return key.endswith("embeddings.position_ids")


def is_marker(key: str) -> bool:
    """Whether the tensor, often an empty one, says what the model is and must be kept."""
    return _MARKER.match(key) is not None


def is_prediction(key: str) -> bool:
    """Whether the tensor says what the model predicts."""
    return re.match(_PREDICTION, key) is not None


def ema_key_of(key: str) -> str:
    """Where the moving average of a UNet key is stored: its name without dots.

    `model.diffusion_model.out.0.bias` -> `model_ema.diffusion_modelout0bias`. No two keys of a UNet collide.
    """
    return "model_ema." + key.removeprefix("model.").replace(".", "")


def junk_kind(key: str) -> str | None:
    """What sort of left-over the key is: ema, schedule, training, loss, logit_scale, duplicate; None if it is none."""
    if is_ema(key):
        return "ema"
    if is_schedule(key):
        return "schedule"
    if key.startswith(("first_stage_model.loss.", "loss.")):
        return "loss"
    if key.startswith(("embedding_manager.", "model.embedding_manager.")) or _TRAINING.search(key):
        return "training"
    if key.startswith("text_encoders.") and key.endswith(".logit_scale"):
        return "logit_scale"
    if key.endswith("encoder.embed_tokens.weight"):  # T5: the same values as `shared.weight`
        return "duplicate"
    return None

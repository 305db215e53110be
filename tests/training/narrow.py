"""Models of the real depth and narrow widths, with random weights, as folders of diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fixtures.tiny_sd import SCHEDULER

UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"block_out_channels": (32, 32, 64, 64), "cross_attention_dim": 32, "attention_head_dim": 8},
    "sd2": {
        "block_out_channels": (64, 64, 64, 64),
        "cross_attention_dim": 64,
        "attention_head_dim": (1, 1, 1, 1),
        "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": (32, 32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (1, 1, 1),
        "cross_attention_dim": 96,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 * 256 + 64,
    },
}
# Width, layers, activation, projected.
ENCODERS = {
    "sd1": {"text_encoder": (32, 12, "quick_gelu", False)},
    "sd2": {"text_encoder": (64, 23, "gelu", False)},
    "sdxl": {"text_encoder": (32, 12, "quick_gelu", False), "text_encoder_2": (64, 32, "gelu", True)},
}
PIPELINES = {"sd1": "StableDiffusionPipeline", "sd2": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}


def folder(family: str, path: Path, prediction: str = "epsilon") -> Path:
    """A model of the family; pictures of 64 x 64."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    UNet2DConditionModel(sample_size=8, **UNETS[family]).half().save_pretrained(path / "unet")
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=64,
        scaling_factor=0.13025 if family == "sdxl" else 0.18215,
    )
    vae.half().save_pretrained(path / "vae")
    index = {"_class_name": PIPELINES[family], "_diffusers_version": "0.36.0"}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    for name, (width, layers, act, projected) in ENCODERS[family].items():
        config = CLIPTextConfig(
            hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, hidden_act=act,
            num_attention_heads=max(1, width // 64), projection_dim=width, vocab_size=49408,
        )  # fmt: skip
        kind = CLIPTextModelWithProjection if projected else CLIPTextModel
        kind(config).half().save_pretrained(path / name)
        index[name] = ["transformers", kind.__name__]
    (path / "scheduler").mkdir()
    scheduler = {**SCHEDULER, "prediction_type": "v_prediction" if prediction == "v" else "epsilon"}
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    (path / "model_index.json").write_text(json.dumps(index))
    return path

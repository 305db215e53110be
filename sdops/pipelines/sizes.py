"""Configurations of diffusers' and transformers' classes, read from the sizes of their tensors.

Only what differs from the class's default is written. Names are those of diffusers' layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isqrt
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]
Config = dict[str, Any]

_HEAD = 64  # channels of an attention head of U-Nets and CLIP; not in any shape


def config(class_name: str, shapes: Shapes, fixed: Config) -> Config | None:
    """The configuration of a class, or None if nothing is known about it.

    Args:
        class_name: E.g. `UNet2DConditionModel`.
        shapes: Tensor name -> shape.
        fixed: What sizes do not tell; goes before what is read from them.

    Raises:
        KeyError: a tensor that is needed for it is missing.
    """
    if class_name not in _READERS:
        return None
    return _READERS[class_name](shapes) | fixed


def _count(shapes: Shapes, prefix: str) -> int:
    """How many numbers follow the prefix in names: `down_blocks.` -> 4."""
    return len({key[len(prefix) :].split(".", 1)[0] for key in shapes if key.startswith(prefix)})


# ---------------------------------------------------------------------------------------------------------------- U-Net


def _unet(shapes: Shapes) -> Config:
    depths, up = _depths(shapes, "down_blocks"), _depths(shapes, "up_blocks")
    found = _levels(shapes, depths)
    found |= {
        "out_channels": shapes["conv_out.weight"][0],
        "up_block_types": ["CrossAttnUpBlock2D" if any(level) else "UpBlock2D" for level in up],
        "mid_block_type": _middle(shapes),
    }
    ways = [[_plain(level) for level in levels] for levels in (depths, up)]
    if ways[0] != ways[1][::-1]:  # a distilled model: not the same on the way up
        found["transformer_layers_per_block"], found["reverse_transformer_layers_per_block"] = ways
    return found


def _controlnet(shapes: Shapes) -> Config:
    embedding = [f"controlnet_cond_embedding.{name}.weight" for name in ("conv_in", "blocks.1", "blocks.3", "blocks.5")]
    return _levels(shapes, _depths(shapes, "down_blocks")) | {
        "conditioning_channels": shapes[embedding[0]][1],
        "conditioning_embedding_out_channels": [shapes[name][0] for name in embedding],
    }


def _levels(shapes: Shapes, depths: list[list[int]]) -> Config:
    """What a U-Net and its ControlNet have in common."""
    channels = [shapes[f"down_blocks.{level}.resnets.0.conv1.weight"][0] for level in range(len(depths))]
    cross = next(key for key in shapes if key.endswith("attn2.to_k.weight"))
    projection = next(shape for key, shape in shapes.items() if key.endswith(".proj_in.weight"))
    found: Config = {
        "in_channels": shapes["conv_in.weight"][1],
        "block_out_channels": channels,
        "down_block_types": ["CrossAttnDownBlock2D" if any(level) else "DownBlock2D" for level in depths],
        "layers_per_block": _count(shapes, "down_blocks.0.resnets."),
        "cross_attention_dim": shapes[cross][1],
        "attention_head_dim": [max(1, width // _HEAD) for width in channels],
        "use_linear_projection": len(projection) == 2,
        "transformer_layers_per_block": _uniform(depths),
    }
    if "add_embedding.linear_1.weight" in shapes:
        found["projection_class_embeddings_input_dim"] = shapes["add_embedding.linear_1.weight"][1]
    if "class_embedding.linear_1.weight" in shapes:
        found["class_embed_type"] = "projection"
        found["projection_class_embeddings_input_dim"] = shapes["class_embedding.linear_1.weight"][1]
    if "time_embedding.cond_proj.weight" in shapes:
        found["time_cond_proj_dim"] = shapes["time_embedding.cond_proj.weight"][1]
    return found


def _depths(shapes: Shapes, blocks: str) -> list[list[int]]:
    """Transformer blocks of every attention of every level."""
    return [
        [
            _count(shapes, f"{blocks}.{level}.attentions.{index}.transformer_blocks.")
            for index in range(_count(shapes, f"{blocks}.{level}.attentions."))
        ]
        for level in range(_count(shapes, f"{blocks}."))
    ]


def _uniform(depths: list[list[int]]) -> int | list[int]:
    """One depth per level; a single number where all levels agree. Levels without attention do not matter."""
    numbers = [max(level, default=0) for level in depths]
    used = {number for number in numbers if number}
    return used.pop() if len(used) == 1 else [max(number, 1) for number in numbers]


def _plain(level: list[int]) -> int | list[int]:
    return level[0] if len(set(level)) == 1 else level or 1


def _middle(shapes: Shapes) -> str | None:
    if not _count(shapes, "mid_block."):
        return None
    return "UNetMidBlock2DCrossAttn" if _count(shapes, "mid_block.attentions.") else "UNetMidBlock2D"


# ------------------------------------------------------------------------------------------ VAE and text encoders


def _vae(shapes: Shapes) -> Config:
    levels = _count(shapes, "decoder.up_blocks.")
    channels = [shapes[f"decoder.up_blocks.{level}.resnets.0.conv1.weight"][0] for level in reversed(range(levels))]
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": channels,
        "layers_per_block": _count(shapes, "decoder.up_blocks.0.resnets.") - 1,
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def _clip(shapes: Shapes) -> Config:
    vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
    return {
        "model_type": "clip_text_model",
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 2,  # as published: the end is then found as the largest number in the text
        "pad_token_id": 1,
        "hidden_size": width,
        "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
        "num_attention_heads": max(1, width // _HEAD),
        "num_hidden_layers": _count(shapes, "text_model.encoder.layers."),
        "projection_dim": shapes.get("text_projection.weight", (width,))[0],
        "vocab_size": vocabulary,
    }


def _t5(shapes: Shapes) -> Config:
    vocabulary, width = shapes["shared.weight"]
    buckets, heads = shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    layers = _count(shapes, "encoder.block.")
    umt5 = layers > 1 and "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight" in shapes
    return {
        "model_type": "umt5" if umt5 else "t5",
        "d_ff": shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        "d_kv": shapes["encoder.block.0.layer.0.SelfAttention.q.weight"][0] // heads,
        "d_model": width,
        "dropout_rate": 0.1,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "layer_norm_epsilon": 1e-06,
        "num_heads": heads,
        "num_layers": layers,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": buckets,
        "tie_word_embeddings": False,
        "vocab_size": vocabulary,
    }


# --------------------------------------------------------------------------------------------------------- transformers


def _sd3(shapes: Shapes) -> Config:
    width, channels, patch, _ = shapes["pos_embed.proj.weight"]
    layers = _count(shapes, "transformer_blocks.")
    return {
        "in_channels": channels,
        "patch_size": patch,
        "num_layers": layers,
        "attention_head_dim": _HEAD,
        "num_attention_heads": max(1, width // _HEAD),
        "caption_projection_dim": width,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "pos_embed_max_size": isqrt(shapes["pos_embed.pos_embed"][1]),
        "qk_norm": "rms_norm" if "transformer_blocks.0.attn.norm_q.weight" in shapes else None,
        "dual_attention_layers": [i for i in range(layers) if f"transformer_blocks.{i}.attn2.to_q.weight" in shapes],
    }


def _flux(shapes: Shapes) -> Config:
    return _streams(shapes) | {
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
    }


def _chroma(shapes: Shapes) -> Config:
    hidden, channels = shapes["distilled_guidance_layer.in_proj.weight"]
    return _streams(shapes) | {
        "approximator_hidden_dim": hidden,
        "approximator_layers": _count(shapes, "distilled_guidance_layer.layers."),
        "approximator_num_channels": channels,
    }


def _flux2(shapes: Shapes) -> Config:
    width = shapes["x_embedder.weight"][0]
    return _streams(shapes) | {
        "guidance_embeds": "time_guidance_embed.guidance_embedder.linear_1.weight" in shapes,
        "timestep_guidance_channels": shapes["time_guidance_embed.timestep_embedder.linear_1.weight"][1],
        "mlp_ratio": shapes["transformer_blocks.0.ff.linear_out.weight"][1] / width,
    }


def _streams(shapes: Shapes) -> Config:
    """What the Flux family has in common: blocks of two streams, then of one."""
    width, channels = shapes["x_embedder.weight"]
    head, out = shapes["transformer_blocks.0.attn.norm_q.weight"][0], shapes["proj_out.weight"][0]
    return {
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": None if out == channels else out,
        "num_layers": _count(shapes, "transformer_blocks."),
        "num_single_layers": _count(shapes, "single_transformer_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
    }


def _z_image(shapes: Shapes) -> Config:
    width, patch = shapes["all_x_embedder.2-1.weight"]
    head = shapes["layers.0.attention.norm_q.weight"][0]
    return {
        "in_channels": patch // 4,
        "dim": width,
        "n_layers": _count(shapes, "layers."),
        "n_refiner_layers": _count(shapes, "noise_refiner."),
        "n_heads": width // head,
        "n_kv_heads": shapes["layers.0.attention.to_k.weight"][0] // head,
        "cap_feat_dim": shapes["cap_embedder.0.weight"][0],
    }


def _lumina2(shapes: Shapes) -> Config:
    width, patch = shapes["x_embedder.weight"]
    head = shapes["layers.0.attn.norm_q.weight"][0]
    return {
        "in_channels": patch // 4,
        "hidden_size": width,
        "num_layers": _count(shapes, "layers."),
        "num_refiner_layers": _count(shapes, "noise_refiner."),
        "num_attention_heads": width // head,
        "num_kv_heads": shapes["layers.0.attn.to_k.weight"][0] // head,
        "cap_feat_dim": shapes["time_caption_embed.caption_embedder.0.weight"][0],
    }


def _wan(shapes: Shapes) -> Config:
    width, channels, *patch = shapes["patch_embedding.weight"]
    head = 128
    image = shapes.get("condition_embedder.image_embedder.norm1.weight")
    return {
        "patch_size": patch,
        "num_attention_heads": max(1, width // head),
        "attention_head_dim": min(head, width),
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // (patch[0] * patch[1] * patch[2]),
        "text_dim": shapes["condition_embedder.text_embedder.linear_1.weight"][1],
        "freq_dim": shapes["condition_embedder.time_embedder.linear_1.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.net.0.proj.weight"][0],
        "num_layers": _count(shapes, "blocks."),
        "image_dim": image[0] if image else None,
        "added_kv_proj_dim": width if "blocks.0.attn2.add_k_proj.weight" in shapes else None,
    }


def _qwen_image(shapes: Shapes) -> Config:
    width, channels = shapes["img_in.weight"]
    head = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    return {
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // 4,
        "num_layers": _count(shapes, "transformer_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "zero_cond_t": "__index_timestep_zero__" in shapes,
        "use_additional_t_cond": "time_text_embed.addition_t_embedding.weight" in shapes,
    }


_READERS: dict[str, Callable[[Shapes], Config]] = {
    "UNet2DConditionModel": _unet,
    "ControlNetModel": _controlnet,
    "AutoencoderKL": _vae,
    "CLIPTextModel": _clip,
    "CLIPTextModelWithProjection": _clip,
    "T5EncoderModel": _t5,
    "UMT5EncoderModel": _t5,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "ChromaTransformer2DModel": _chroma,
    "Flux2Transformer2DModel": _flux2,
    "ZImageTransformer2DModel": _z_image,
    "Lumina2Transformer2DModel": _lumina2,
    "WanTransformer3DModel": _wan,
    "QwenImageTransformer2DModel": _qwen_image,
}

"""The shelf of pipelines: every file, and the configurations of real models."""

from __future__ import annotations

import json

import pytest

from fixtures import make
from sdops.archs.tables import tables as arch_tables
from sdops.pipelines import sizes, tables
from sdops.pipelines.tokenizer import clip_files, vocabulary

FAMILIES = sorted(path.stem for path in tables.FOLDER.glob("*.toml"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_keeps_the_contract(family):
    found = tables.pipeline(family)
    assert found is not None
    assert found.components
    known = {(table.name, table.layout) for table in arch_tables()}
    folders = [each.folder for each in found.components.values()]
    assert len(set(folders)) == len(folders) or family == "text_encoder"
    for name, each in found.components.items():
        assert (name, each.layout) in known
        assert each.prefix.endswith(".")
        with pytest.raises((KeyError, StopIteration, ValueError)):
            sizes.config(each.class_name, {}, {})
    if found.class_name:
        assert found.scheduler["class"].endswith("Scheduler")
        assert all({"folder", "class", "kind"} <= table.keys() for table in found.tokenizers)


def test_a_variant_changes_what_it_says():
    plain, v = tables.pipeline("sd2"), tables.pipeline("sd2", ["inpainting", "v"])
    assert plain
    assert v
    assert (plain.class_name, v.class_name) == ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline")
    assert (plain.scheduler["prediction_type"], v.scheduler["prediction_type"]) == ("epsilon", "v_prediction")
    assert plain.scheduler["beta_end"] == v.scheduler["beta_end"]
    assert (plain.components["unet"].config["sample_size"], v.components["unet"].config["sample_size"]) == (64, 96)
    assert tables.pipeline("nothing") is None


# What the published config.json of these models say.
PUBLISHED = {
    ("sd15-diffusers", "unet", "UNet2DConditionModel"): {
        "block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768, "in_channels": 4, "out_channels": 4,
        "layers_per_block": 2, "use_linear_projection": False, "transformer_layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, "mid_block_type": "UNetMidBlock2DCrossAttn",
    },
    ("sd21-diffusers", "unet", "UNet2DConditionModel"): {
        "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True,
    },
    ("sdxl-base-diffusers", "unet", "UNet2DConditionModel"): {
        "attention_head_dim": [5, 10, 20], "transformer_layers_per_block": [1, 2, 10], "cross_attention_dim": 2048,
        "projection_class_embeddings_input_dim": 2816,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    },
    ("sdxl-refiner-diffusers", "unet", "UNet2DConditionModel"): {
        "attention_head_dim": [6, 12, 24, 24], "transformer_layers_per_block": 4, "cross_attention_dim": 1280,
        "projection_class_embeddings_input_dim": 2560, "block_out_channels": [384, 768, 1536, 1536],
    },
    ("sd15-diffusers", "vae", "AutoencoderKL"): {
        "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4, "use_quant_conv": True,
    },
    ("flux1-dev-diffusers", "vae", "AutoencoderKL"): {"latent_channels": 16, "use_quant_conv": False},
    ("sd15-diffusers", "text_encoder", "CLIPTextModel"): {
        "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
        "vocab_size": 49408, "max_position_embeddings": 77, "projection_dim": 768,
    },
    ("sd21-diffusers", "text_encoder", "CLIPTextModel"): {
        "hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 23,
    },
    ("sdxl-base-diffusers", "text_encoder_2", "CLIPTextModelWithProjection"): {
        "hidden_size": 1280, "num_attention_heads": 20, "num_hidden_layers": 32, "projection_dim": 1280,
    },
    ("flux1-dev-diffusers", "text_encoder_2", "T5EncoderModel"): {
        "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 32128,
        "relative_attention_num_buckets": 32, "model_type": "t5",
    },
    ("sd3-medium-diffusers", "transformer", "SD3Transformer2DModel"): {
        "num_layers": 24, "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048, "pos_embed_max_size": 192, "qk_norm": None, "dual_attention_layers": [],
    },
    ("sd35-medium-diffusers", "transformer", "SD3Transformer2DModel"): {
        "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": list(range(13)),
    },
    ("sd35-large-diffusers", "transformer", "SD3Transformer2DModel"): {"num_layers": 38, "num_attention_heads": 38},
    ("flux1-dev-diffusers", "transformer", "FluxTransformer2DModel"): {
        "attention_head_dim": 128, "num_attention_heads": 24, "num_layers": 19, "num_single_layers": 38,
        "guidance_embeds": True, "in_channels": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
    },
    ("chroma-diffusers-transformer", "", "ChromaTransformer2DModel"): {
        "approximator_num_channels": 64, "approximator_hidden_dim": 5120, "approximator_layers": 5, "num_layers": 19,
    },
    ("flux2-dev-diffusers-transformer", "", "Flux2Transformer2DModel"): {
        "in_channels": 128, "num_layers": 8, "num_single_layers": 48, "num_attention_heads": 48, "mlp_ratio": 3.0,
        "joint_attention_dim": 15360, "timestep_guidance_channels": 256, "guidance_embeds": True,
    },
    ("z-image-diffusers-transformer", "", "ZImageTransformer2DModel"): {
        "dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30, "cap_feat_dim": 2560,
        "in_channels": 16,
    },
    ("lumina2-diffusers-transformer", "", "Lumina2Transformer2DModel"): {
        "hidden_size": 2304, "num_layers": 26, "num_attention_heads": 24, "num_kv_heads": 8, "cap_feat_dim": 1024,
    },
    ("wan21-t2v-14b-diffusers-transformer", "", "WanTransformer3DModel"): {
        "num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824, "in_channels": 16, "out_channels": 16,
        "patch_size": [1, 2, 2], "text_dim": 4096, "freq_dim": 256, "image_dim": None,
    },
    ("qwen-image-diffusers-transformer", "", "QwenImageTransformer2DModel"): {
        "num_layers": 60, "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 3584,
        "in_channels": 64, "out_channels": 16,
    },
    ("controlnet-sd15-diffusers", "", "ControlNetModel"): {
        "conditioning_channels": 3, "conditioning_embedding_out_channels": [16, 32, 96, 256],
        "block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768,
    },
    ("controlnet-sdxl-diffusers", "", "ControlNetModel"): {
        "transformer_layers_per_block": [1, 2, 10], "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "folder", "kind"), PUBLISHED, ids=lambda value: value or "alone")
def test_sizes_tell_what_is_published(name, folder, kind):
    start = f"{folder}/" if folder else ""
    shapes = {key.removeprefix(start): shape for key, (_, shape) in make.specs(name).items() if key.startswith(start)}
    found = sizes.config(kind, shapes, {})
    assert found is not None
    wanted = PUBLISHED[name, folder, kind]
    assert {key: found[key] for key in wanted} == wanted


def test_a_distilled_unet_is_not_the_same_on_the_way_up():
    shapes = {key.removeprefix("unet/"): shape for key, (_, shape) in make.specs("sdxl-base-diffusers").items()}
    shapes = {
        key: shape
        for key, shape in shapes.items()
        if not (key.startswith("mid_block.attentions") or "down_blocks.2.attentions.0.transformer_blocks.9" in key)
        and not (key.startswith("up_blocks.0.attentions.0.") and "transformer_blocks.9" in key)
    }
    found = sizes.config("UNet2DConditionModel", shapes, {})
    assert found is not None
    assert found["mid_block_type"] == "UNetMidBlock2D"
    assert found["transformer_layers_per_block"] == [1, 2, [9, 10]]
    assert found["reverse_transformer_layers_per_block"] == [[9, 10, 10], 2, 1]


def test_the_vocabulary_follows_from_the_merges():
    files = clip_files("!")
    tokens = json.loads(files["vocab.json"])
    assert len(tokens) == 49408
    assert [tokens[word] for word in ("!", "the</w>", "cat</w>", "<|startoftext|>", "<|endoftext|>")] == [
        0, 518, 2368, 49406, 49407,
    ]  # fmt: skip
    assert vocabulary(files["merges.txt"].decode()) == tokens
    assert json.loads(files["tokenizer_config.json"])["pad_token"] == "!"

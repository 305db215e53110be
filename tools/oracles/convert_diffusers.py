"""Compare conversions with diffusers: its own loaders on our files, and its pipelines on our folders.

    python tools/oracles/convert_diffusers.py

Needs torch, diffusers, transformers, accelerate and safetensors, and sdops beside this file; no network. Tiny models
with random weights and the real depth are made from configurations. Of each
1. `from_pretrained` loads the folder that sdops writes from the single file, and every tensor is that of the model it
   came from, bit for bit; the pipeline gives the same picture;
2. `from_single_file`, told the configuration, loads the single file that sdops writes from the folder that diffusers
   saved, bit for bit.

Where diffusers has no `from_single_file` for a whole pipeline without downloads, or its converter knows one width only,
denoisers are compared alone: of true width with one or two blocks (Flux 3072, 1.1 GB in bf16), or narrow and deep.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from diffusers import (  # noqa: E402
    AutoencoderKL,
    ChromaTransformer2DModel,
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Transformer2DModel,
    PNDMScheduler,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers  # noqa: E402
from transformers import (  # noqa: E402
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from sdops.pipelines.tokenizer import clip_files  # noqa: E402

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def tokenizer(folder: Path, pad: str) -> CLIPTokenizer:
    """CLIP's tokenizer, from the files that sdops writes."""
    folder.mkdir()
    for name, data in clip_files(pad).items():
        (folder / name).write_bytes(data)
    return CLIPTokenizer.from_pretrained(folder)


def clip(width: int, layers: int, act: str, *, projection: bool) -> CLIPTextModel:
    """A narrow CLIP text encoder."""
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        hidden_act=act,
        projection_dim=width,
        vocab_size=49408,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5(width: int) -> T5EncoderModel:
    """A narrow T5 encoder."""
    return T5EncoderModel(
        T5Config(
            d_model=width, d_kv=8, d_ff=2 * width, num_layers=24, num_heads=4, vocab_size=128,
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip


def t5_tokenizer(folder: Path) -> T5Tokenizer:
    """A small T5 tokenizer, trained on these lines: T5's own does not come with sdops."""
    learned = Tokenizer(models.Unigram())
    learned.pre_tokenizer, learned.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=100, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>")
    learned.train_from_iterator([Path(__file__).read_text()], trainer)
    learned.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir()
    learned.save(str(folder / "tokenizer.json"))
    return T5Tokenizer.from_pretrained(folder, model_max_length=512)


def vae(channels: int = 4, *, quant: bool = True, **config: float) -> AutoencoderKL:
    """A narrow VAE."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=channels,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        sample_size=64,
        **config,
    )


def unet(**config: object) -> UNet2DConditionModel:
    """A U-Net for pictures of 64 x 64."""
    return UNet2DConditionModel(sample_size=8, **config)


def sd1(scratch: Path) -> StableDiffusionPipeline:
    """Stable Diffusion 1."""
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(64, 12, "quick_gelu", projection=False),
        tokenizer=tokenizer(scratch / "t", "<|endoftext|>"),
        unet=unet(block_out_channels=(32, 64, 128, 128), cross_attention_dim=64, attention_head_dim=8),
        scheduler=PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd2(scratch: Path) -> StableDiffusionPipeline:
    """Stable Diffusion 2."""
    pipeline = sd1(scratch)
    pipeline.register_modules(
        tokenizer=tokenizer(scratch / "t2", "!"),
        scheduler=DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        text_encoder=clip(128, 23, "gelu", projection=False),
        unet=unet(
            block_out_channels=(64, 64, 128, 128),
            cross_attention_dim=128,
            attention_head_dim=(1, 1, 2, 2),
            use_linear_projection=True,
        ),
    )
    return pipeline


def xl_unet(pooled: int, cross: int, **config: object) -> UNet2DConditionModel:
    """A U-Net with SDXL's second condition."""
    return unet(
        cross_attention_dim=cross,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        **config,
        projection_class_embeddings_input_dim=pooled,
    )


def sdxl(scratch: Path) -> StableDiffusionXLPipeline:
    """Stable Diffusion XL."""
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(64, 12, "quick_gelu", projection=False),
        text_encoder_2=clip(128, 32, "gelu", projection=True),
        tokenizer=tokenizer(scratch / "t", "<|endoftext|>"),
        tokenizer_2=tokenizer(scratch / "t2", "!"),
        unet=xl_unet(
            6 * 256 + 128,
            192,
            block_out_channels=(32, 64, 128),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(1, 1, 2),
        ),
        scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
    )


def refiner(scratch: Path) -> StableDiffusionXLImg2ImgPipeline:
    """The refiner of Stable Diffusion XL."""
    return StableDiffusionXLImg2ImgPipeline(
        vae=vae(),
        text_encoder=None,
        text_encoder_2=clip(128, 32, "gelu", projection=True),
        tokenizer=None,
        tokenizer_2=tokenizer(scratch / "t2", "!"),
        unet=xl_unet(
            5 * 256 + 128,
            128,
            block_out_channels=(32, 64, 128, 128),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=4,
            attention_head_dim=(1, 1, 2, 2),
        ),
        scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
    )


def sd3(scratch: Path) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3."""
    pipeline = sd3_without_t5(scratch)
    pipeline.register_modules(text_encoder_3=t5(192), tokenizer_3=t5_tokenizer(scratch / "t5"))
    return pipeline


def sd3_without_t5(scratch: Path, **config: object) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3 as most files have it."""
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8, num_layers=24, num_attention_heads=2, attention_head_dim=64, caption_projection_dim=128,
            joint_attention_dim=192, pooled_projection_dim=192, pos_embed_max_size=16, **config,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(16, quant=False, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=clip(64, 12, "quick_gelu", projection=True),
        tokenizer=tokenizer(scratch / "t", "<|endoftext|>"),
        text_encoder_2=clip(128, 32, "gelu", projection=True),
        tokenizer_2=tokenizer(scratch / "t2", "!"),
        text_encoder_3=None,
        tokenizer_3=None,
    )  # fmt: skip


def sd35(scratch: Path) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3.5 medium without T5."""
    return sd3_without_t5(scratch, qk_norm="rms_norm", dual_attention_layers=tuple(range(13)))


def flux(scratch: Path) -> FluxPipeline:
    """Flux.1."""
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            num_layers=19, num_single_layers=38, attention_head_dim=128, num_attention_heads=1, joint_attention_dim=32,
            pooled_projection_dim=64, guidance_embeds=True,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae(16, quant=False, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=clip(64, 12, "quick_gelu", projection=False),
        tokenizer=tokenizer(scratch / "t", "<|endoftext|>"),
        text_encoder_2=t5(32),
        tokenizer_2=t5_tokenizer(scratch / "t5"),
    )  # fmt: skip


def convert(*arguments: object) -> None:
    """sdops as its users start it."""
    subprocess.run([sys.executable, "-m", "sdops", "convert", *map(str, arguments)], check=True, cwd=ROOT,
                   stdout=subprocess.DEVNULL)  # fmt: skip


def modules(pipeline: object) -> dict[str, torch.nn.Module]:
    """The parts of a pipeline that have weights."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def differences(left: object, right: object) -> tuple[int, list[str]]:
    """Number of tensors, and those that are not equal bit for bit."""
    total, wrong = 0, []
    there = modules(right)
    for part, module in modules(left).items():
        if part not in there:
            wrong.append(part)
            continue
        own, other = module.state_dict(), there[part].state_dict()
        total += len(own)
        wrong += [f"{part}.{key}" for key in own.keys() ^ other.keys()]
        wrong += [f"{part}.{key}" for key in own.keys() & other.keys() if not torch.equal(own[key], other[key])]
    return total, wrong


def picture(pipeline: object, family: str) -> torch.Tensor:
    """What the pipeline makes of a prompt, in two steps, before the VAE."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    given: dict[str, object] = {"num_inference_steps": 2, "generator": generator, "output_type": "latent"}
    if family == "refiner":
        given |= {"image": torch.zeros(1, 4, 8, 8), "strength": 1.0}
    else:
        given |= {"height": 64, "width": 64}
    return pipeline("a photo of a cat, 42 whiskers", **given).images


def compare(family: str) -> bool:
    """Both ways of a family; returns whether all is as it should be."""
    torch.manual_seed(0)
    scratch = Path(tempfile.mkdtemp())
    try:
        tiny = globals()[family](scratch)
        for module in modules(tiny).values():
            module.eval()
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, std=0.05)
        tiny.save_pretrained(scratch / "theirs")
        single = scratch / "single.safetensors"
        convert(scratch / "theirs", "--to", "original", "-o", single)
        theirs = ["--tokenizer", scratch / "t5" / "tokenizer.json"] if (scratch / "t5").is_dir() else []
        convert(single, "--to", "diffusers", "-o", scratch / "ours", *theirs)
        kind = type(tiny)
        given = {"text_encoder_3": None, "tokenizer_3": None} if family == "sd35" else {}
        ours = kind.from_pretrained(scratch / "ours", local_files_only=True, **given)
        total, wrong = differences(tiny, ours)
        expected = picture(tiny, family)
        if not expected.isfinite().all():
            print(f"{family:8} the picture is not finite: it shows nothing")
        # Loaded weights lie at other addresses, for which matrix products may sum in another order.
        same = torch.allclose(expected, picture(ours, family), rtol=0, atol=1e-5 * float(expected.abs().max()))
        print(f"{family:8} folder       {total:5} tensors, {len(wrong)} differ {wrong[:3]}; same picture: {same}")
        fine = not wrong and same
        if family not in ("flux", "sd3", "sd35"):  # diffusers' converters of these know only the real widths
            theirs = kind.from_single_file(
                str(single), config=str(scratch / "theirs"), local_files_only=True, torch_dtype=torch.float32
            )
            total, wrong = differences(tiny, theirs)
            print(f"{family:8} single file  {total:5} tensors, {len(wrong)} differ {wrong[:3]}")
            fine = fine and not wrong
        return fine
    finally:
        shutil.rmtree(scratch)


# Name -> class and configuration of a denoiser that is compared alone.
ALONE = {
    "flux-wide": (FluxTransformer2DModel, {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True}),
    "chroma-wide": (ChromaTransformer2DModel, {"num_layers": 1, "num_single_layers": 1}),
    "sd3-alone": (
        SD3Transformer2DModel,
        {"sample_size": 8, "num_layers": 24, "num_attention_heads": 2, "caption_projection_dim": 128,
         "joint_attention_dim": 192, "pooled_projection_dim": 192, "pos_embed_max_size": 16},
    ),
    "sd35-alone": (
        SD3Transformer2DModel,
        {"sample_size": 8, "num_layers": 24, "num_attention_heads": 2, "caption_projection_dim": 128,
         "joint_attention_dim": 192, "pooled_projection_dim": 192, "pos_embed_max_size": 16, "qk_norm": "rms_norm",
         "dual_attention_layers": tuple(range(13))},
    ),
    "flux2-alone": (
        Flux2Transformer2DModel,
        {"num_layers": 8, "num_single_layers": 48, "num_attention_heads": 1, "joint_attention_dim": 96},
    ),
    "z-image-alone": (
        ZImageTransformer2DModel,
        {"dim": 128, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 1, "n_kv_heads": 1, "cap_feat_dim": 64},
    ),
    "lumina2-alone": (
        Lumina2Transformer2DModel,
        {"hidden_size": 2304, "num_layers": 1, "num_refiner_layers": 1, "num_attention_heads": 24, "num_kv_heads": 8,
         "cap_feat_dim": 64},
    ),
    "wan-alone": (WanTransformer3DModel, {"num_attention_heads": 1, "num_layers": 30, "ffn_dim": 192, "text_dim": 96}),
    "qwen-alone": (
        QwenImageTransformer2DModel,
        {"num_layers": 60, "num_attention_heads": 1, "joint_attention_dim": 96},
    ),
    "controlnet": (
        ControlNetModel,
        {"block_out_channels": (32, 64, 128, 128), "cross_attention_dim": 64, "attention_head_dim": 8},
    ),
}  # fmt: skip


def compare_alone(name: str) -> bool:
    """Both ways of a denoiser or ControlNet; returns whether all is as it should be."""
    kind, config = ALONE[name]
    torch.manual_seed(0)
    scratch = Path(tempfile.mkdtemp())
    try:
        model = kind(**config).to(torch.bfloat16)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        model.save_pretrained(scratch / "theirs")
        single = scratch / "single.safetensors"
        convert(scratch / "theirs", "--to", "original", "-o", single)
        convert(single, "--to", "diffusers", "-o", scratch / "ours")
        found = {"folder": kind.from_pretrained(scratch / "ours", local_files_only=True, torch_dtype=torch.bfloat16)}
        try:
            found["single file"] = kind.from_single_file(
                str(single), config=str(scratch / "theirs"), local_files_only=True, torch_dtype=torch.bfloat16
            )
        except (AttributeError, ValueError) as error:  # diffusers cannot read single files of it
            print(f"{name:14} single file: diffusers says {str(error).splitlines()[0][:90]}")
        fine = True
        for what, other in found.items():
            own, theirs = model.state_dict(), other.state_dict()
            wrong = [key for key in own.keys() | theirs.keys() if not equal(own.get(key), theirs.get(key))]
            print(f"{name:14} {what:12} {len(own):5} tensors, {len(wrong)} differ {wrong[:3]}")
            fine = fine and not wrong
        return fine
    finally:
        shutil.rmtree(scratch)


def equal(left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    """Bit for bit; modules that diffusers keeps in fp32 hold the same values."""
    return left is not None and right is not None and torch.equal(left.float(), right.float())


if __name__ == "__main__":
    names = sys.argv[1:] or ["sd1", "sd2", "sdxl", "refiner", "sd3", "sd35", "flux", *ALONE]
    results = [compare_alone(name) if name in ALONE else compare(name) for name in names]
    sys.exit(not all(results))

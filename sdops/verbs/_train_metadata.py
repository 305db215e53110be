"""What the header of a trained LoRA says: kohya's `ss_*`, which every program shows, and ModelSpec."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from math import sqrt
from typing import Any

from sdops import __version__
from sdops.trainers import trainer
from sdops.training.product import Layer, Product
from sdops.verbs._provenance import RECIPE
from sdops.verbs._train_plan import Course

_KOHYA, _LYCORIS = "networks.lora", "lycoris.kohya"
_BASES = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
_ARCHITECTURES = {"sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2", "sdxl": "stable-diffusion-xl-v1-base"}


def header(course: Course, steps: int, product: Product) -> dict[str, str]:
    """Everything about the run that is nobody's secret: no folders. Without dates, so equal runs give equal files."""
    found = {
        "format": "pt",
        **_network(product),
        **_training(course, steps, product),
        **_data(course),
        **_modelspec(course),
    }
    return found | recipe_of(course, steps)


def recipe_of(course: Course, steps: int) -> dict[str, str]:
    """How the file was made: the entry that every output of sdops has."""
    recipe = {"version": __version__, "verb": "train", "method": course.method, "steps": steps}
    fixed = {**course.config.fixed(), "batch": course.plan.batch}
    recipe["settings"] = {name: value for name, value in fixed.items() if name not in _FOLDERS}
    return {RECIPE: json.dumps(recipe, ensure_ascii=False, separators=(",", ":"))}


_FOLDERS = ("model", "images", "masks", "class_images", "image_encoder")


def _network(product: Product) -> dict[str, str]:
    """As kohya-ss and LyCORIS say it: rank and alpha of linear layers, `conv_dim` and `conv_alpha` of 3x3 ones."""
    family = product.layers[0].family
    if family == "full":
        return {"ss_network_module": _LYCORIS, "ss_network_args": json.dumps({"algo": "full"})}
    wide = [layer for layer in product.layers if _is_convolution(layer.parts)]
    linear = [layer for layer in product.layers if not _is_convolution(layer.parts)]
    args: dict[str, str] = {} if family == "lora" else {"algo": family}
    if wide:
        args |= {"conv_dim": _only(_rank(each.parts) for each in wide), "conv_alpha": _only(map(_alpha, wide))}
    if any("dora_scale" in layer.parts for layer in product.layers):
        args["dora_wd"] = "True"
    found = {
        "ss_network_module": _KOHYA if args.keys() <= {"conv_dim", "conv_alpha"} else _LYCORIS,
        "ss_network_dim": _only(_rank(layer.parts) for layer in linear or wide),
        "ss_network_alpha": _only(map(_alpha, linear or wide)),
    }
    return found | ({"ss_network_args": json.dumps(args)} if args else {})


def _only(numbers: Iterable[float | None]) -> str:
    """The number that all share that have one, else `Dynamic`."""
    found = {number for number in numbers if number is not None}
    return f"{found.pop():g}" if len(found) == 1 else "Dynamic"


def _alpha(layer: Layer) -> float:
    """As the file has it: no dialect says that the root of the rank was taken."""
    alpha = float(layer.settings["lora_alpha"])
    return alpha * sqrt(_rank(layer.parts) or 1) if layer.settings["use_rslora"] else alpha


def _rank(parts: Any) -> int | None:
    """None for a LoKr whose large factor is whole."""
    return next((int(parts[name].shape[0]) for name in ("down", "w1_b", "w2_b") if name in parts), None)


def _is_convolution(parts: Any) -> bool:
    return "down" in parts and parts["down"].dim() == 4 and parts["down"].shape[-1] > 1


def _training(course: Course, steps: int, product: Product) -> dict[str, str]:
    config = course.config
    rate = config.lr or trainer(course.method).rate
    components = {layer.component for layer in product.layers}
    per_step = course.plan.batch * config.accumulate
    values: dict[str, Any] = {
        "ss_output_name": config.name or course.stem.name,
        "ss_sd_model_name": course.origin.path.name,
        "ss_base_model_version": _BASES[course.origin.family],
        "ss_v2": course.origin.family == "sd2",
        "ss_v_parameterization": course.origin.prediction == "v",
        "ss_learning_rate": rate,
        "ss_unet_lr": rate if "unet" in components else None,
        "ss_text_encoder_lr": (config.text_lr or rate) if components - {"unet"} else None,
        "ss_lr_scheduler": config.schedule,
        "ss_lr_warmup_steps": config.warmup,
        "ss_optimizer": f"AdamW(betas={config.beta1:g},{config.beta2:g},eps={config.adam_epsilon:g})",
        "ss_max_grad_norm": config.clip,
        "ss_max_train_steps": config.steps,
        "ss_steps": steps,
        "ss_epoch": steps * per_step // max(len(course.plan.samples), 1),
        "ss_num_epochs": -(-config.steps * per_step // max(len(course.plan.samples), 1)),
        "ss_batch_size_per_device": config.batch,
        "ss_total_batch_size": per_step,
        "ss_gradient_accumulation_steps": config.accumulate,
        "ss_gradient_checkpointing": config.checkpointing,
        "ss_mixed_precision": {"fp32": "no", "auto": "bf16"}.get(config.dtype, config.dtype),
        "ss_seed": config.seed,
        "ss_noise_offset": config.noise_offset or None,
        "ss_min_snr_gamma": config.min_snr or None,
        "ss_debiased_estimation": config.debiased,
        "ss_zero_terminal_snr": config.zero_terminal_snr,
        "ss_prior_loss_weight": config.prior_weight,
        "ss_clip_skip": config.clip_skip or None,
        "ss_max_token_length": 75,
        "ss_network_dropout": config.dropout or None,
        "ss_cache_latents": True,
        "ss_loss_type": "l2",
    }
    return {name: str(value) for name, value in values.items()}


def _data(course: Course) -> dict[str, str]:
    config, folder = course.config, course.folder
    side = config.resolution
    tags: Counter[str] = Counter()
    for caption in course.captions:
        tags.update(tag.strip() for tag in caption.split(",") if tag.strip())
    boxes = folder.buckets(side, config.bucket_step, squares=not config.buckets)
    info = {"buckets": {str(i): {"resolution": list(box), "count": n} for i, (box, n) in enumerate(boxes.items())}}
    name = folder.path.resolve().name
    values: dict[str, Any] = {
        "ss_num_train_images": len(folder.pictures) * config.repeats,
        "ss_num_reg_images": len(course.class_folder.pictures) if course.class_folder else 0,
        "ss_num_batches_per_epoch": course.plan.batches,
        "ss_resolution": f"({side}, {side})",
        "ss_enable_bucket": config.buckets,
        "ss_bucket_no_upscale": False,
        "ss_bucket_info": json.dumps(info),
        "ss_dataset_dirs": json.dumps({name: {"n_repeats": config.repeats, "img_count": len(folder.pictures)}}),
        "ss_tag_frequency": json.dumps({name: dict(tags.most_common())}, ensure_ascii=False),
        "ss_flip_aug": config.flip,
        "ss_caption_dropout_rate": config.caption_dropout,
        "ss_shuffle_caption": config.shuffle_tags,
        "ss_keep_tokens": config.keep_tags,
    }
    return {key: str(value) for key, value in values.items()}


def _modelspec(course: Course) -> dict[str, str]:
    config, origin = course.config, course.origin
    side = config.resolution
    found = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{_ARCHITECTURES[origin.family]}/lora",
        "modelspec.implementation": "diffusers" if origin.family != "sdxl" else "sgm",
        "modelspec.title": config.name or course.stem.name,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": origin.prediction,
        "modelspec.timestep_range": f"{config.least_step},{config.most_step}",
    }
    if config.clip_skip:
        found["modelspec.encoder_layer"] = str(config.clip_skip + 1)
    if course.words:
        found["modelspec.trigger_phrase"] = ", ".join(course.words)
    return found

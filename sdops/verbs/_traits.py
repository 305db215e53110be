"""What metadata and a few small tensors tell of a model beside its architecture."""

from __future__ import annotations

import re
from collections import Counter
from math import sqrt

from sdops.archs.detect import Detection
from sdops.core.source import Source
from sdops.text import count
from sdops.verbs._values import values

# Tensors that exist only to be found -> what the model predicts.
_MARKERS = {
    "v_pred": "v",
    "ztsnr": "zero terminal SNR",
    "edm_vpred.sigma_max": "EDM v (CosXL)",
    "edm_mean": "EDM (Playground 2.5)",
}
_SD2_V_SPREAD = 0.09  # ComfyUI's test: the standard deviation of a late bias is larger in v models

# Metadata of trainers that are shown at once; the rest of `ss_*` is detail.
_TRAINING = (
    "ss_base_model_version", "ss_sd_model_name", "ss_output_name", "ss_training_comment", "ss_network_module",
    "ss_network_dim", "ss_network_alpha", "ss_network_args", "ss_resolution", "ss_num_train_images", "ss_epoch",
    "ss_steps", "ss_learning_rate", "ss_unet_lr", "ss_text_encoder_lr", "ss_optimizer", "ss_v_parameterization",
)  # fmt: skip

_COUNTED = re.compile(r"(?:unet|text_encoder):\d+:rank|<[^<>]+>")  # of every layer and token of cloneofsimo's LoRAs
_NUMBERED = re.compile(r"([^0-9]*)0*([0-9]*)")  # a word, and a number without leading zeros


def prediction(source: Source, detection: Detection) -> list[str]:
    """What the model predicts and how that is known, strongest evidence first; empty if nothing says so."""
    found = [f"{what} (tensor `{key}`)" for key, what in _MARKERS.items() if key in source.specs]
    if stated := source.metadata.get("modelspec.prediction_type"):
        found.append(f"{stated} (metadata)")
    key = detection.needs_values.get("zero_terminal_snr")
    if key and (schedule := values(source, key)) and schedule[-1] == 0:
        found.append(f"zero terminal SNR (`{key}` ends in 0)")
    key = detection.needs_values.get("prediction")
    if key and (bias := values(source, key)):
        found.append(f"likely {'v' if _spread(bias) > _SD2_V_SPREAD else 'epsilon'} (spread of a bias)")
    return found


def _spread(numbers: list[float]) -> float:
    """Population standard deviation."""
    mean = sum(numbers) / len(numbers)
    return sqrt(sum((x - mean) ** 2 for x in numbers) / len(numbers))  # NaN if one is NaN


def quantisation(source: Source, detection: Detection) -> list[str]:
    """The ways in which weights are packed into fewer bits, with the number of tensors."""
    kinds = Counter(weight.kind for weight in detection.quantised.values())
    lines = [f"{kind}: {count(number, 'tensor')}" for kind, number in kinds.most_common()]
    if "_quantization_metadata" in source.metadata:
        lines.append("described in metadata (`_quantization_metadata`)")
    return lines


def is_detail(key: str) -> bool:
    """Whether a metadata key is one of the many that trainers write and nobody reads at first."""
    return (key.startswith("ss_") and key not in _TRAINING) or _COUNTED.fullmatch(key) is not None


def metadata_order(key: str) -> tuple[int, int, list[tuple[str, int, str]], str]:
    """Sorts metadata: what a model says of itself, how it was made, how it was trained, the rest.

    Numbers within keys go by value: `unet:2:rank` comes before `unet:100:rank`.
    """
    for rank, start in enumerate(("modelspec.", "sdops", "sd_merge", "ss_")):
        if key.startswith(start):
            return rank, _TRAINING.index(key) if key in _TRAINING else len(_TRAINING), _natural(key), key
    return 9, 0, _natural(key), key


def _natural(text: str) -> list[tuple[str, int, str]]:
    """Words and the numbers behind them, which compare by value: first by their length, then by their digits."""
    return [(word, len(number), number) for word, number in _NUMBERED.findall(text)]

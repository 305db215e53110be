"""What is to be trained on: a checkpoint or a folder, opened and laid out as diffusers has it. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdops.archs.detect import detect
from sdops.core.source import Source
from sdops.errors import FormatError, MismatchError, UsageError
from sdops.formats import FileSource, open_source, read_json
from sdops.training.config import Config
from sdops.verbs._convert_folder import folder
from sdops.verbs._convert_output import assembled
from sdops.verbs._convert_select import select
from sdops.verbs._convert_wish import Wish

FAMILIES = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "Stable Diffusion XL"}
RESOLUTIONS = {"sd1": 512, "sd2": 512, "sdxl": 1024}
_KINDS = {"unknown": "no model that sdops knows", "adapter": "a LoRA or one of its relatives"}
_ENCODERS = {"sd1": ("clip_l",), "sd2": ("clip_h",), "sdxl": ("clip_l", "clip_g")}
ENCODER_FOLDERS = ("text_encoder", "text_encoder_2")
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")
_FOLDER = Wish("diffusers", ema="drop", prune=True, unknown="drop")


@dataclass(frozen=True)
class Origin:
    """An opened model, before anything is built; made from headers alone.

    Attributes:
        path: As the user gave it.
        family: `sd1`, `sd2` or `sdxl`.
        title: For people.
        source: Its tensors as diffusers' folder names them: `unet/conv_in.weight`.
        configs: Component folder (`unet`, `vae`, `text_encoder` ..., `scheduler`) -> configuration.
        files: On the disk.
        prediction: `epsilon` or `v`.
        resolution: Pixels of a side that it was made for.
    """

    path: Path
    family: str
    title: str
    source: Source
    configs: Mapping[str, Mapping[str, Any]]
    files: list[Path]
    prediction: str
    resolution: int

    def numbers(self, component: str) -> int:
        """How many numbers a component's tensors have."""
        return sum(spec.numel for key, spec in self.source.specs.items() if key.startswith(f"{component}/"))

    def shapes(self, component: str) -> dict[str, tuple[int, ...]]:
        """The component's tensors without its name."""
        start = f"{component}/"
        return {key[len(start) :]: spec.shape for key, spec in self.source.specs.items() if key.startswith(start)}

    def layers(self, component: str) -> int:
        """How many layers a text encoder has."""
        named = (_LAYER.search(key) for key in self.shapes(component))
        return 1 + max(int(found[1]) for found in named if found)

    @property
    def cell(self) -> int:
        """Pixels of a latent's side."""
        return int(2 ** (len(self.configs["vae"]["block_out_channels"]) - 1))

    @property
    def encoders(self) -> dict[str, str]:
        """Encoder -> its folder."""
        return dict(zip(_ENCODERS[self.family], ENCODER_FOLDERS, strict=False))


def open_origin(config: Config) -> Origin:
    """Look at the model to be trained on.

    Raises:
        UsageError: none is named.
        MismatchError: it is a model that cannot be trained on here, or lacks a part.
        FormatError: it is quantised or damaged.
    """
    if not config.model:
        raise UsageError(
            "the model to train on is not named", hint="`--model CHECKPOINT`, or `model = ...` in the file"
        )
    path = Path(config.model)
    source = open_source(path)
    found = _from_folder(path, source) if (path / "model_index.json").is_file() else _from_file(path, source)
    missing = [name for name in ("unet", "vae", *found.encoders.values()) if not found.shapes(name)]
    if missing:
        raise MismatchError(
            f"`{path}` lacks {', '.join(missing)}, which training needs",
            hint="give a whole checkpoint; `sdops inspect` shows what is in it",
            path=path,
        )
    channels = found.shapes("unet")["conv_in.weight"][1]
    if channels != 4:
        raise MismatchError(
            f"`{path}` is an inpainting or edit model: its first layer has {channels} channels",
            hint="train on the plain model, the result works on both",
            path=path,
        )
    if config.prediction != "auto":
        found = replace(found, prediction=config.prediction)
    return found


def _from_file(path: Path, source: FileSource) -> Origin:
    detection = detect(source.specs)
    if detection.family not in FAMILIES:
        what = _KINDS.get(detection.family, detection.title)
        raise MismatchError(
            f"`{path}` is {what}, and training is done on whole checkpoints of {', '.join(FAMILIES.values())}",
            hint=f"`sdops inspect {path}` shows what is in it",
            path=path,
        )
    readable: Source = source
    if detection.quantised:
        if any(how.kind not in ("fp8", "fp8-scaled") for how in detection.quantised.values()):
            raise FormatError(f"`{path}` is quantised", hint="train on the unquantised model", path=path)
        from sdops.core.views import Dequantised

        readable = Dequantised(source)
        detection = detect(readable.specs)
    selection = select(readable, detection, ema="drop", prune=True)
    draft = folder(readable, detection, selection, _FOLDER)
    configs = {
        name.partition("/")[0]: json.loads(data)
        for name, data in draft.files.items()
        if name.endswith("/config.json") or name == "scheduler/scheduler_config.json"
    }
    laid = assembled(source.name, draft.tensors)
    return _origin(path, detection.family, laid, configs, source.files)


def _from_folder(path: Path, source: FileSource) -> Origin:
    configs: dict[str, Mapping[str, Any]] = {}
    for name in ("unet", "vae", *ENCODER_FOLDERS):
        if (path / name / "config.json").is_file():
            configs[name] = read_json(path / name / "config.json")
    scheduler = path / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        configs["scheduler"] = read_json(scheduler)
    unet = configs.get("unet", {})
    if unet.get("_class_name") != "UNet2DConditionModel":
        raise MismatchError(
            f"`{path}` has no UNet; training knows {', '.join(FAMILIES.values())}",
            hint=f"`sdops inspect {path}` shows what it is",
            path=path,
        )
    if unet.get("addition_embed_type") == "text_time":
        family = "sdxl"
    else:
        family = "sd2" if unet.get("use_linear_projection") else "sd1"
    return _origin(path, family, source, configs, source.files)


def _origin(
    path: Path, family: str, source: Source, configs: Mapping[str, Mapping[str, Any]], files: list[Path]
) -> Origin:
    said = str(configs.get("scheduler", {}).get("prediction_type", "epsilon"))
    if said not in ("epsilon", "v_prediction"):
        raise MismatchError(f"`{path}` predicts `{said}`, which is not trained here", hint="epsilon or v", path=path)
    prediction = "v" if said.startswith("v") else "epsilon"
    cell = 2 ** (len(configs["vae"].get("block_out_channels", ())) - 1) if "vae" in configs else 8
    own = configs.get("unet", {}).get("sample_size")
    resolution = int(own) * cell if isinstance(own, int) else RESOLUTIONS[family]
    return Origin(path, family, FAMILIES[family], source, configs, files, prediction, resolution)

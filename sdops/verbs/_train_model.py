"""A checkpoint or a folder of diffusers as modules to be trained on, built offline from sdops' own tables."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdops.archs.detect import detect
from sdops.core.source import Source
from sdops.core.spec import Spec
from sdops.errors import FormatError, MismatchError, SdopsError, UsageError
from sdops.formats import FileSource, open_source, read_json
from sdops.pipelines.tables import Pipeline, pipeline
from sdops.training.config import Config
from sdops.training.pictures import INSTALL
from sdops.verbs._convert_folder import folder
from sdops.verbs._convert_output import assembled
from sdops.verbs._convert_select import select
from sdops.verbs._convert_wish import Wish

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sdops.embeddings._types import Embedding
    from sdops.training.model import Encoder, Model
    from sdops.verbs._embed_algebra import Rows
    from sdops.verbs._embed_formula import Meaning

FAMILIES = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "Stable Diffusion XL"}
RESOLUTIONS = {"sd1": 512, "sd2": 512, "sdxl": 1024}
_ENCODERS = {"sd1": ("clip_l",), "sd2": ("clip_h",), "sdxl": ("clip_l", "clip_g")}
_FOLDERS = ("text_encoder", "text_encoder_2")
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

    @property
    def encoders(self) -> dict[str, str]:
        """Encoder -> its folder."""
        return dict(zip(_ENCODERS[self.family], _FOLDERS, strict=False))


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


# --------------------------------------------------------------------------------------------------- where it is from


def _from_file(path: Path, source: FileSource) -> Origin:
    detection = detect(source.specs)
    if detection.family not in FAMILIES:
        what = detection.title if detection.family != "unknown" else "no model that sdops knows"
        raise MismatchError(
            f"`{path}` is {what}; training knows {', '.join(FAMILIES.values())}",
            hint="see what it is: `sdops inspect`",
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
    for name in ("unet", "vae", *_FOLDERS):
        if (path / name / "config.json").is_file():
            configs[name] = read_json(path / name / "config.json")
    scheduler = path / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        configs["scheduler"] = read_json(scheduler)
    unet = configs.get("unet", {})
    if unet.get("_class_name") != "UNet2DConditionModel":
        raise MismatchError(
            f"`{path}` has no UNet; training knows {', '.join(FAMILIES.values())}",
            hint="see what it is: `sdops inspect`",
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


# ---------------------------------------------------------------------------------------------------------- building


def check_installed() -> None:
    """See that the libraries that have the modules are there, without loading them.

    Raises:
        SdopsError: one is not; the hint installs it.
    """
    from importlib.util import find_spec

    missing = [name for name in ("diffusers", "transformers", "PIL") if find_spec(name) is None]
    if missing:
        names = ", ".join({"PIL": "Pillow"}.get(name, name) for name in missing)
        raise SdopsError(f"training needs {names}, which is not installed", hint=f"`{INSTALL}`", missing=missing)


def build(origin: Origin, config: Config) -> Model:
    """Make the modules and load the weights.

    Raises:
        SdopsError: a library is missing.
        MismatchError: weights do not fit the modules.
    """
    check_installed()
    import torch

    from sdops.training.diffusion import abar_of, with_zero_terminal_snr
    from sdops.training.model import Model

    device = device_of(config.device)
    dtype = dtype_of(config.dtype, device)
    scheduler = origin.configs.get("scheduler", {})
    abar = abar_of(
        float(scheduler.get("beta_start", 0.00085)),
        float(scheduler.get("beta_end", 0.012)),
        str(scheduler.get("beta_schedule", "scaled_linear")),
    )
    if config.zero_terminal_snr or scheduler.get("rescale_betas_zero_snr"):
        abar = with_zero_terminal_snr(abar)
    encoders = [_encoder(origin, name, place, config, device, dtype) for name, place in origin.encoders.items()]
    unet = _module(origin, "unet", "diffusers", device, dtype)
    unet.to(memory_format=torch.channels_last)
    model = Model(
        origin.path.name,
        origin.family,
        unet,
        _module(origin, "vae", "diffusers", device, torch.float32),
        encoders,
        origin.prediction,
        abar,
        origin.resolution,
        device,
        dtype,
        lambda text: formula(encoders, text),
    )
    model.freeze()
    if config.checkpointing:
        model.save_memory(dropout=bool(config.dropout))
    return model


def device_of(wish: str) -> torch.device:
    """The device to train on.

    Raises:
        UsageError: it is not there.
    """
    import torch

    if wish == "auto":
        wish = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(wish)
    except RuntimeError as error:
        raise UsageError(f"there is no device `{wish}`", hint="auto, cpu, cuda, cuda:1, mps", key="device") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("PyTorch sees no CUDA device here", hint="`--device cpu`", key="device")
    return device


def dtype_of(wish: str, device: torch.device) -> torch.dtype:
    """The dtype to compute in."""
    import torch

    if wish == "auto":
        wish = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[wish]


def _module(origin: Origin, name: str, library: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A module of diffusers or transformers with its weights."""
    import torch

    config = dict(origin.configs[name])
    class_name = config.get("_class_name") or config["architectures"][0]
    with _quiet():
        kind = getattr(import_module(library), class_name)
        with torch.device("meta"):
            if library == "diffusers":
                module = kind.from_config({key: value for key, value in config.items() if not key.startswith("_")})
            else:
                own = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
                module = kind(kind.config_class(**{**own, "eos_token_id": 49407}))
    wanted = module.state_dict()
    state = _fitted(origin, name, set(wanted))
    wrong = [key for key, value in wanted.items() if key not in state or state[key].shape != value.shape]
    if wrong:
        raise MismatchError(
            f"the {name} of `{origin.path}` does not fit `{class_name}`: `{wrong[0]}`"
            + (f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""),
            hint="`sdops verify` and `sdops inspect` tell what is wrong with the file",
            keys=wrong,
        )
    state = {key: value.to(device, dtype if value.is_floating_point() else value.dtype) for key, value in state.items()}
    module.load_state_dict(state, assign=True)
    _fill(module, device)
    return module


def _fitted(origin: Origin, name: str, wanted: set[str]) -> dict[str, Tensor]:
    """The component's tensors under the names that the module has: transformers 5 leaves `text_model.` away."""
    found = {}
    for key in origin.shapes(name):
        plain = key.removeprefix("text_model.")
        target = next((each for each in (key, plain, f"text_model.{plain}") if each in wanted), None)
        if target is not None:
            found[target] = tensor_of(origin.source, f"{name}/{key}")
    return found


def tensor_of(source: Source, key: str) -> Tensor:
    """A tensor of a Source, in its own dtype.

    Raises:
        FormatError: torch has no such dtype.
    """
    import torch

    from sdops.core.source import read

    spec: Spec = source.specs[key]
    dtypes = {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    }  # fmt: skip
    if spec.dtype not in dtypes:
        raise FormatError(f"`{key}` is {spec.dtype}, which cannot be trained on", hint="`sdops convert --dtype fp16`")
    return torch.frombuffer(read(source, key), dtype=dtypes[spec.dtype]).reshape(spec.shape)


def _fill(module: Any, device: torch.device) -> None:
    """Make the buffers that no file has: CLIP's numbers of positions."""
    import torch

    for parent in module.modules():
        for name, buffer in list(parent._buffers.items()):
            if buffer is not None and buffer.is_meta:
                positions = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
                parent.register_buffer(name, positions, persistent=False)


def _encoder(
    origin: Origin, name: str, place: str, config: Config, device: torch.device, dtype: torch.dtype
) -> Encoder:
    from sdops.training.model import Encoder
    from sdops.training.words import Words

    module = _module(origin, place, "transformers", device, dtype)
    parent = next(each for each in module.modules() if "token_embedding" in each._modules)
    words = Words(parent.token_embedding)
    parent.token_embedding = words
    return Encoder(name, module, words, pad_of(origin.family, place), origin.family == "sdxl", config.clip_skip)


def pad_of(family: str, place: str) -> int:
    """The token that fills up short texts."""
    table: Pipeline | None = pipeline(family)
    if table is None:
        raise MismatchError(f"no tokenizer is known for `{family}`", hint="SD1, SD2 and SDXL have one")
    index = _FOLDERS.index(place)
    return {"<|endoftext|>": 49407, "!": 0}[table.tokenizers[index]["pad"]]


def formula(encoders: Sequence[Encoder], text: str) -> Mapping[str, Tensor]:
    """What a formula of words and files makes, per encoder [n, width].

    Raises:
        UsageError, MismatchError: as `sdops embed make`.
    """
    import torch

    from sdops.verbs._embed_formula import evaluate, files_in
    from sdops.verbs._embed_open import open_embeddings

    files = {file: open_embeddings(file).embeddings[0] for file in files_in(text)}
    made = {}
    for encoder in encoders:
        rows = {file: _of_encoder(one, encoder.name, file) for file, one in files.items()}
        made[encoder.name] = torch.from_numpy(evaluate(text, _meaning(encoder, rows))).float()
    return made


def _meaning(encoder: Encoder, files: Mapping[str, Rows]) -> Meaning:
    """What words and files mean for an encoder."""
    from sdops.pipelines.clip_words import clip_words
    from sdops.verbs._embed_formula import Meaning

    table = encoder.words.weight.detach().double().cpu().numpy()

    def words(text: str) -> Rows:
        found: Rows = table[clip_words().numbers(text)]
        return found

    def row(number: int) -> Rows:
        found: Rows = table[[number]]
        return found

    return Meaning(words, row, files, encoder.words.usual_norm)


def _of_encoder(one: Embedding, name: str, file: str) -> Rows:
    if name not in one.vectors:
        raise MismatchError(
            f"`{file}` has no vectors for {name}", hint=f"it has {', '.join(one.vectors)}: another model's", file=file
        )
    return one.vectors[name].values.astype("f8")


@contextmanager
def _quiet() -> Iterator[None]:
    """Libraries warn about what nobody here can change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

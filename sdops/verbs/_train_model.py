"""Modules to be trained on, built offline from sdops' own tables with the weights of an opened model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from sdops.core.source import Source
from sdops.core.spec import Spec
from sdops.errors import FormatError, MismatchError, SdopsError, UsageError
from sdops.pipelines.tables import Pipeline, pipeline
from sdops.training.config import Config
from sdops.training.pictures import INSTALL
from sdops.verbs._train_formula import formula
from sdops.verbs._train_origin import ENCODER_FOLDERS, Origin

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sdops.training.model import Encoder, Model


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
    index = ENCODER_FOLDERS.index(place)
    return {"<|endoftext|>": 49407, "!": 0}[table.tokenizers[index]["pad"]]


@contextmanager
def _quiet() -> Iterator[None]:
    """Libraries warn about what nobody here can change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

"""Where the result of a training goes, and how it is spelled: as most programs read it, if nobody says anything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdops import custom_diffusion, embeddings, hypernetworks
from sdops.dialects import dialect
from sdops.errors import UsageError
from sdops.trainers import METHODS
from sdops.trainers._cards import CONCEPT, LAYERS, NETWORK, PAIRS, TEXTS, VECTOR, WORDS
from sdops.trainers._named import NEGATIVE
from sdops.training.config import Config
from sdops.training.pictures import Folder
from sdops.verbs import _hypernet_open as hypernet
from sdops.verbs._adapter_path import adapter_path
from sdops.verbs._embed_write import check_layout, container_of, ending_of, file_name

CONCEPTS = tuple(name for name in custom_diffusion.ORDER if name == "webui")  # layouts that hold what is added
_TEXTS, _VECTORS = ("null_text", "null_text_list"), ("bare", "clip_image")
_ALONE = ("diffusers",)  # layouts of many words whose own loaders, diffusers and the web UIs, refuse more than one
_DENSE = "-text"  # behind the name of a vector's file: that of the layers that go with it


def files_of(method: str, path: Path, to: str, words: Sequence[str]) -> list[Path]:
    """All files that a result is written to.

    Args:
        method: Name of a trainer.
        path: The output, or that after some steps; the first file, or what all are called after.
        to: Dialect or layout.
        words: New ones.
    """
    saves = METHODS[method].saves
    holds_many = saves in (WORDS, PAIRS) and to not in _ALONE and embeddings.layout(to).HOLDS_MANY
    if saves == WORDS and len(words) > 1 and not holds_many:
        return [path.with_stem(f"{path.stem}-{file_name(word)}") for word in words]
    if saves == PAIRS and not holds_many:
        stems = [path.stem] if len(words) == 1 else [f"{path.stem}-{file_name(word)}" for word in words]
        return [path.with_stem(stem + end) for end in ("", NEGATIVE) for stem in stems]
    if saves == CONCEPT and to in CONCEPTS:
        return [path, path.with_name(path.stem.removesuffix(".delta") + ".pt")]
    if saves == VECTOR:
        return [path, path.with_name(f"{path.stem}{_DENSE}.safetensors")]
    return [path]


def place_of(method: str, config: Config, words: Sequence[str], folder: Folder, encoders: int) -> tuple[Path, str]:
    """The output of a run, and its dialect or layout.

    Args:
        method: Name of a trainer.
        config: Its settings.
        words: New ones.
        folder: Of the pictures.
        encoders: How many text encoders the model has.

    Raises:
        UsageError: there is no such dialect or layout, or its files end otherwise.
    """
    saves = METHODS[method].saves
    given = Path(config.output) if config.output else None
    name = folder.path.resolve().name
    usual, to = f"{name}.{method}", config.to
    if saves == LAYERS:
        return _layers(given, to, usual)
    if saves == CONCEPT:
        return _concept(given, to, name, usual, encoders)
    if saves == NETWORK:
        return _network(given, to, usual)
    if saves == TEXTS:
        return _embedding(given, to, f"{folder.pictures[0].path.stem}.{method}", _TEXTS)
    if saves == VECTOR:
        return _embedding(given, to, usual, _VECTORS)
    return _words(given, to, words[0] if len(words) == 1 else name, encoders)


def _layers(given: Path | None, to: str, usual: str) -> tuple[Path, str]:
    """A LoRA-like file; of PEFT the one in its folder."""
    dialect(to or "kohya")
    if to == "peft":
        return adapter_path(f"{usual}.safetensors", given, to), to
    if given is not None and given.suffix != ".safetensors":
        raise UsageError(
            f"layers are saved as .safetensors, not as `{given.name}`", hint=f"`-o {given.with_suffix('.safetensors')}`"
        )
    return given or Path(f"{usual}.safetensors"), to or "kohya"


def _concept(given: Path | None, to: str, name: str, usual: str, encoders: int) -> tuple[Path, str]:
    """Custom diffusion of its own web UI, which knows one text encoder, or a LoRA."""
    to = to or (CONCEPTS[0] if encoders == 1 else "kohya")
    if to not in CONCEPTS:
        return _layers(given, to, usual)
    return given or Path(custom_diffusion.layout(to).NAMES["safetensors"].format(name)), to


def _words(given: Path | None, to: str, name: str, encoders: int) -> tuple[Path, str]:
    if to:
        to = check_layout(to)
    elif encoders > 1:
        to = "encoders"
    else:
        to = "kohya" if given is not None and given.suffix == ".safetensors" else "a1111"
    container = container_of(to, given)
    return given or Path(f"{name}{ending_of(to, container)}"), to


def _network(given: Path | None, to: str, usual: str) -> tuple[Path, str]:
    is_own = given is not None and given.suffix == ".safetensors"
    to = hypernet.check_layout(to) if to else "safetensors" if is_own else "a1111"
    path = given or Path(usual + hypernetworks.layout(to).ENDING)
    hypernet.check_ending(to, path)
    return path, to


def _embedding(given: Path | None, to: str, usual: str, layouts: tuple[str, str]) -> tuple[Path, str]:
    """A layout that holds such a thing: the one that is named, or that the ending means, else the first."""
    endings = {ending: each for each in reversed(layouts) for ending in embeddings.layout(each).ENDING.values()}
    name = check_layout(to) if to else endings.get(given.suffix if given is not None else "", layouts[0])
    if name not in layouts:
        raise UsageError(f"`{name}` files hold something else", hint=f"`--to {'` or `--to '.join(layouts)}`", key="to")
    container = container_of(name, given)
    return given or Path(f"{usual}{ending_of(name, container)}"), name

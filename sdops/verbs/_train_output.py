"""Where the result of a training goes, and how it is spelled: as most programs read it, if nobody says anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from sdops.dialects import dialect
from sdops.errors import UsageError
from sdops.hypernetworks import layout as layout_of_networks
from sdops.trainers import METHODS
from sdops.trainers._cards import LAYERS, NETWORK, TEXTS, VECTOR, WORDS
from sdops.training.config import Config
from sdops.training.pictures import Folder
from sdops.verbs import _hypernet_open as hypernet
from sdops.verbs._embed_write import check_layout, container_of, ending_of

Place = tuple[Path, str]  # the file, and its dialect or layout
_TEXTS, _VECTORS = ("null_text", "null_text_list"), ("bare", "clip_image")


def place_of(method: str, config: Config, words: Sequence[str], folder: Folder, encoders: int) -> Place:
    """The output of a run.

    Args:
        method: Name of a trainer.
        config: Its settings.
        words: New ones.
        folder: Of the pictures.
        encoders: How many text encoders the model has.

    Raises:
        UsageError: there is no such dialect or layout, or its files end otherwise.
    """
    given = Path(config.output) if config.output else None
    name = folder.path.resolve().name
    usual = f"{name}.{method}"
    places: dict[str, Callable[[], Place]] = {
        LAYERS: lambda: _layers(given, config.to, usual),
        WORDS: lambda: _words(given, config.to, words[0], encoders),
        NETWORK: lambda: _network(given, config.to, usual),
        TEXTS: lambda: _embedding(given, config.to, folder.pictures[0].path.stem + f".{method}", _TEXTS),
        VECTOR: lambda: _embedding(given, config.to, usual, _VECTORS),
    }
    return places[METHODS[method].saves]()


def _layers(given: Path | None, to: str, usual: str) -> Place:
    dialect(to or "kohya")
    return given or Path(f"{usual}.safetensors"), to or "kohya"


def _words(given: Path | None, to: str, word: str, encoders: int) -> Place:
    if to:
        to = check_layout(to)
    elif encoders > 1:
        to = "encoders"
    else:
        to = "kohya" if given is not None and given.suffix == ".safetensors" else "a1111"
    container = container_of(to, given)
    return given or Path(f"{word}{ending_of(to, container)}"), to


def _network(given: Path | None, to: str, usual: str) -> Place:
    is_own = given is not None and given.suffix == ".safetensors"
    to = hypernet.check_layout(to) if to else "safetensors" if is_own else "a1111"
    path = given or Path(usual + layout_of_networks(to).ENDING)
    hypernet.check_ending(to, path)
    return path, to


def _embedding(given: Path | None, to: str, usual: str, layouts: tuple[str, str]) -> Place:
    """A layout that holds such a thing: the one that is named, or that the ending means, else the first."""
    endings = {ending: each for each in reversed(layouts) for ending in _endings(each)}
    name = check_layout(to) if to else endings.get(given.suffix if given is not None else "", layouts[0])
    if name not in layouts:
        raise UsageError(f"`{name}` files hold something else", hint=f"`--to {'` or `--to '.join(layouts)}`", key="to")
    container = container_of(name, given)
    return given or Path(f"{usual}{ending_of(name, container)}"), name


def _endings(name: str) -> Sequence[str]:
    from sdops.embeddings import layout

    found: dict[str, str] = layout(name).ENDING
    return list(found.values())

"""Opens hypernetworks of any layout, and writes them; names and shapes first, values when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdops.core.sink import FileSink, SafetensorsSink
from sdops.core.sink_torch import TreeSink
from sdops.core.source import Source, read
from sdops.core.spec import Spec
from sdops.core.tree import Leaf
from sdops.errors import FormatError, UsageError
from sdops.hub import located
from sdops.hypernetworks import ORDER, find, layout
from sdops.hypernetworks._types import Chain, Network, Written
from sdops.text import instead_of
from sdops.verbs._adapter_source import values_of
from sdops.verbs._personal_files import open_saved

FilePath = str | os.PathLike[str]
Doubles = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Linear:
    """A layer with its values.

    Attributes:
        weight: [out, in].
        bias: [out]; zeros if it has none.
        norm: Weight and bias of the layer norm behind it; None without one.
    """

    weight: Doubles
    bias: Doubles
    norm: tuple[Doubles, Doubles] | None = None


@dataclass(slots=True)
class HypernetFile:
    """An opened file.

    Attributes:
        path: As it was given.
        source: Where the tensors are.
        network: What it holds.
        container: `torch` or `safetensors`.
        notes: What the user should know, one sentence each, without a full stop.
    """

    path: Path
    source: Source
    network: Network
    container: str
    notes: list[str] = field(default_factory=list)

    def values(self, width: int, which: str) -> list[Linear]:
        """The chain for keys (`k`) or values (`v`) at a width.

        Raises:
            FormatError: a number is NaN or infinite.
        """
        layers: list[Linear] = []
        for layer in self.network.pairs[width]["kv".index(which)]:
            weight = self._tensor(layer.weight)
            bias = np.zeros(len(weight)) if layer.bias is None else self._tensor(layer.bias)
            if layer.is_norm:
                layers[-1] = Linear(layers[-1].weight, layers[-1].bias, (weight, bias))
            else:
                layers.append(Linear(weight, bias))
        return layers

    def _tensor(self, leaf: Leaf) -> Doubles:
        found = values_of(self.source, leaf.key).reshape(leaf.spec.shape)
        if not np.isfinite(found).all():
            raise FormatError(
                f"`{self.path}` holds numbers that are NaN or infinite",
                hint="the training diverged or the file is damaged; use an earlier save",
                path=self.path,
            )
        return found


def open_network(path: FilePath) -> HypernetFile:
    """A hypernetwork in any layout.

    Raises:
        SdopsError: the file is missing or no model.
        FormatError: it holds no hypernetwork, or a damaged one.
    """
    path = located(path)
    saved, source, container = open_saved(path)
    try:
        name = find(saved)
        if name is None:
            raise FormatError(
                f"`{path}` holds no hypernetwork", hint=f"`sdops inspect {path}` shows what it is", path=path
            )
        network = layout(name).read(saved)
    except BaseException:
        source.close()
        raise
    return HypernetFile(path, source, network, container, _notes(network))


def _notes(network: Network) -> list[str]:
    notes = []
    if network.lost:
        notes.append(f"entries that are no part of the network: {', '.join(f'`{name}`' for name in network.lost)}")
    if network.foreign:
        notes.append(f"made with {', '.join(f'`{name}`' for name in network.foreign)}, which other programs ignore")
    elif problem := misnumbered(network):
        notes.append(problem)
    if network.activation and "activate_output" not in network.settings:
        notes.append("the file does not say whether its output is activated: web UIs do it, ComfyUI does not")
    return notes


def misnumbered(network: Network) -> str:
    """A sentence if the layers' numbers leave room for modules other than the settings name; else empty."""
    for width, pair in network.pairs.items():
        for which, chain in zip("kv", pair, strict=True):
            expected, found = _numbers(network, chain), tuple(layer.index for layer in chain)
            if expected != found:
                said = ", ".join(map(str, found))
                wanted = ", ".join(map(str, expected))
                return f"`{width} {which}` has layers {said}, but the settings (activation, dropout) ask for {wanted}"
    return ""


def _numbers(network: Network, chain: Chain) -> tuple[int, ...]:
    """Where the layers of a chain should be, by the settings."""
    dropout = _dropout(network, sum(not layer.is_norm for layer in chain))
    numbers, at, linear = [], 0, -1
    last = sum(not layer.is_norm for layer in chain) - 1
    for position, layer in enumerate(chain):
        if not layer.is_norm:
            linear += 1
        elif network.activation and (linear < last or network.activates_output):
            at += 1
        numbers.append(at)
        at += 1
        is_end = position + 1 == len(chain) or not chain[position + 1].is_norm
        if is_end and not layer.is_norm and network.activation and (linear < last or network.activates_output):
            at += 1
        if is_end and dropout[linear] > 0:
            at += 1
    return tuple(numbers)


def _dropout(network: Network, count: int) -> list[float]:
    """Probability of the dropout behind each of `count` linear layers."""
    said = network.settings.get("dropout_structure")
    if type(said) is list and len(said) == count + 1:
        return [float(share) for share in said[1:]]
    if not network.settings.get("use_dropout"):
        return [0.0] * count
    last = 0.3 if network.settings.get("last_layer_dropout") else 0.0
    return [0.3] * (count - 2) + ([last] if count > 1 else []) + [0.0]


def check_layout(name: str) -> str:
    """A layout that exists.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in ORDER:
        raise UsageError(f"there is no layout `{name}` of hypernetworks", hint=instead_of(name, ORDER))
    return name


def layout_for(output: Path, network: Network) -> str:
    """The layout that an output's ending asks for."""
    if output.suffix == ".safetensors":
        return "safetensors"
    return network.layout if network.layout != "safetensors" else "a1111"


def check_ending(name: str, output: Path) -> None:
    """Raises UsageError if files of the layout never end so."""
    wanted = layout(name).ENDING
    if (output.suffix == ".safetensors") != (wanted == ".safetensors"):
        raise UsageError(
            f"`{name}` hypernetworks are never `{output.suffix}` files", hint=f"`-o {output.with_suffix(wanted)}`"
        )


def save(written: Written, container: str, source: Source, output: Path, *, force: bool) -> int:
    """Write a layout's tree, the tensors' bits copied from `source`; returns the size in bytes.

    Raises:
        OutputError: the output exists or cannot be written.
    """
    leaves = _leaves(written.tree, container)
    specs = {key: leaf.spec for key, leaf in leaves.items()}
    with _sink(written, container, output, specs, force=force) as sink:
        for key, leaf in leaves.items():
            sink.write(key, 0, memoryview(read(source, leaf.key)))
        sink.commit()
    return output.stat().st_size


def _leaves(tree: Any, container: str) -> dict[str, Leaf]:
    """The tensors of a tree under the names that the sink knows them by."""
    if container == "safetensors":
        return dict(tree)
    items = tree.values() if type(tree) is dict else tree if type(tree) is list else ()
    found = {tree.key: tree} if type(tree) is Leaf else {}
    for item in items:
        found |= _leaves(item, container)
    return found


def _sink(written: Written, container: str, path: Path, specs: Mapping[str, Spec], *, force: bool) -> FileSink:
    if container == "safetensors":
        return SafetensorsSink(path, specs, written.metadata, force=force)
    return TreeSink(path, written.tree, specs, force=force)

"""Several hypernetworks as one that does exactly what their weighted sum does.

    f(c) = c + sum_i w_i g_i(c)

Hidden units are put side by side: the first layers' rows below each other, those between on the diagonal of a larger
matrix, the last layers' columns side by side and scaled by w_i, their biases added. This is exact for any activation
that acts on each number alone, if it does not act on the output, too, and if no layer norm mixes the units. Linear
networks of different depth become one layer each first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sdops.core.precision import encode
from sdops.core.sink import check_inputs
from sdops.core.spec import Spec
from sdops.core.tree import Leaf
from sdops.errors import MismatchError, UsageError
from sdops.hypernetworks import layout
from sdops.hypernetworks._types import Chain, Layer, Network
from sdops.report import Report, Section
from sdops.text import size
from sdops.verbs._adapter_source import AdapterSource, Lazy
from sdops.verbs._file_strength import Wish, with_number
from sdops.verbs._hypernet_chain import affine_of, check_evaluable
from sdops.verbs._hypernet_open import (
    Doubles,
    FilePath,
    HypernetFile,
    Linear,
    check_ending,
    check_layout,
    layout_for,
    open_network,
    save,
)

DTYPES = {"keep": "", "fp32": "F32", "fp16": "F16", "bf16": "BF16"}
_SAME = ("sd_checkpoint", "sd_checkpoint_name", "weight_initialization")
Chains = dict[int, tuple[list[Linear], list[Linear]]]


def merge(
    *files: Wish,
    output: FilePath,
    weights: Sequence[float] | None = None,
    name: str | None = None,
    to: str | None = None,
    dtype: str = "keep",
    force: bool = False,
    dry_run: bool = False,
) -> Report:
    """Make one hypernetwork of several, which does what their weighted sum does: f(c) = c + sum_i w_i g_i(c).

    With one file and a weight, its strength is changed for good.

    Args:
        files: Hypernetworks with the same activation, in any layout: a path, `"PATH:STRENGTH"`, or path and strength.
        output: Where to write.
        weights: One each, instead of strengths; default: 1 for all, their sum.
        name: The network's own name; default: the output's.
        to: a1111 or safetensors; default: what the output's ending says.
        dtype: keep (theirs if all agree, else fp32), fp32, fp16 or bf16.
        force: Replace an existing output.
        dry_run: Only work it out.

    Raises:
        UsageError: no file, other than one weight each, a malformed strength, or no such layout or dtype.
        MismatchError: the networks cannot be joined exactly.
        OutputError: the output exists or cannot be written.
    """
    path = Path(output)
    named = [with_number(file) for file in files]
    weights = _weights([strength for _, strength in named], weights)
    if dtype not in DTYPES:
        raise UsageError(f"there is no dtype `{dtype}`", hint=f"one of {', '.join(DTYPES)}")
    opened = [open_network(file) for file, _ in named]
    try:
        check_joinable(opened)
        to = check_layout(to) if to else layout_for(path, Network("", "a1111", {}))
        check_ending(to, path)
        check_inputs(path, [file.path for file in opened])
        chains = [_chains(file) for file in opened]
        structure, joined = _joined(chains, weights)
        settings = _settings(opened, structure, name or path.stem)
        network, source = _network(joined, settings, DTYPES[dtype] or _dtype(opened), path.name)
        written = layout(to).write(network)
        if not dry_run:
            save(written, layout(to).CONTAINER, source, path, force=force)
    finally:
        for file in opened:
            file.source.close()
    return _report(opened, weights, structure, path, to, source, dry_run=dry_run)


def _weights(strengths: list[float], weights: Sequence[float] | None) -> list[float]:
    """One for each file: its strength, or the weight that is given for it."""
    if not strengths:
        raise UsageError("`hypernet merge` needs at least one file", hint="`sdops hypernet merge A B -o C.pt`")
    if weights is None:
        return strengths
    if len(weights) != len(strengths):
        raise UsageError(
            f"there are {len(strengths)} hypernetworks and {len(weights)} weights",
            hint="give one each: `--weights 0.7,0.3`",
        )
    if any(strength != 1 for strength in strengths):
        raise UsageError(
            "strengths are given twice, behind files and as weights",
            hint="either `A.pt:0.7 B.pt:0.3` or `A.pt B.pt --weights 0.7,0.3`",
        )
    return list(weights)


def check_joinable(files: Sequence[HypernetFile]) -> None:
    """Refuse networks whose hidden units cannot stand side by side.

    Raises:
        MismatchError: activations differ, the output is activated, there are layer norms, or depths differ.
        FormatError: a network's meaning is not known.
    """
    first = files[0].network
    for file in files:
        network = file.network
        check_evaluable(file)
        if network.activation != first.activation:
            raise MismatchError(
                f"`{files[0].path}` has the activation `{first.activation or 'linear'}`, "
                f"`{file.path}` `{network.activation or 'linear'}`",
                hint="turn both into LoRAs and merge these: `sdops hypernet to-lora`, then `sdops merge`",
            )
        if network.has_norms or (network.activates_output and len(files) > 1):
            why = "layer norms" if network.has_norms else "an activated output"
            raise MismatchError(
                f"`{file.path}` has {why}: a sum of such networks is no network of the same kind",
                hint="turn both into LoRAs and merge these: `sdops hypernet to-lora`, then `sdops merge`",
            )
    if first.activates_output:
        raise MismatchError(
            f"`{files[0].path}` has an activated output, whose strength no weight can take up",
            hint="choose the strength where it is used: `sdops hypernet apply MODEL FILE:0.5`",
        )
    if first.activation and len({_depth(file.network) for file in files}) > 1:
        raise MismatchError(
            "the hypernetworks have different numbers of layers with activations between them",
            hint="turn both into LoRAs and merge these: `sdops hypernet to-lora`, then `sdops merge`",
        )


def _depth(network: Network) -> int:
    return max(len(chain) for pair in network.pairs.values() for chain in pair)


def _chains(file: HypernetFile) -> Chains:
    return {width: (file.values(width, "k"), file.values(width, "v")) for width in file.network.pairs}


def _joined(chains: Sequence[Chains], weights: Sequence[float]) -> tuple[list[float], Chains]:
    """The structure of the sum, and its chains. All networks have one depth, or are linear."""
    depths = {len(chain) for one in chains for pair in one.values() for chain in pair}
    if len(depths) > 1:
        chains = [{w: (_folded(pair[0]), _folded(pair[1])) for w, pair in one.items()} for one in chains]
    widths = list(dict.fromkeys(width for one in chains for width in one))
    hidden = [
        [len(layer.weight) for layer in next(iter(one.values()))[0][:-1]] + [next(iter(one))] for one in chains
    ]  # of each network at one width, that width last
    inner = [sum(sizes[at] / sizes[-1] for sizes in hidden) for at in range(len(hidden[0]) - 1)]
    structure = [1.0, *(round(multiple, 9) for multiple in inner), 1.0]
    joined: Chains = {}
    for width in widths:
        here = [(one[width], weight) for one, weight in zip(chains, weights, strict=True) if width in one]
        room = [int(width * multiple) for multiple in structure]
        for index in range(1, len(room) - 1):  # a network of other multiples at other widths may need more
            need = sum(len(pair[0][index - 1].weight) for pair, _ in here)
            if need > room[index]:
                structure[index] = need / width + 1e-9
    for width in widths:
        here = [(one[width], weight) for one, weight in zip(chains, weights, strict=True) if width in one]
        sizes = [int(width * multiple) for multiple in structure]
        k, v = (_sum([(pair[side], weight) for pair, weight in here], sizes) for side in (0, 1))
        joined[width] = (k, v)
    return structure, joined


def _folded(chain: list[Linear]) -> list[Linear]:
    """A linear chain as one layer."""
    whole = affine_of(chain)
    return [Linear(whole.matrix, whole.offset)]


def _sum(chains: Sequence[tuple[list[Linear], float]], sizes: Sequence[int]) -> list[Linear]:
    """Chains side by side, in layers of these sizes: what is not taken up by units is zero."""
    layers = []
    last = len(sizes) - 2
    for index, (inputs, outputs) in enumerate(pairwise(sizes)):
        weight, bias = np.zeros((outputs, inputs)), np.zeros(outputs)
        row = column = 0
        for chain, strength in chains:
            part = chain[index]
            factor = strength if index == last else 1.0
            rows = slice(None) if index == last else slice(row, row + len(part.weight))
            columns = slice(None) if index == 0 else slice(column, column + part.weight.shape[1])
            weight[rows, columns] += factor * part.weight
            bias[rows] += factor * part.bias
            row, column = row + len(part.weight), column + part.weight.shape[1]
        layers.append(Linear(weight, bias))
    return layers


def _settings(files: Sequence[HypernetFile], structure: Sequence[float], name: str) -> dict[str, Any]:
    """What the web UI wants to know; of what the files say only that on which all agree."""
    said = [file.network.settings for file in files]
    agreed = {key: said[0].get(key) if all(s.get(key) == said[0].get(key) for s in said) else None for key in _SAME}
    steps = [s["step"] for s in said if type(s.get("step")) is int]
    return {
        "step": max(steps, default=0),
        "name": name,
        "layer_structure": [int(m) if m == int(m) else m for m in structure],
        "activation_func": files[0].network.activation or "linear",
        "is_layer_norm": False,
        "weight_initialization": agreed["weight_initialization"] or "Normal",
        "sd_checkpoint": agreed["sd_checkpoint"],
        "sd_checkpoint_name": agreed["sd_checkpoint_name"],
        "activate_output": False,
        "use_dropout": False,
        "last_layer_dropout": False,
        "dropout_structure": [0.0] * len(structure),
        "optional_info": "merged from " + ", ".join(file.network.name for file in files),
    }


def _dtype(files: Sequence[HypernetFile]) -> str:
    found = {spec.dtype for file in files for spec in file.source.specs.values() if spec.is_float}
    dtype = found.pop() if len(found) == 1 else "F32"
    return dtype if dtype in DTYPES.values() else "F32"


def _network(chains: Chains, settings: Mapping[str, Any], dtype: str, name: str) -> tuple[Network, AdapterSource]:
    """Chains as a network whose values are in memory."""
    tensors: dict[str, Lazy] = {}

    def leaf(values: Doubles) -> Leaf:
        bits, overflow = encode(np.ascontiguousarray(values).reshape(-1), dtype)
        if overflow:
            raise MismatchError(f"the sum does not fit into {dtype}", hint="`--dtype fp32` holds it")
        key = str(len(tensors))
        tensors[key] = Lazy(Spec(dtype, values.shape), bits.tobytes)
        return Leaf(key, tensors[key].spec)

    def chain(layers: Sequence[Linear]) -> Chain:
        step = 2 if settings["activation_func"] != "linear" else 1  # activations are counted
        return tuple(Layer(i * step, leaf(layer.weight), leaf(layer.bias)) for i, layer in enumerate(layers))

    pairs = {width: (chain(pair[0]), chain(pair[1])) for width, pair in chains.items()}
    network = Network(str(settings["name"]), "a1111", pairs, settings)
    return network, AdapterSource(name, tensors, {})


def _report(
    files: Sequence[HypernetFile],
    weights: Sequence[float],
    structure: Sequence[float],
    path: Path,
    to: str,
    source: AdapterSource,
    *,
    dry_run: bool,
) -> Report:
    nbytes = sum(spec.nbytes for spec in source.specs.values())
    report = Report("hypernet merge", result=[str(path)])
    report.data = {
        "output": str(path),
        "layout": to,
        "bytes": nbytes,
        "inputs": [str(file.path) for file in files],
        "weights": list(weights),
        "structure": list(structure),
        "dry_run": dry_run,
    }
    verb = "would write" if dry_run else "wrote"
    rows = [[verb, f"{path}, {size(nbytes)}"], ["structure", ", ".join(f"{m:g}" for m in structure)]]
    parts = [[f"{w:g}", file.network.name, str(file.path)] for w, file in zip(weights, files, strict=True)]
    report.sections = [Section("", rows), Section("Sum of", parts, ("weight>", "name", "file"))]
    return report

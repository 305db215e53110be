"""What hypernetworks are: widths, structure, activation, norms of the layers, and on request what the chains do."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from sdops.errors import SdopsError
from sdops.hypernetworks._types import Network
from sdops.report import Report, Section
from sdops.text import count, size
from sdops.verbs._each import each_file
from sdops.verbs._hypernet_chain import Affine, affine_of, check_evaluable, fitted
from sdops.verbs._hypernet_open import Doubles, FilePath, HypernetFile, Linear, open_network

_SAMPLES = 4  # contexts per number of a width


def inspect(*files: FilePath, effect: bool = False) -> Report:
    """Widths, structure, activation and norms of hypernetworks of all layouts.

    Args:
        files: Paths.
        effect: Work out what the chains do to contexts of Gaussian numbers: how large the change is, along how many
            directions, and how near the nearest linear map comes.

    Raises:
        SdopsError: the only file cannot be read.
    """

    def look(path: FilePath) -> Report:
        file = open_network(path)
        try:
            return report_of(file, effect=effect)
        finally:
            file.source.close()

    return each_file("hypernet inspect", files, look)


def report_of(file: HypernetFile, *, effect: bool = False) -> Report:
    """The report on an opened file."""
    network = file.network
    report = Report("hypernet inspect", result=[f"{file.path}: hypernetwork for {_widths(network)}"])
    report.data = {
        "file": str(file.path),
        "bytes": os.path.getsize(file.path),
        "layout": network.layout,
        "container": file.container,
        "name": network.name,
        "widths": list(network.pairs),
        "structure": list(network.structure),
        "activation": network.activation or "linear",
        "activates_output": network.activates_output,
        "layer_norm": network.has_norms,
        "linear": network.is_linear,
        "settings": dict(network.settings),
        "notes": file.notes,
        "chains": [],
    }
    rows = []
    for width in network.pairs:
        for which in "kv":
            facts = _chain(file, width, which)
            report.data["chains"].append(facts)
            rows.append(_row(facts))
    columns = ("context>", "for", "layers", "dtype", "norms of weights", "norms of biases")
    report.sections = [Section(str(file.path), _summary(file)), Section("Chains", rows, columns)]
    if effect:
        _add_effects(report, file)
    return report


def _widths(network: Network) -> str:
    return ", ".join(map(str, network.pairs))


def _summary(file: HypernetFile) -> list[list[str]]:
    network, said = file.network, file.network.settings
    step = said.get("step")
    checkpoint = " ".join(filter(None, [said.get("sd_checkpoint_name"), _bracketed(said.get("sd_checkpoint"))]))
    what = "linear: weights can do exactly what it does" if network.is_linear else "not linear"
    rows = [
        ["kind", f"hypernetwork, {what}"],
        ["layout", f"{network.layout} in {file.container}, {size(os.path.getsize(file.path))}"],
        ["name", network.name],
        ["contexts", _widths(network)],
        ["structure", ", ".join(f"{multiple:g}" for multiple in network.structure)],
        ["activation", _activation(network)],
        ["layer norm", "yes" if network.has_norms else ""],
        ["dropout", "in training" if said.get("use_dropout") or any(said.get("dropout_structure") or ()) else ""],
        ["step", f"{step:,}" if type(step) is int else ""],
        ["trained on", checkpoint],
        *(["note", note] for note in file.notes),
    ]
    return [row for row in rows if row[1]]


def _bracketed(text: Any) -> str:
    return f"[{text}]" if type(text) is str and text else ""


def _activation(network: Network) -> str:
    if network.activation is None:
        return "none"
    return network.activation + (", also behind the last layer" if network.activates_output else "")


def _chain(file: HypernetFile, width: int, which: str) -> dict[str, Any]:
    layers = file.values(width, which)
    dtypes = {layer.weight.spec.dtype for layer in file.network.pairs[width]["kv".index(which)]}
    return {
        "width": width,
        "for": "keys" if which == "k" else "values",
        "layers": [width, *(len(layer.weight) for layer in layers)],
        "layer_norms": sum(layer.norm is not None for layer in layers),
        "dtypes": sorted(dtypes),
        "weights": [float(np.linalg.norm(layer.weight)) for layer in layers],
        "biases": [float(np.linalg.norm(layer.bias)) for layer in layers],
    }


def _row(facts: dict[str, Any]) -> list[str]:
    norms = f" +{count(facts['layer_norms'], 'norm')}" if facts["layer_norms"] else ""
    return [
        str(facts["width"]),
        facts["for"],
        "-".join(map(str, facts["layers"])) + norms,
        " ".join(facts["dtypes"]),
        "  ".join(f"{norm:.4g}" for norm in facts["weights"]),
        "  ".join(f"{norm:.4g}" for norm in facts["biases"]),
    ]


def _add_effects(report: Report, file: HypernetFile) -> None:
    """What every chain adds to Gaussian contexts c: |g| / |c|, the directions it uses, and R^2 of a linear map."""
    rows = []
    try:
        check_evaluable(file)
    except SdopsError as error:
        report.warnings.append(error.message)
        return
    for facts in report.data["chains"]:
        which = facts["for"][0]
        layers = file.values(facts["width"], which)
        found, gain = _effect(file, facts["width"], which, layers)
        facts |= {
            "gain": gain,
            "offset": float(np.linalg.norm(found.offset)),
            "directions": _directions(found.matrix),
            "linear_share": found.explained,
        }
        measures = f"{gain:.2%}", f"{facts['offset']:.3g}", f"{facts['directions']:.1f}", f"{found.explained:.3f}"
        rows.append([str(facts["width"]), facts["for"], *measures])
    columns = ("context>", "for", "change>", "offset>", "directions>", "linear R^2>")
    report.sections.append(Section("Effect on contexts of Gaussian numbers", rows, columns))


def _effect(file: HypernetFile, width: int, which: str, layers: list[Linear]) -> tuple[Affine, float]:
    """The map, and sqrt(E |g(c)|^2 / E |c|^2)."""
    if file.network.is_linear:
        found = affine_of(layers)
        energy = float(np.square(found.matrix).sum() + np.square(found.offset).sum())
        return found, (energy / width) ** 0.5
    contexts = np.random.default_rng(width).standard_normal((_SAMPLES * width, width))
    found = fitted([(file, 1.0)], width, which, contexts)
    return found, _gain(file, layers, contexts)


def _gain(file: HypernetFile, layers: list[Linear], contexts: Doubles) -> float:
    import torch

    from sdops.verbs._hypernet_chain import forward

    with torch.no_grad():
        changed = forward(file.network, layers)(torch.from_numpy(contexts).float())
    return float(np.linalg.norm(changed.numpy()) / np.linalg.norm(contexts))


def _directions(matrix: Doubles) -> float:
    """Effective rank: exp of the entropy of the squared singular values' shares."""
    values = np.maximum(np.linalg.eigvalsh(matrix.T @ matrix), 0)
    shares = values[values > 0] / max(float(values.sum()), 1e-300)
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0

"""Hypernetworks from any layout to any other, bit for bit."""

from __future__ import annotations

from pathlib import Path

from sdops.core.sink import check_inputs
from sdops.hub import is_reference
from sdops.hypernetworks import layout
from sdops.report import Report, Section
from sdops.text import size
from sdops.verbs._hypernet_open import FilePath, check_ending, check_layout, layout_for, open_network, save


def convert(
    file: FilePath,
    *,
    to: str | None = None,
    output: FilePath | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> Report:
    """Write a hypernetwork in another layout, its numbers unchanged.

    Args:
        file: Any layout.
        to: a1111, novelai or safetensors; default: what the output's ending says, else safetensors from `.pt` and the
            original's from safetensors.
        output: Where to write; default: beside the input.
        force: Replace an existing output.
        dry_run: Only say what would be written.

    Raises:
        UsageError: there is no such layout, or its files end otherwise.
        MismatchError: the layout cannot hold the network.
        OutputError: the output exists or cannot be written.
    """
    opened = open_network(file)
    network = opened.network
    try:
        path = None if output is None else Path(output)
        if to is None:
            is_own = opened.container == "safetensors"
            to = layout_for(path, network) if path is not None else (network.layout if is_own else "safetensors")
        to = check_layout(to)
        if path is None:
            path = (Path(opened.path.name) if is_reference(file) else opened.path).with_suffix(layout(to).ENDING)
        check_ending(to, path)
        check_inputs(path, [opened.path])
        written = layout(to).write(network)
        if not dry_run:
            save(written, layout(to).CONTAINER, opened.source, path, force=force)
    finally:
        opened.source.close()
    nbytes = sum(spec.nbytes for spec in opened.source.specs.values())
    report = Report("hypernet convert", result=[str(path)])
    report.data = {
        "input": str(file), "output": str(path), "from": network.layout, "to": to, "bytes": nbytes, "dry_run": dry_run,
        "left_out": list(network.lost),
    }  # fmt: skip
    verb = "would write" if dry_run else "wrote"
    report.sections = [Section("", [[verb, f"{path}, {size(nbytes)}"], ["layout", f"{network.layout} -> {to}"]])]
    if network.lost:
        report.warnings.append(f"left out, as it is no part of the network: {', '.join(network.lost)}")
    return report

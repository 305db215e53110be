"""Turns hypernetworks into LoRAs: exact where they are linear, biases included."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdops import __version__
from sdops.core.patch import Adapter, Target
from sdops.core.run import default_jobs
from sdops.errors import MismatchError, UsageError
from sdops.report import Progress, Report, Section, silent
from sdops.text import count, duration, size
from sdops.verbs._adapter_names import ARCHITECTURES, names_of
from sdops.verbs._apply_base import open_base
from sdops.verbs._file_strength import Wish
from sdops.verbs._hashes import part_record
from sdops.verbs._hypernet_apply import open_networks, report_of
from sdops.verbs._hypernet_layers import (
    Attention,
    Maps,
    Networks,
    attentions,
    bias_change,
    check_biases,
    contexts_of,
    key_change,
    maps_of,
    reached,
    reader,
    value_change,
)
from sdops.verbs._inputs import Model, Opened, input_of
from sdops.verbs._provenance import RECIPE
from sdops.verbs._rank_rules import checked

DTYPES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}


@dataclass(frozen=True, slots=True)
class Made:
    """What became of one layer.

    Attributes:
        target: The layer.
        rank: Of its factors; 0 if its difference is kept as it is.
        energy: ||dW||_F^2.
        captured: Share of it that is kept.
    """

    target: Target
    rank: int
    energy: float
    captured: float


def to_lora(
    *networks: Wish,
    model: Model,
    output: str | Path | None = None,
    rank: int | None = None,
    energy: float | None = None,
    fit: bool = False,
    to: str = "kohya",
    dtype: str = "fp16",
    jobs: int | None = None,
    force: bool = False,
    dry_run: bool = False,
    hash_inputs: bool = True,
    progress: Progress = silent,
) -> Report:
    """Write a LoRA that does to a model what hypernetworks do.

    For a linear network dW_k = m W_k A_k, dW_v = m W_v A_v and db_out = m W_out W_v b_v, without loss: layers where
    factors would be larger than the difference itself keep that. With a rank or an energy, every layer gets the best
    factors that these allow (Eckart and Young), and the report says what they keep.

    Args:
        networks: Hypernetworks in the order in which they act, see `apply`.
        model: The checkpoint that the LoRA will be used with.
        output: Where to write; default: `NETWORK.lora.safetensors` in this folder.
        rank: Highest rank of a layer.
        energy: Keep this share of the squared singular values.
        fit: Take the nearest linear map where a network is not linear.
        to: The dialect: kohya, comfy ...
        dtype: fp16, bf16 or fp32.
        jobs: Threads for writing.
        force: Replace an existing output.
        dry_run: Check everything, write nothing.
        hash_inputs: Record the inputs' SHA-256.
        progress: Called as `progress(label, total_bytes)`.

    Raises:
        UsageError, MismatchError, FormatError, OutputError: as `apply`; also if the dialect cannot hold a layer.
    """
    wishes = checked(rank=rank, energy=energy)
    if dtype not in DTYPES:
        raise UsageError(f"`dtype` cannot be `{dtype}`", hint=f"choose one of {', '.join(DTYPES)}")
    from sdops.dialects import dialect

    dialect(to)
    opened, base = open_networks(networks), open_base(model)
    found = reached(attentions(base), opened, base)
    targets = targets_of(base, [each.block for each in found])
    path = Path(f"{opened[0][0].path.stem}.lora.safetensors" if output is None else output)
    from sdops.verbs._adapter_save import check_output

    parts = [*(input_of(file.source) for file, _ in opened), base]
    check_output(path, parts, (), force=force)
    maps = maps_of(opened, found, contexts_of(base, found) if fit else None)
    check_biases(found, maps, base)
    report = report_of("hypernet to-lora", base, opened, found, maps, path)
    report.data |= {"dry_run": dry_run, "to": to, "dtype": dtype}
    if dry_run:
        report.hints.append("nothing was written; leave `--dry-run` away to write the LoRA")
        return report
    begin = time.monotonic()
    records = [part_record(f"hypernet{n}", part) for n, part in enumerate(parts[:-1], start=1)]
    recipe = {
        "version": __version__, "verb": "hypernet to-lora", **wishes, "strengths": [s for _, s in opened], "to": to,
        "dtype": dtype, "inputs": [*records, part_record("base", base)],
    }  # fmt: skip

    ranks = {width: _most(opened, width) for width in maps}

    def work(pieces: Any, advance: Callable[[int], None]) -> list[Made]:
        return _layers(base, found, maps, ranks, targets, wishes, DTYPES[dtype], pieces, advance)

    made, nbytes = write_lora(
        work, sum(_nbytes(base, each) for each in found), base, path, parts, recipe, to,
        jobs=jobs or default_jobs(), force=force, hash_inputs=hash_inputs, progress=progress,
    )  # fmt: skip
    add_result(report, path, nbytes, time.monotonic() - begin, made)
    if not all(each.rank for each in made):
        report.hints.append("`--rank 64` makes factors of all layers, which every program reads, and says what is lost")
    if any(maps[each.width].v.offset.any() for each in found):
        report.warnings.append(
            "the values' biases are written as changes of `to_out` biases (`diff_b`), which kohya's trainer, ComfyUI "
            "and Forge read; AUTOMATIC1111 and SD.Next pass over them"
        )
    return report


def targets_of(model: Opened, blocks: Sequence[str]) -> dict[str, Target]:
    """Block of an attention in the model -> a target whose module is the same block in the canonical layout.

    Raises:
        MismatchError: adapters for this model have no names that are known.
    """
    family = model.detection.family
    main = model.detection.main
    if main is None or all(architecture.family != family for architecture in ARCHITECTURES):
        raise MismatchError(
            f"LoRAs for `{model.name}` ({model.detection.title}) have no names that are known",
            hint="give a whole U-Net of SD1, SD2 or SDXL",
        )
    names = names_of(family)
    known = {
        name: target for layout in names.layouts(names.denoiser)
        for name, target in names.modules(names.denoiser, layout).items()
    }  # fmt: skip
    found = {}
    for block in blocks:
        target = known.get(f"{block.removeprefix(main.prefix)}.to_k")
        if target is None:
            raise MismatchError(
                f"`{block}` of `{model.name}` is no layer of {model.detection.title}",
                hint="`sdops inspect -v` shows what is unusual about the model",
            )
        found[block] = Target(target.component, target.module.removesuffix(".to_k"))
    return found


def _layers(
    model: Opened,
    found: Sequence[Attention],
    maps: Mapping[int, Maps],
    ranks: Mapping[int, int],
    targets: Mapping[str, Target],
    wishes: Mapping[str, float],
    dtype: str,
    pieces: Any,
    advance: Callable[[int], None],
) -> list[Made]:
    """Put the changes of all attentions among the pieces."""
    import torch

    read, made = reader(model.source), []
    for each in found:
        block = targets[each.block]
        for name, change in (("to_k", key_change), ("to_v", value_change)):
            target = Target(block.component, f"{block.module}.{name}")
            matrix = torch.from_numpy(change(each, maps, read))
            made.append(_add_change(pieces, target, matrix, ranks[each.width], wishes, dtype))
        if maps[each.width].v.offset.any():
            target = Target(block.component, f"{block.module}.to_out.0")
            pieces.add_full(target, dtype, bias=torch.from_numpy(bias_change(each, maps, read)))
        advance(_nbytes(model, each))
    return made


def _nbytes(model: Opened, each: Attention) -> int:
    return model.source.specs[each.keys].nbytes + model.source.specs[each.values].nbytes


def _most(networks: Networks, width: int) -> int:
    """The rank that the maps at a width can have: hidden units of the narrowest layers, where all are linear."""
    ranks = [
        min(layer.weight.spec.shape[0] for layer in chain)
        for file, _ in networks
        if width in file.network.pairs
        for chain in file.network.pairs[width]
    ]
    linear = all(file.network.is_linear for file, _ in networks)
    return min(sum(ranks), width) if linear else width


def _add_change(pieces: Any, target: Target, change: Any, most: int, wishes: Mapping[str, float], dtype: str) -> Made:
    """A dense change [o, i], float64, of a rank of at most `most`, as factors, or as it is where these are larger.

    `rank` and `energy` in the wishes limit the factors; without them nothing is lost.
    """
    from sdops.core.lowrank import decompose, squared_norm
    from sdops.core.ranks import energy, fixed, lowest
    from sdops.verbs._adapter_changes import LOSSLESS

    rule = LOSSLESS
    if "rank" in wishes:
        rule = lowest(fixed(int(wishes["rank"])), LOSSLESS)
    elif "energy" in wishes:
        rule = energy(wishes["energy"])
    whole = squared_norm(change)
    rows, columns = change.shape
    if not wishes and min(most, rows, columns) * (rows + columns) >= rows * columns:
        pieces.add_full(target, dtype, dense=change)
        return Made(target, 0, whole, 1.0)
    found = decompose(change, rule, engine="gram" if wishes else "exact", name=str(target))
    pieces.add_factors(target, tuple(change.shape), found.up, found.down, dtype)
    kept = float(found.spectrum.values[: found.rank].square().sum())
    return Made(target, found.rank, whole, min(kept / whole, 1.0) if whole else 1.0)


def write_lora(
    work: Callable[[Any, Callable[[int], None]], list[Made]],
    steps: int,
    model: Opened,
    path: Path,
    inputs: Sequence[Opened],
    recipe: Mapping[str, Any],
    to: str,
    *,
    jobs: int,
    force: bool,
    hash_inputs: bool,
    progress: Progress,
) -> tuple[list[Made], int]:
    """Write a LoRA for a model of which `work` makes the pieces; returns what it made, and the size in bytes."""
    import json

    from sdops.verbs._adapter_output import Pieces
    from sdops.verbs._adapter_save import save
    from sdops.verbs._adapters import spelled

    with Pieces(path.resolve().parent, model.name) as pieces:
        with progress("converting", steps) as advance:
            made = work(pieces, advance)
        like = Adapter(model.source, "", model.detection.family, ())
        ranks = {str(each.rank) for each in made if each.rank}
        header = {
            "format": "pt",
            "modelspec.title": path.stem,
            "ss_network_module": "networks.lora",
            **({"ss_network_dim": ranks.copy().pop() if len(ranks) == 1 else "Dynamic"} if ranks else {}),
            RECIPE: json.dumps(recipe, ensure_ascii=False, separators=(",", ":")),
        }
        written = spelled(pieces.adapter(like, header), to)
        nbytes = save(written, path, inputs, jobs=jobs, force=force, hash_inputs=hash_inputs, progress=progress)
    return made, nbytes


def add_result(report: Report, path: Path, nbytes: int, seconds: float, made: Sequence[Made]) -> None:
    """What was written, and what the ranks keep."""
    whole = sum(each.energy for each in made)
    kept = sum(each.energy * each.captured for each in made)
    ranks = [each.rank for each in made if each.rank]
    report.data |= {
        "bytes": nbytes,
        "captured": kept / whole if whole else 1.0,
        "layers": [
            {"layer": str(each.target), "rank": each.rank, "norm": each.energy**0.5, "captured": each.captured}
            for each in made
        ],
    }
    rows = [["wrote", f"{path}, {size(nbytes)} in {duration(seconds)}"]]
    if ranks:
        rows.append(["ranks", f"{min(ranks)} to {max(ranks)} in {count(len(ranks), 'layer')}"])
    if len(ranks) < len(made):
        rows.append(["as they are", f"{count(len(made) - len(ranks), 'layer')}, where factors would be larger"])
    rows.append(["captured", f"{report.data['captured']:.4%} of the squared change"])
    report.sections.append(Section("Result", rows))
    table = [[str(m.target), str(m.rank or "full"), f"{m.energy**0.5:.4g}", f"{m.captured:.2%}"] for m in made]
    report.sections.append(Section("By layer", table, ("layer", "rank>", "norm>", "captured>"), detail=True))

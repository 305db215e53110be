"""What `inspect` tells of adapters beyond any file: dialect, families, ranks, alphas, what they were made on. No torch,
but for the measures that are asked for (`--norms`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from sdops import adapters
from sdops.core.patch import Adapter, Patch
from sdops.errors import FormatError, SdopsError
from sdops.report import HEAT, Progress, Report, Section
from sdops.text import count, shorten
from sdops.verbs._adapter_blocks import Blocks
from sdops.verbs._adapter_family import title_of
from sdops.verbs._adapter_metadata import tags, trained_words, trigger_words
from sdops.verbs._adapter_source import values_of
from sdops.verbs._adapters import open_adapter, patch_bytes

_BASES = ("ss_sd_model_name", "ss_base_model_version", "modelspec.architecture", "base_model_name_or_path")
_TAGS = 12
_KINDS = 6
_CLAMPED = 0.003  # share of numbers at the bound that no training leaves there
_BOUNDS = (0.1, 0.25, 0.5, 0.75)  # of the largest block -> shade of report.HEAT


@contextmanager
def opened(path: Path) -> Iterator[Adapter | str]:
    """The adapter in a file, or why it cannot be read as such, which is a warning, no error."""
    try:
        adapter = open_adapter(path, allow_unknown=True)
    except SdopsError as error:
        yield f"it looks like an adapter, but {error.message}"
        return
    with closing(adapter.source):
        yield adapter


def understood(adapter: Adapter) -> set[str]:
    """The tensors of which its dialect's reader knows what they are; none of embeddings alone, which are no adapter."""
    parts = {key for patch in adapter.patches for key in patch.parts.values()}
    return parts | adapter.extras.keys() if parts else set()


def add_adapter(report: Report, adapter: Adapter, *, norms: bool, progress: Progress) -> None:
    """Add to a report what there is to say of an adapter."""
    if not adapter.patches:  # embeddings alone are no adapter
        return
    facts = facts_of(adapter)
    report.data["adapter"] = facts
    found = [Section("Adapter", _rows(facts)), _components(facts)]
    if norms:
        found += _measured(adapter, facts, progress, report)
    report.sections[1:1] = found
    report.warnings += [*adapter.notes, *_oddities(adapter, facts)]


def told_apart(one: Mapping[str, Any], other: Mapping[str, Any]) -> Section:
    """In which of the facts of `inspect` two adapters differ, side by side; a section without rows if in none."""
    left, right = dict(_rows(one)), dict(_rows(other))
    names = [name for name in dict.fromkeys((*left, *right)) if left.get(name) != right.get(name)]
    return Section("Adapters", [(name, left.get(name, ""), right.get(name, "")) for name in names], ("", "A", "B"))


def facts_of(adapter: Adapter) -> dict[str, Any]:
    """What names, shapes, alphas and the header tell of an adapter."""
    metadata = adapter.source.metadata
    ranks, alphas = _ranks(adapter), _alphas(adapter)
    return {
        "dialect": adapter.dialect,
        "architecture": f"{adapter.architecture} {adapter.variant}".strip(),
        "rivals": list(adapter.rivals),
        "families": dict(Counter(map(_family, adapter.patches)).most_common()),
        "ranks": {str(rank): number for rank, number in sorted(Counter(ranks).items())},
        "alphas": {f"{alpha:g}": number for alpha, number in sorted(Counter(alphas).items())},
        "components": {
            name: dict(Counter(_kind(p.target.module) for p in patches).most_common())
            for name, patches in _by_component(adapter.patches).items()
        },
        "embeddings": sorted(adapter.extras.values()),
        "trained_on": {key: metadata[key] for key in _BASES if metadata.get(key)},
        "trigger_words": trigger_words(metadata),
        "trained_words": trained_words(metadata),
        "tags": dict(tags(metadata).most_common()),
        "unknown": list(adapter.unknown),
    }


def _family(patch: Patch) -> str:
    """The family in the words of people: DoRA and Tucker are ways of one."""
    name = "LoCon (Tucker)" if "mid" in patch.parts else patch.family
    is_dora = {"dora_scale", "magnitude"} & patch.parts.keys()
    return f"{name} with DoRA" if is_dora else name


def _ranks(adapter: Adapter) -> list[int]:
    facts = [adapters.family(patch.family).check(adapter.shapes(patch), None) for patch in adapter.patches]
    return [each.rank for each in facts if each.rank is not None]


def _alphas(adapter: Adapter) -> list[float]:
    found = [
        float(values_of(adapter.source, p.parts["lora_alpha"])[0, 0])
        for p in adapter.patches
        if "lora_alpha" in p.parts
    ]
    return found + [float(p.settings["lora_alpha"]) for p in adapter.patches if "lora_alpha" in p.settings]


def _by_component(patches: Iterable[Patch]) -> dict[str, list[Patch]]:
    found: dict[str, list[Patch]] = {}
    for patch in patches:
        found.setdefault(patch.target.component, []).append(patch)
    return found


def _kind(module: str) -> str:
    """The last words of a module's name: `attn1.to_q`, `mlp.fc1`, `ff.proj`."""
    words = [word for word in module.split(".") if not word.isdigit() and word != "net"]
    return ".".join(words[-2:])


def _rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    words = facts["trigger_words"] or ["none in the metadata"]
    most = [f"{shorten(tag, 40)} {number:,}" for tag, number in list(facts["tags"].items())[:_TAGS]]
    rows = [
        ("dialect", facts["dialect"]),
        ("model", _model(facts)),
        ("families", _counted(facts["families"])),
        ("ranks", _counted(facts["ranks"])),
        ("alphas", _counted(facts["alphas"]) or "none: as the ranks"),
        ("trained on", ", ".join(shorten(text, 80) for text in facts["trained_on"].values())),
        ("trigger words", ", ".join(shorten(word, 60) for word in words[:_TAGS])),
        ("trained words", ", ".join(shorten(word, 60) for word in facts["trained_words"][:_TAGS])),
        ("tags", ", ".join(most)),
        ("embeddings", ", ".join(map(_embedding, facts["embeddings"]))),
    ]
    return [row for row in rows if row[1]]


def _model(facts: Mapping[str, Any]) -> str:
    """`Flux.1 (flux1)`, and what else it may be for."""
    family, _, variant = facts["architecture"].partition(" ")
    others = " or ".join(map(title_of, facts["rivals"]))
    title = f"{title_of(family)} {variant}".strip()
    return f"{title} ({family})" + (f"; or {others}, nothing in the file tells" if others else "")


def _embedding(what: str) -> str:
    """`embedding clip_l <s1>` -> `<s1> (clip_l)`."""
    _, component, token = what.split(" ", 2)
    return f"{shorten(token, 40)} ({component})"


def _counted(counts: Mapping[str, int]) -> str:
    """`lora 190, full 2`; of one kind alone no number."""
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{name} ({number:,})" for name, number in counts.items())


def _components(facts: Mapping[str, Any]) -> Section:
    rows = []
    for name, kinds in facts["components"].items():
        shown = ", ".join(f"{kind} {number:,}" for kind, number in list(kinds.items())[:_KINDS])
        more = f" and {len(kinds) - _KINDS} other kinds" if len(kinds) > _KINDS else ""
        rows.append((name, f"{sum(kinds.values()):,}", shown + more))
    return Section("Layers that it changes", rows, ("component", "layers>", "kinds"))


def _oddities(adapter: Adapter, facts: Mapping[str, Any]) -> list[str]:
    """What is known to make trouble in other programs."""
    found = []
    if facts["unknown"]:
        keys = ", ".join(f"`{key}`" for key in facts["unknown"][:3])
        found.append(f"{count(len(facts['unknown']), 'tensor')} that nothing here understands: {keys}")
    said = adapter.source.metadata.get("ss_network_dim", "")
    if said.isdigit() and facts["ranks"] and said not in facts["ranks"]:
        found.append(f"the metadata say rank {said}, the tensors {', '.join(facts['ranks'])}")
    return found


# ------------------------------------------------------------------------------------------------------------ measures


def _measured(adapter: Adapter, facts: dict[str, Any], progress: Progress, report: Report) -> list[Section]:
    """Norms by block and the marks of a clamp, from the tensors."""
    from sdops.verbs._adapter_changes import change_of, norm_of
    from sdops.verbs._adapter_measures import clamped_share
    from sdops.verbs._adapters import read_parts

    blocks = Blocks(adapter)
    squares: dict[str, list[float]] = {slot: [] for slot in blocks.slots}
    shares, skipped, damaged = [], 0, list[str]()
    with progress("measuring", sum(patch_bytes(adapter, patch) for patch in adapter.patches)) as advance:
        for patch in adapter.patches:
            try:
                if adapters.family(patch.family).needs_weight(patch.parts):
                    skipped += 1
                else:
                    squares.setdefault(blocks.row(patch.target), []).append(norm_of(change_of(adapter, patch)) ** 2)
                if patch.family == "lora":
                    shares.append(clamped_share(read_parts(adapter, patch)))
            except FormatError as error:
                damaged.append(error.message)
            advance(patch_bytes(adapter, patch))
    norms = {block: math.sqrt(math.fsum(each)) for block, each in squares.items() if each}
    typical = median(shares) if shares else 0.0
    facts["norms"], facts["clamped"] = norms, typical
    if typical > _CLAMPED:
        report.warnings.append(
            f"{typical:.1%} of the numbers of a typical layer lie exactly at the largest: it was extracted by a "
            "program that clamps, and lost strength by that"
        )
        report.hints.append("`sdops extract TUNED --base BASE` extracts without clamping")
    facts["damaged"] = len(damaged)
    if damaged:
        others = f", and {count(len(damaged) - 1, 'other layer')} cannot be measured" if len(damaged) > 1 else ""
        report.warnings.append(f"{damaged[0]}{others}: the training diverged or the file is damaged")
    if skipped:
        report.warnings.append(f"{count(skipped, 'layer')} not measured: their change depends on the base")
    highest = max(norms.values(), default=0.0)
    rows = [
        (block, HEAT[sum(norm > bound * highest for bound in _BOUNDS)] * 4, f"{norm:.4g}", f"{len(squares[block]):,}")
        for block, norm in norms.items()
    ]
    return [Section("Size of the change by block", rows, ("block", "", "norm>", "layers>"), heat=True)]

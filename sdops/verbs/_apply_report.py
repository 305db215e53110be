"""What an `apply` tells: beforehand (`--dry-run`) and when it is done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdops.core import files
from sdops.report import Report, Section
from sdops.text import count, duration, size
from sdops.verbs._memory import PYTHON, TORCH
from sdops.verbs._space import lacking_space

if TYPE_CHECKING:
    from sdops.verbs._apply_changes import Matched
    from sdops.verbs._apply_loras import Lora
    from sdops.verbs.apply import Apply

LOST = 0.95  # warn if less of what the LoRAs add survives rounding
_WORST = 10


def dry_report(apply: Apply, output: Path, jobs: int) -> Report:
    """Everything that is known without reading the model's tensors."""
    report = _common(apply, output)
    written, free = _written(apply), files.free_space(output.absolute().parent)
    memory = _memory(apply, jobs)
    report.data |= {"dry_run": True, "free_bytes": free, "memory_bytes": memory, "jobs": jobs}
    rows = [
        ["writes", f"{size(written)}, {size(free)} are free there"],
        ["memory", f"about {size(memory)} with {count(jobs, 'thread')}"],
    ]
    report.sections.append(Section("Costs", rows))
    report.warnings += lacking_space(output, written)
    report.hints.append("nothing was written; leave `--dry-run` away to apply")
    return report


def done_report(apply: Apply, output: Path, seconds: float, recipe: Mapping[str, Any]) -> Report:
    """What was written, and how much of the LoRAs survived the rounding."""
    report = _common(apply, output)
    adder = apply.computed.adder
    kept, overall, overflow = adder.kept(), adder.kept_overall(), sum(adder.overflows.values())
    low = {key: share for key, share in kept.items() if share < LOST}
    report.data |= {
        "recipe": recipe,
        "seconds": round(seconds, 3),
        "kept_overall": overall,
        "kept": kept,
        "overflows": dict(adder.overflows),
    }
    rows = [["strength kept", f"{overall:.1%} of what was added survived the rounding"]] if overall is not None else []
    if low:
        rows.append(["below 95 %", count(len(low), "tensor")])
    rows.append(["time", f"{duration(seconds)}, {size(round(_written(apply) / max(seconds, 1e-9)))}/s written"])
    report.sections.append(Section("Result", rows))
    worst = sorted(low.items(), key=lambda item: item[1])[:_WORST]
    report.sections.append(Section("Least kept", [[key, f"{share:.0%}"] for key, share in worst], detail=True))
    if overall is not None and overall < LOST:
        report.warnings.append(_swallowed(apply, overall, len(low)))
    if overflow:
        key = next(iter(adder.overflows))
        report.warnings.append(
            f"{count(overflow, 'value')} of {count(len(adder.overflows), 'tensor')} were too large for the output "
            f"dtype and were clamped, first in `{key}`; `--touched-dtype bf16` or `--touched-dtype fp32` holds them"
        )
    return report


def _swallowed(apply: Apply, overall: float, tensors: int) -> str:
    dtypes = Counter(apply.specs[key].dtype for key in apply.changes.terms)
    dtype = dtypes.most_common(1)[0][0]
    cures = ["`--touched-dtype fp16`"] if dtype != "F16" else []
    cures += ["`--touched-dtype fp32`", "`--rounding stochastic`"]
    return (
        f"rounding to {dtype} kept only {overall:.0%} of what the LoRAs add ({count(tensors, 'tensor')} below 95 %); "
        f"{' or '.join(cures)} keeps it, and so does loading the LoRA beside the model"
    )


def _common(apply: Apply, output: Path) -> Report:
    loras = list(zip(apply.loras, apply.changes.matched, strict=True))
    report = Report(apply.verb, result=[str(output)])
    report.data = {
        "output": str(output),
        "recipe": apply.made,
        "family": apply.model.detection.family,
        "tensors": {"changed": len(apply.changes.terms), "copied": len(apply.specs) - len(apply.changes.terms)},
        "write_bytes": _written(apply),
        "loras": [_facts(lora, matched) for lora, matched in loras],
    }
    rows = [
        ["model", f"{apply.model.name}  ({apply.model.detection.title})"],
        ["changed", f"{count(len(apply.changes.terms), 'tensor')} of {len(apply.specs):,}"],
        ["dtypes", ", ".join(_dtypes(apply))],
    ]
    report.sections = [Section(str(output), rows)]
    report.sections += [Section(lora.name, _rows(lora, matched)) for lora, matched in loras]
    report.warnings = [*apply.warnings, *(text for lora, matched in loras for text in _omissions(lora, matched))]
    if not apply.changes.terms:
        report.warnings.append("nothing changes: all strengths are 0, or no layer is the model's")
    return report


def _facts(lora: Lora, matched: Matched) -> dict[str, Any]:
    return {
        "file": lora.name,
        "dialect": lora.adapter.dialect,
        "family": lora.adapter.architecture,
        "strength": lora.strength.to_json(),
        "modules": dict(matched.modules),
        "families": dict(matched.families),
        "ranks": {str(rank): number for rank, number in sorted(matched.ranks.items())},
        "tensors": len(matched.keys),
        "unmatched": matched.unmatched,
        "without_strength": matched.silent,
        "grown": {key: list(shape) for key, shape in matched.grown.items()},
        "unknown": list(lora.adapter.unknown),
        "extras": dict(lora.adapter.extras),
    }


def _rows(lora: Lora, matched: Matched) -> list[list[str]]:
    ranks = ", ".join(f"{rank} ({number}x)" for rank, number in sorted(matched.ranks.items()))
    rows = [
        ["strength", str(lora.strength)],
        ["spelled", f"{lora.adapter.dialect}, for {lora.adapter.architecture}"],
        ["layers", ", ".join(f"{number:,} of {name}" for name, number in matched.modules.items()) or "none"],
        ["families", ", ".join(f"{name} ({number}x)" for name, number in matched.families.items()) or "none"],
        ["ranks", ranks or "none"],
    ]
    rows += [["strength 0", count(matched.silent, "layer")]] if matched.silent else []
    rows += [["enlarged", f"`{key}` to {list(shape)}"] for key, shape in matched.grown.items()]
    return rows


def _omissions(lora: Lora, matched: Matched) -> list[str]:
    """What of a LoRA does not reach the model."""
    texts = [*(lora.strength.dial.notes), *(lora.strength.blocks.notes if lora.strength.blocks else ())]
    if matched.unmatched:
        texts.append(
            f"{count(len(matched.unmatched), 'layer')} of `{lora.name}` are not in the model and were left out, "
            f"first `{matched.unmatched[0]}`"
        )
    if lora.adapter.unknown:
        texts.append(
            f"{count(len(lora.adapter.unknown), 'tensor')} of `{lora.name}` were not understood and left out, "
            f"first `{lora.adapter.unknown[0]}`"
        )
    if lora.adapter.extras:
        what = next(iter(lora.adapter.extras.values()))
        texts.append(f"`{lora.name}` also holds what no weight can take up ({what}): it is left out")
    return texts


def _memory(apply: Apply, jobs: int) -> int:
    """Estimate: portions and factors where these suffice; a few times the largest tensor that torch makes at once."""
    changes = apply.computed.changes
    whole = [change.spec.numel for key, change in changes.items() if not apply.computed.splits(key)]
    return (TORCH + jobs * 24 * max(whole) if whole else PYTHON) + jobs * (12 << 20)


def _written(apply: Apply) -> int:
    return sum(spec.nbytes for spec in apply.specs.values())


def _dtypes(apply: Apply) -> list[str]:
    sizes: Counter[str] = Counter()
    for spec in apply.specs.values():
        sizes[spec.dtype] += spec.nbytes
    return [dtype for dtype, _ in sizes.most_common()]

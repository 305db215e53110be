"""What a merge tells: beforehand (`--dry-run`) and when it is done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdops.core import files
from sdops.report import Report, Section
from sdops.text import count, duration, size
from sdops.verbs._memory import fixed_memory, whole_tensor_bytes
from sdops.verbs._relaid import shown
from sdops.verbs._space import lacking_space

if TYPE_CHECKING:
    from sdops.verbs.merge import Merge

LOST = 0.9  # warn if less of a model's contribution survives rounding
SHOWN = 3  # names per line before "..."


def dry_report(merge: Merge, output: Path, jobs: int) -> Report:
    """Everything that is known without reading tensors."""
    plan = merge.plan
    memory = fixed_memory(merge, jobs) + whole_tensor_bytes(merge)[0]
    free = files.free_space(output.absolute().parent)
    report = _common(merge, output)
    report.data |= {
        "dry_run": True,
        "read_bytes": plan.read_bytes * plan.passes,
        "passes": plan.passes,
        "memory_bytes": memory,
        "jobs": jobs,
        "free_bytes": free,
    }
    report.sections.append(
        Section(
            "Costs",
            [
                ["reads", f"{size(plan.read_bytes)} in {count(plan.passes, 'pass')}"],
                ["writes", f"{size(plan.write_bytes)}, {size(free)} are free there"],
                ["memory", f"about {size(memory)} with {count(jobs, 'thread')}"],
            ],
        )
    )
    report.warnings += lacking_space(output, plan.write_bytes)
    report.hints.append("nothing was written; leave `--dry-run` away to merge")
    return report


def done_report(merge: Merge, output: Path, seconds: float, recipe: Mapping[str, Any]) -> Report:
    """What was written and what became of the models' contributions."""
    report = _common(merge, output)
    report.data["recipe"] = recipe
    computed = merge.computed
    shares = {_name(merge, index): share for index, share in computed.retained.shares().items()}
    overflow = sum(computed.overflows.values())
    report.data |= {
        "seconds": round(seconds, 3),
        "retained": shares,
        "overflows": dict(computed.overflows),
        **({"found": computed.remark} if computed.remark else {}),
    }
    speed = (merge.plan.read_bytes * merge.plan.passes + merge.plan.write_bytes) / max(seconds, 1e-9)
    rows = [[f"retained of {name}", f"{share:.0%}"] for name, share in shares.items()]
    if computed.remark:
        rows.append(["found", computed.remark])
    rows.append(["time", f"{duration(seconds)}, {size(round(speed))}/s read and written"])
    report.sections.append(Section("Result", rows))
    for name, share in shares.items():
        if share < LOST:
            report.warnings.append(
                f"rounding swallowed {1 - share:.0%} of the change that {name} was to make; "
                "`--dtype fp32` keeps it, a larger weight loses less"
            )
    if overflow:
        key = next(iter(computed.overflows))
        report.warnings.append(
            f"{count(overflow, 'value')} of {count(len(computed.overflows), 'tensor')} were too large for the output "
            f"dtype and were clamped, first in `{key}`; `--dtype bf16` or `--dtype fp32` holds them"
        )
    return report


def _common(merge: Merge, output: Path) -> Report:
    plan = merge.plan
    reasons = Counter(step.reason for step in plan.steps.values() if step.reason)
    report = Report("merge", result=[str(output)])
    report.data = {
        "output": str(output),
        "method": merge.card.name.replace("_", "-"),
        "recipe": merge.made,
        "family": merge.parts["a"].detection.family,
        "layouts": {role: dict(part.layouts) for role, part in merge.parts.items() if part.layouts},
        "tensors": {action: plan.count(action) for action in ("merge", "copy", "cast", "value") if plan.count(action)},
        "write_bytes": plan.write_bytes,
        "reasons": dict(reasons),
        "dropped": dict(plan.dropped),
        "repaired": dict(plan.repaired),
        "rules": dict(plan.rules),
    }
    report.sections = [Section(str(output), _rows(merge, reasons))]
    if plan.rules:
        report.sections.append(Section("Rules", [[rule, count(n, "tensor")] for rule, n in plan.rules.items()]))
    report.warnings = [*plan.warnings, *(f"`{key}`: {why}" for key, why in plan.repaired.items())]
    return report


def _rows(merge: Merge, reasons: Counter[str]) -> list[list[str]]:
    plan = merge.plan
    rows = [
        ["method", f"{merge.card.name.replace('_', '-')}: {_formula(merge)}"],
        *([role, f"{part.name}  ({part.detection.title})"] for role, part in merge.parts.items()),
        *(["layouts", f"`{part.name}`: {shown(part.layouts)}"] for part in merge.parts.values() if part.layouts),
        ["knobs", ", ".join(f"{name} {value}" for name, value in merge.knobs.items()) or "none"],
        ["merged", count(plan.count("merge"), "tensor")],
    ]
    rows += [["copied", f"{count(number, 'tensor')}: {reason}"] for reason, number in reasons.items()]
    dropped: dict[str, list[str]] = {}
    for key, why in plan.dropped.items():
        dropped.setdefault(why, []).append(key)
    for why, keys in dropped.items():
        names = ", ".join(keys[:SHOWN]) + (", ..." if len(keys) > SHOWN else "")
        rows.append(["dropped", f"{count(len(keys), 'tensor')}, {why}: {names}"])
    return [*rows, ["size", f"{size(plan.write_bytes)} in {count(len(plan.steps), 'tensor')}, {_dtypes(merge)}"]]


def _formula(merge: Merge) -> str:
    return merge.card.doc.partition("\n")[0].rstrip(".")


def _dtypes(merge: Merge) -> str:
    sizes: Counter[str] = Counter()
    for spec in merge.specs.values():
        sizes[spec.dtype] += spec.nbytes
    return ", ".join(dtype for dtype, _ in sizes.most_common())


def _name(merge: Merge, index: int) -> str:
    """How the report calls the model that a contribution comes from."""
    if index < 0:
        return "the merge"
    parts: list[Any] = [part for role, part in merge.parts.items() if role not in ("vae", "text_encoder")]
    return f"`{parts[index].name}`"

"""What is told of a recipe that was built, or would be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sdops.report import Report, Section
from sdops.text import duration, shorten, size
from sdops.verbs._recipe_check import CheckedStep
from sdops.verbs._recipe_plan import Planned
from sdops.verbs._recipe_text import spelled


def build_report(
    planned: Planned, output: Path, done: Report, asked: Mapping[str, Report], seconds: float, *, dry_run: bool
) -> Report:
    """The report of `build`.

    Args:
        planned: What was built.
        output: Where the result went.
        done: The last step's own report.
        asked: Reports of the steps that wrote a file of their own.
        seconds: What it took.
        dry_run: Whether nothing was written.
    """
    checked = planned.checked
    report = Report("build", result=[*(line for one in asked.values() for line in one.result), *done.result])
    report.data = {
        "recipe": checked.recipe.name,
        "parameters": dict(checked.values),
        "inputs": {name: {"file": one.address, "sha256": one.input.sha256} for name, one in planned.found.items()},
        "steps": [{"id": step.id, "verb": step.step.verb, "arguments": dict(step.arguments)} for step in checked.steps],
        "output": str(output),
        "dry_run": dry_run,
        "seconds": round(seconds, 3),
        "result": done.as_dict(),
        "outputs": {name: one.as_dict() for name, one in asked.items()},
    }
    verb = "would write" if dry_run else "wrote"
    rows = [
        ("recipe", checked.recipe.name + (f": {checked.recipe.about}" if checked.recipe.about else "")),
        (verb, f"{output}{_size(output, done, dry_run=dry_run)}" + ("" if dry_run else f" in {duration(seconds)}")),
    ]
    rows += [(verb, f"{path}, step `{name}`") for name, path in planned.outputs().items()]
    if checked.values:
        rows.append(("parameters", ", ".join(f"{name} {spelled(value)}" for name, value in checked.values.items())))
    report.sections = [
        Section("", rows),
        Section("Inputs", [(name, _described(planned, name)) for name in planned.found]),
        Section("Steps", [(step.id, in_words(step)) for step in checked.steps]),
    ]
    own = [section for section in done.sections if section.heading != "Costs"]
    for section in own:
        section.detail = section.detail or not (section.heading == "Result" or dry_run)
        section.rows = [[planned.by_id(cell) for cell in row] for row in section.rows]
        if section.heading == str(output):
            section.heading = "Last step"
    report.sections += own
    warnings = [*checked.warnings, *_foreign(planned), *planned.warnings(), *done.warnings]
    report.warnings = list(dict.fromkeys(planned.by_id(text) for text in warnings))
    if planned.is_trial and dry_run:
        report.warnings.append(
            "the ranks of LoRAs that steps make are not known before they are worked out; this plan counts with rank 1"
        )
    if dry_run:
        report.hints.append("nothing was written; leave `--dry-run` away to build")
    return report


def _size(output: Path, done: Report, *, dry_run: bool) -> str:
    nbytes: Any = done.data.get("write_bytes", done.data.get("bytes"))
    if not dry_run and output.is_file():
        nbytes = output.stat().st_size
    return f", {size(nbytes)}" if isinstance(nbytes, int) else ""


def _foreign(planned: Planned) -> Iterator[str]:
    """Models of families that the recipe's tags do not name, where they name some."""
    from sdops.archs.detect import detect
    from sdops.archs.tables import tables

    recipe = planned.checked.recipe
    if not (families := {table.family for table in tables() if table.kind == "model"} & {*recipe.tags}):
        return
    for name, one in planned.found.items():
        found = detect(one.opened.specs) if one.opened else None
        if found and found.main and found.main.kind == "model" and found.family not in families:
            yield f"`{recipe.name}` is for {' and '.join(sorted(families))}, but `{name}` is {found.title}"


def _described(planned: Planned, name: str) -> str:
    one = planned.found[name]
    known = ", as expected" if one.input.sha256 and one.checked else ""
    total = sum(file.stat().st_size for file in one.files() if file.is_file())
    return f"{one.address}" + (f"  ({size(total)}{known})" if total else known)


def in_words(step: CheckedStep) -> str:
    """`merge base, tuned: add-difference, alpha 0.5`."""
    names = ", ".join(name for name in step.uses)
    said = {key: value for key, value in step.arguments.items() if not _names(value, step.uses)}
    method = said.pop("method", None)
    words = [str(method)] if method else []
    words += [key if value is True else f"{key} {shorten(_spelled(value), 60)}" for key, value in said.items()]
    return f"{step.step.verb} {names}" + (f": {', '.join(words)}" if words else "")


def _names(value: Any, uses: tuple[str, ...]) -> bool:
    """Whether it says nothing but which files are used."""
    if isinstance(value, list):
        return bool(value) and all(_names(item, uses) for item in value)
    return isinstance(value, str) and value in uses


def _spelled(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_spelled, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)

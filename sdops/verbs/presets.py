"""The recipes that come with sdops: what each is for, what goes in, what can be set."""

from __future__ import annotations

from collections.abc import Iterator

from sdops.errors import UsageError
from sdops.presets import names, preset_file
from sdops.report import Report, Section
from sdops.text import suggest
from sdops.verbs._recipe_check import check_recipe
from sdops.verbs._recipe_report import in_words
from sdops.verbs._recipe_text import Parameter, Recipe, read_recipe


def presets(name: str | None = None) -> Report:
    """List the presets, or explain one.

    Args:
        name: A preset.

    Raises:
        UsageError: there is none of that name; the closest is suggested.
    """
    if name is None:
        return _list()
    wanted = name.lower().replace("_", "-")
    if wanted not in names():
        close = suggest(wanted, names())
        hint = f"did you mean `{close}`?" if close else "`sdops presets` lists them"
        raise UsageError(f"there is no preset `{name}`", hint=hint, preset=name)
    return _explain(read_recipe(preset_file(wanted)))


def _list() -> Report:
    found = [read_recipe(preset_file(name)) for name in names()]
    report = Report("presets", {"presets": [_facts(one) for one in found]}, result=[one.name for one in found])
    rows = [(one.name, one.about, " ".join(one.tags)) for one in found]
    report.sections = [Section("", rows, ("preset", "what it is for", "models"))]
    report.hints = ["`sdops presets NAME` explains one, `sdops recipe cp NAME` copies it"]
    return report


def _facts(one: Recipe) -> dict[str, object]:
    return {
        "name": one.name,
        "about": one.about,
        "notes": one.notes,
        "source": one.source,
        "tags": list(one.tags),
        "inputs": {name: {"file": each.file, "about": each.about} for name, each in one.inputs.items()},
        "parameters": {
            name: {"default": each.default, "range": list(each.range), "about": each.about}
            for name, each in one.parameters.items()
        },
    }


def _explain(one: Recipe) -> Report:
    report = Report("presets", _facts(one), result=[one.name])
    rows = [("preset", one.name), ("for", one.about)]
    rows += [("models", ", ".join(one.tags))] if one.tags else []
    rows += [("source", one.source)] if one.source else []
    report.sections = [
        Section("", rows),
        Section("", [[line] for line in one.notes.splitlines()]),
        Section("What goes in", list(_inputs(one)), ("option", "", "if not given")),
        Section("What can be set", [_parameter(each) for each in one.parameters.values()], ("", "default", "", "")),
        Section("Steps", [(step.id, in_words(step)) for step in check_recipe(one).steps]),
    ]
    roles = " ".join(f"--{name.replace('_', '-')} FILE" for name, each in one.inputs.items() if not each.file)
    report.hints = [f"`sdops build {one.name} {roles}`", f"`sdops recipe cp {one.name}` copies it, to be changed"]
    return report


def _inputs(one: Recipe) -> Iterator[tuple[str, str, str]]:
    for name, each in one.inputs.items():
        yield f"--{name.replace('_', '-')} FILE", each.about, each.file or "has to be given"


def _parameter(one: Parameter) -> tuple[str, str, str, str]:
    span = f"{one.range[0]:g} to {one.range[1]:g}" if one.range else ", ".join(map(str, one.choices))
    return f"--set {one.name}=", str(one.default), span, one.about

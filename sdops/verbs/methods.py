"""The merge methods, all of them or one. Read from their files' text: no torch."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from sdops.card import Card, Knob, cards, find, names
from sdops.report import Report, Section
from sdops.verbs._merge_adapters_wish import METHODS

# Execution class -> what it means to the user: cost and memory, in the order of the listing.
CLASSES = {
    "linear": "Linear: weighted sums, correctly rounded, one pass",
    "elementwise": "Elementwise: one pass in little memory",
    "gram": "By inner products: two passes in little memory",
    "ranked": "By rank of the changes: three passes in little memory",
    "rows": "Row by row: one pass",
    "tensor": "Tensor by tensor: holds the largest tensor of every model",
    "model": "With a view of the whole model: a preparing pass, then tensor by tensor",
}
_LORAS = "Of LoRAs: their changes are merged, by the factors alone; `--weights 0.7,-0.3` weighs them"


def methods(name: str | None = None) -> Report:
    """List the merge methods, or explain one.

    Raises:
        UsageError: there is no method `name`; the closest one is suggested.
    """
    if name in METHODS and name not in names():
        return _of_loras(name)
    return _one(find(name)) if name else _all()


def _of_loras(name: str) -> Report:
    facts = [["usage", f"sdops merge LORA LORA ... -m {name}"], ["", METHODS[name]]]
    return Report("methods", {"lora_methods": {name: METHODS[name]}}, [Section(f"{name} (of LoRAs)", facts)], [name])


def _all() -> Report:
    shelf = cards().values()
    report = Report("methods", data={"methods": [_facts(card) for card in shelf]})
    for execution, heading in CLASSES.items():
        rows = [[kebab(card.name), _inputs(card), card.summary] for card in shelf if card.execution == execution]
        if rows:
            report.sections.append(Section(heading, rows, columns=("method", "models", "")))
    report.sections.append(Section(_LORAS, [[name, text] for name, text in METHODS.items()], columns=("method", "")))
    report.data["lora_methods"] = METHODS
    report.result = [kebab(card.name) for card in shelf]
    report.hints = ["`sdops methods NAME` explains one"]
    return report


def _one(card: Card) -> Report:
    name = kebab(card.name)
    usage = f"sdops merge {_inputs(card)} -m {name}"
    facts = [["usage", usage], ["class", CLASSES.get(card.execution, card.execution)]]
    report = Report("methods", data={"methods": [_facts(card)]}, result=[name])
    report.sections = [
        Section(f"{name}: {card.summary}", facts),
        Section("", [[line] for line in card.doc.splitlines()]),
    ]
    if card.knobs:
        rows = [[f"--{kebab(knob.name)}", _values(knob), _default(knob), knob.help] for knob in card.knobs]
        report.sections.append(Section("Knobs", rows, columns=("option", "value", "default", "")))
    return report


def kebab(name: str) -> str:
    """A name as the command line spells it."""
    return name.replace("_", "-")


def _inputs(card: Card) -> str:
    """The models as they are typed: `A B`, `A B [C...]`, with `--base BASE` where there is one."""
    if "*models" in card.inputs:
        models = "A [B...]" if card.base else "A B [C...]"
    else:
        models = " ".join("ABCDEFGH"[: len(card.inputs)])
    return f"{models} --base BASE" if card.base else models


def _values(knob: Knob) -> str:
    if knob.choices:
        return "|".join(knob.choices)
    letters = {"floats": "X,Y,...", "float": "X", "int": "N", "bool": "", "str": "TEXT"}[knob.type]
    return f"{letters} ({knob.range})" if knob.range else letters


def _default(knob: Knob) -> str:
    if isinstance(knob.default, bool):
        return "on" if knob.default else "off"
    return ",".join(map(str, knob.default)) if isinstance(knob.default, tuple) else str(knob.default)


def _facts(card: Card) -> dict[str, Any]:
    facts = asdict(card)
    del facts["needs"]  # between the method and the engine
    return facts

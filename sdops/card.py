"""What a merge method's file says about itself, read from its text: nothing is imported, so no torch.

    find("weighted-sum")   one method by the name a user typed
    cards()                all of them, for the listing

The contract that the files follow is the docstring of `sdops/merges/__init__.py`.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from textwrap import dedent
from typing import Any

from sdops.errors import UsageError

SHELF = Path(__file__).parent / "merges"

# Keyword-only parameters that the engine fills in; every other one is a knob.
SUPPLIED = frozenset({"gram", "noise", "kept", "state", "key"})

_NUMBER = r"-?\d+(?:\.\d+)?"
_RANGE = re.compile(rf"{_NUMBER} (?:to {_NUMBER}|or more)")


@dataclass(frozen=True, slots=True)
class Knob:
    """One number, switch or choice that a method offers.

    Attributes:
        name: The keyword; also the command-line option and the recipe key.
        type: "float", "int", "bool", "str" or "floats" (a tuple, one number per model).
        default: The literal default.
        choices: The allowed texts, where the annotation is a `Literal`; otherwise empty.
        help: The knob's text under `Args:`, on one line.
        range: What stands in brackets behind its name there: "0 to 1", "0 or more"; empty for any number.
    """

    name: str
    type: str
    default: Any
    choices: tuple[str, ...] = ()
    help: str = ""
    range: str = ""

    def allows(self, value: float) -> bool:
        """Whether a number lies in the knob's range, ends included."""
        if not self.range:
            return True
        low, _, high = self.range.partition(" ")
        return float(low) <= value and (high == "or more" or value <= float(high.removeprefix("to ")))


@dataclass(frozen=True, slots=True)
class Card:
    """One merge method.

    Attributes:
        name: The file's and the function's name.
        summary: The module's docstring, one line.
        doc: The function's docstring without its `Args:` section: formula, notes, source.
        execution: How much of a tensor the method must see, e.g. "linear".
        inputs: Names of the models after the base, in order; "*models" stands for any number.
        base: Whether a common ancestor comes before them.
        knobs: In the order of the signature.
        needs: Which of the keywords in `SUPPLIED` the function takes.
    """

    name: str
    summary: str
    doc: str
    execution: str
    inputs: list[str]
    base: bool
    knobs: list[Knob]
    needs: frozenset[str]


def method_name(text: str) -> str:
    """The file's name for a method as people type it: `weighted-sum` -> `weighted_sum`."""
    return text.strip().lower().replace("-", "_").replace(" ", "_")


@cache
def names() -> tuple[str, ...]:
    """Names of all methods, sorted; only the folder is read."""
    return tuple(sorted(path.stem for path in SHELF.glob("[!_]*.py")))


@cache
def cards() -> dict[str, Card]:
    """All methods by name."""
    return {name: card(SHELF / f"{name}.py") for name in names()}


def find(name: str) -> Card:
    """The card of one method; parses that file alone.

    Raises:
        UsageError: there is no such method; the closest name is suggested.
    """
    wanted = method_name(name)
    if wanted in names():
        return card(SHELF / f"{wanted}.py")
    from difflib import get_close_matches

    close = get_close_matches(wanted, names(), n=1)
    guess = f"; did you mean `{close[0].replace('_', '-')}`?" if close else ""
    raise UsageError(f"there is no merge method `{name}`{guess}", hint="`sdops methods` lists them", method=name)


@cache
def card(path: Path) -> Card:
    """Read one file of the shelf.

    Raises:
        ValueError: the file breaks the shelf's contract.
    """
    module = ast.parse(path.read_text(encoding="utf-8"))
    functions = {node.name: node for node in module.body if isinstance(node, ast.FunctionDef)}
    if path.stem not in functions:
        raise ValueError(f"{path.name} defines no function `{path.stem}`")
    function = functions[path.stem]
    literals = _literals(module)
    inputs = [name.strip() for name in literals["INPUTS"].split(",")] if "INPUTS" in literals else _inputs(function)
    base = inputs[:1] == ["base"]
    knobs: dict[str, Knob] = {}
    for name in (path.stem, "window", "prepare"):  # window and prepare may have knobs of their own
        if name in functions:
            knobs = _knobs(functions[name], path) | knobs
    return Card(
        name=path.stem,
        summary=_docstring(module).partition("\n")[0].rstrip("."),
        doc=_split_args(_docstring(function))[0],
        execution=literals.get("EXECUTION", ""),
        inputs=inputs[1:] if base else inputs,
        base=base,
        knobs=list(knobs.values()),
        needs=SUPPLIED & {argument.arg for argument in function.args.kwonlyargs},
    )


def _literals(module: ast.Module) -> dict[str, str]:
    """Text constants at module level, such as EXECUTION."""
    return {
        target.id: node.value.value
        for node in module.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _docstring(node: ast.Module | ast.FunctionDef) -> str:
    """The docstring with the indentation of its continuation lines removed."""
    first, _, rest = (ast.get_docstring(node, clean=False) or "").partition("\n")
    return f"{first.strip()}\n{dedent(rest)}".strip()


def _inputs(function: ast.FunctionDef) -> list[str]:
    """Positional parameters in order, a starred one as "*name"."""
    names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
    return [*names, f"*{function.args.vararg.arg}"] if function.args.vararg else names


def _knobs(function: ast.FunctionDef, path: Path) -> dict[str, Knob]:
    """Keyword-only parameters that the engine does not fill in itself."""
    helps = _split_args(_docstring(function))[1]
    knobs = {}
    for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True):
        if argument.arg in SUPPLIED:
            continue
        if argument.annotation is None or default is None:
            raise ValueError(f"{path.name}: knob `{argument.arg}` needs an annotation and a literal default")
        kind, choices = _type(argument.annotation, f"{path.name}: knob `{argument.arg}`")
        value = ast.literal_eval(default)
        span, text = helps.get(argument.arg, ("", ""))
        if span and not _RANGE.fullmatch(span):
            raise ValueError(
                f"{path.name}: knob `{argument.arg}` has the range `{span}`; write `0 to 1` or `0 or more`"
            )
        knobs[argument.arg] = Knob(argument.arg, kind, value, choices, text, span)
    return knobs


def _type(annotation: ast.expr, where: str) -> tuple[str, tuple[str, ...]]:
    """A knob's type and, for a Literal, its choices."""
    match annotation:
        case ast.Name(id="float" | "int" | "bool" | "str" as name):
            return name, ()
        case ast.Subscript(value=ast.Name(id="Literal"), slice=ast.Tuple(elts=choices)):
            return "str", tuple(ast.literal_eval(choice) for choice in choices)
        case ast.Subscript(value=ast.Name(id="tuple"), slice=ast.Tuple(elts=[ast.Name(id="float"), _])):
            return "floats", ()
    raise ValueError(f"{where} has a type that no option can express: {ast.unparse(annotation)}")


def _split_args(docstring: str) -> tuple[str, dict[str, tuple[str, str]]]:
    """A Google-style docstring as (text without its `Args:` section, name -> (text in brackets, description))."""
    section = re.search(r"^Args:\n((?:[ \t]+\S.*\n?|[ \t]*\n)*)", docstring, re.MULTILINE)
    if section is None:
        return docstring, {}
    text = docstring[: section.start()] + docstring[section.end() :]
    # An entry's own line is indented once; deeper lines continue it.
    entries = re.findall(r"^(\w+)(?: \(([^)]*)\))?:(.*(?:\n[ \t]+.*)*)", dedent(section[1]), re.MULTILINE)
    return text.strip(), {name: (brackets, " ".join(words.split())) for name, brackets, words in entries}

"""What a verb offers to recipes, read from its source text without importing it: parameters, types, choices, help.

verb_card("merge").parameters["missing"]      text, one of error, keep, drop
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

# Verb as typed -> its module among the verbs, and the function in it.
VERBS: Mapping[str, tuple[str, str]] = {
    "merge": ("merge", "merge"),
    "apply": ("apply", "apply"),
    "extract": ("extract", "extract"),
    "convert": ("convert", "convert"),
    "resize": ("resize", "resize"),
    "embed make": ("_embed_make", "make"),
    "embed merge": ("_embed_merge", "merge"),
    "embed convert": ("_embed_convert", "convert"),
}
# What changes nothing of the result is for the command line to say, not for a recipe.
RUNNING = frozenset({"jobs", "memory", "force", "dry_run", "hash_inputs", "progress"})

# Annotation without `| None` -> kind of value.
_KINDS = {
    "Model": "file",
    "FilePath": "file",
    "FilePath | Sequence[FilePath]": "file",
    "str | os.PathLike[str]": "file",
    "AdapterFile": "file",
    "Sequence[AdapterFile]": "files",
    "Model | Sequence[Model]": "some",
    "Sequence[Wish]": "loras",
    "str": "text",
    "int": "int",
    "float": "float",
    "bool": "bool",
    "Sequence[str]": "texts",
    "Sequence[float]": "floats",
    "Sequence[int]": "ints",
}


@dataclass(frozen=True, slots=True)
class VerbParameter:
    """One parameter.

    Attributes:
        name: As in Python and, with dashes, on the command line.
        kind: file, files, some (one file or several), loras, text, texts, int, ints, float, floats, bool, output.
        required: Whether it has no default.
        choices: Values that the verb allows, where its text says so.
        help: What its docstring says.
    """

    name: str
    kind: str
    required: bool = False
    choices: tuple[str, ...] = ()
    help: str = ""


@dataclass(frozen=True, slots=True)
class VerbCard:
    """A verb.

    Attributes:
        name: As typed.
        summary: The first line of its docstring.
        parameters: By name, in order; those that only tell how to run it are left out.
        knobs: Whether it takes the knobs of a merge method, too.
    """

    name: str
    summary: str
    parameters: Mapping[str, VerbParameter]
    knobs: bool


@cache
def verb_card(name: str) -> VerbCard:
    """The card of one of VERBS."""
    module, function = VERBS[name]
    return _read(Path(__file__).with_name(f"{module}.py"), function, name)


@cache
def lora_merge_card() -> VerbCard:
    """The card of a merge of LoRAs, which `merge` hands over to another function."""
    return _read(Path(__file__).with_name("_merge_adapters.py"), "merge_adapters", "merge")


def _read(path: Path, function: str, name: str) -> VerbCard:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    node = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
    docstring = ast.get_docstring(node) or ""
    helps, choices = _helps(docstring), dict(_choices(tree))
    found: dict[str, VerbParameter] = {}
    if node.args.vararg:
        found[node.args.vararg.arg] = VerbParameter(node.args.vararg.arg, "files", required=True)
    plain, named = node.args.args, node.args.kwonlyargs
    defaults = [None] * (len(plain) - len(node.args.defaults)) + [*node.args.defaults, *node.args.kw_defaults]
    for argument, default in zip((*plain, *named), defaults, strict=True):
        if argument.arg not in RUNNING and argument.annotation is not None:
            kind = "output" if argument.arg == "output" else _kind(ast.unparse(argument.annotation))
            found[argument.arg] = VerbParameter(
                argument.arg,
                kind,
                default is None and kind != "output",
                choices.get(argument.arg, ()),
                helps.get(argument.arg, ""),
            )
    return VerbCard(name, docstring.partition("\n")[0].rstrip("."), found, node.args.kwarg is not None)


def _kind(annotation: str) -> str:
    return _KINDS[annotation.removesuffix(" | None")]


def _helps(docstring: str) -> dict[str, str]:
    """Parameter -> its text under `Args:`, on one line."""
    section = re.search(r"^Args:\n((?:[ \t]+\S.*\n?|[ \t]*\n)*)", docstring, re.MULTILINE)
    entries = re.findall(r"^    (\w[\w, ]*):(.*(?:\n {5,}.*)*)", section[1] if section else "", re.MULTILINE)
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}


def _choices(tree: ast.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What verbs write as `for option, value, allowed in (("dtype", dtype, DTYPES), ...)`."""
    constants = dict(_constants(tree))
    for node in ast.walk(tree):
        match node:
            case ast.Tuple(elts=[ast.Constant(value=str(option)), ast.Name(id=name), ast.Name(id=allowed)]):
                if name == option and allowed in constants:
                    yield option, constants[allowed]


def _constants(tree: ast.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Tuples of texts, and the keys of dicts, that have names of their own in a module."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                value: Any = ast.literal_eval(node.value)
            except ValueError:
                continue
            if isinstance(value, tuple | dict) and all(isinstance(item, str) for item in value):
                yield node.targets[0].id, tuple(value)

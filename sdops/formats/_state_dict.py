"""Finds the tensors in the object that a training program saved: unwraps, flattens, and says what it left out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sdops.errors import FormatError
from sdops.formats._torch import Tensor
from sdops.text import count

# Entries under which programs keep the weights, in order of preference.
WRAPPERS = ("state_dict", "model", "module", "params_ema", "params", "ema", "model_state_dict", "generator", "net")
_DEPTH = 8


@dataclass(slots=True)
class StateDict:
    """What was found.

    Attributes:
        tensors: Name -> Tensor.
        metadata: Numbers and texts that lay beside the tensors, as texts (`global_step`, `epoch`).
        dropped: Names of everything else.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)


def state_dict(path: object, root: Any) -> StateDict:
    """The named tensors of a saved object.

    Dicts around the weights (`WRAPPERS`, or a dict of one entry) are taken off; dicts inside are joined with dots.

    Raises:
        FormatError: the object holds no tensors, or tensors without names.
    """
    found = StateDict()
    inner = _unwrap(root, found)
    if type(inner) is not dict:
        raise FormatError(f"`{path}` holds {_kind(inner)}, not a model", hint=_HINT, path=path)
    if any(type(key) is int and _tensors_in(value) for key, value in inner.items()):
        raise FormatError(f"`{path}` names its tensors by numbers, as hypernetworks do", hint=_HINT, path=path)
    _flatten(inner, "", found, {id(inner)})
    if not found.tensors:
        raise FormatError(f"`{path}` holds no tensors", hint="give the file with the weights", path=path)
    return found


_HINT = "give a checkpoint: a dict of named tensors"


def _unwrap(root: Any, found: StateDict) -> Any:
    """Take off up to four wrappers; what lies beside the weights goes to `found`."""
    for _ in range(4):
        wrapper = _wrapper(root)
        if wrapper is None:
            return root
        for key, value in root.items():
            if key != wrapper:
                _leave(str(key) if type(key) in (str, int) else "(unnamed)", value, found)
        root = root[wrapper]
    return root


def _wrapper(root: Any) -> Any:
    """The entry that holds most of the tensors, if there is one under a name that says so; else None."""
    if type(root) is not dict:
        return None
    own = sum(type(value) is Tensor for value in root.values())
    for name in WRAPPERS:
        if type(root.get(name)) is dict and _tensors_in(root[name]) > own:
            return name
    if len(root) == 1:
        (name, value) = next(iter(root.items()))
        if type(value) is dict and type(name) is str and _tensors_in(value):
            return name
    return None


def _tensors_in(value: Any) -> int:
    """Tensors in a dict and the dicts inside, each dict counted once."""
    return sum(1 for _ in _walk(value, set(), _DEPTH))


def _walk(value: Any, seen: set[int], depth: int) -> Iterator[Tensor]:
    if type(value) is Tensor:
        yield value
    elif type(value) in (dict, list, tuple) and depth and id(value) not in seen:
        seen.add(id(value))
        for inner in value.values() if type(value) is dict else value:
            yield from _walk(inner, seen, depth - 1)


def _flatten(entries: dict[Any, Any], prefix: str, found: StateDict, seen: set[int]) -> None:
    for key, value in entries.items():
        if type(key) is not str or not _is_text(key):
            found.dropped.append(f"{prefix}(unnamed)")
        elif type(value) is dict and id(value) not in seen and prefix.count(".") < _DEPTH:
            seen.add(id(value))  # never twice: a dict may hold itself
            _flatten(value, f"{prefix}{key}.", found, seen)
        elif type(value) is not Tensor:
            _leave(prefix + key, value, found)
        elif prefix + key in found.tensors or prefix + key == "__metadata__":
            found.dropped.append(prefix + key)  # the second of one name, or a name that safetensors reserves
        else:
            found.tensors[prefix + key] = value


def _leave(name: str, value: Any, found: StateDict) -> None:
    """A value that is no tensor: numbers and texts become metadata, the rest is dropped."""
    if type(value) in (str, int, float, bool) and _is_text(name) and name not in found.metadata:
        text = _text(value)
        if _is_text(text):
            found.metadata[name] = text
            return
    found.dropped.append(name if _is_text(name) else "(unnamed)")


def _text(value: Any) -> str:
    try:
        return str(value)
    except ValueError:  # a number of more than 4300 digits
        return "\ud800"


def _is_text(text: str) -> bool:
    """Whether it can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: Any) -> str:
    if type(value) is Tensor:
        return f"one tensor without a name, {value.spec}"
    if type(value) in (list, tuple):
        tensors = sum(type(item) is Tensor for item in value)
        return f"a list of {count(tensors, 'tensor')} without names" if tensors else "a list"
    return "a single value"

"""Pickles as data: an interpreter of the pickle opcodes that imports nothing and calls nothing a file names.

A name like `os.system` becomes a Symbol. What a pickle "calls" is looked up in a fixed list of harmless meanings
(torch's tensors, an OrderedDict); calls without a meaning here give an Opaque, and a Symbol that no model has any
reason to mention is refused. The opcodes are those of torch.save in protocols 2 to 5.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from struct import error as StructError  # noqa: N812 -- it is a class
from typing import IO, Any, NoReturn
from warnings import catch_warnings, simplefilter

from sdops.text import shorten

OPCODE_LIMIT = 3_000_000
BYTES_LIMIT = 256 << 20
MARK_LIMIT = 1000

# Names that training programs leave in checkpoints. They are never looked up, so nothing of them can run.
_HARMLESS_MODULES = (
    "argparse", "lightning", "lightning_fabric", "lightning_utilities", "ml_collections", "numpy", "omegaconf",
    "pytorch_lightning", "torch.optim", "torch.nn.parameter", "torch.nn.modules.container", "yacs",
)  # fmt: skip
_HARMLESS = frozenset(
    {
        "_codecs.encode", "collections.Counter", "collections.defaultdict", "collections.deque",
        "copyreg._reconstructor", "datetime.date", "datetime.datetime", "datetime.timedelta", "decimal.Decimal",
        "fractions.Fraction",
        "pathlib.Path", "pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.PureWindowsPath", "pathlib.WindowsPath",
        "torch.Tensor", "torch.device", "torch.serialization._get_layout", "torch.layout", "torch.strided",
        "torch.nn.Parameter", "torch._tensor.Tensor", "torch.nn.ParameterDict", "torch.nn.ParameterList",
        "typing.Any", "typing.Dict", "typing.List", "uuid.UUID",
    }
)  # fmt: skip
_BUILTINS = frozenset({
    "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "range", "set",
    "slice", "str", "tuple",
})  # fmt: skip


class PickleError(Exception):
    """A pickle is damaged, too large, or names what no model has a reason to name."""


@dataclass(frozen=True, slots=True)
class Symbol:
    """A name from the file, `module.name`. Only a text."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Opaque:
    """An object that is not rebuilt. It accepts everything that a pickle does to it, and forgets all but its state.

    Attributes:
        kind: The symbol that would have made it, or a word.
        state: What the pickle would have set its attributes from, as plain values; None if it does not.
    """

    __slots__ = ("kind", "state")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.state: Any = None


def is_harmless(symbol: Symbol) -> bool:
    """Whether a symbol may stand in a file as the name of something that is dropped."""
    if symbol.module in ("builtins", "__builtin__"):
        return symbol.name in _BUILTINS
    return str(symbol) in _HARMLESS or any(
        symbol.module == module or symbol.module.startswith(f"{module}.") for module in _HARMLESS_MODULES
    )


def load(
    stream: IO[bytes],
    call: Callable[[Symbol, tuple[Any, ...]], Any],
    persistent: Callable[[Any], Any],
    knows: Callable[[Symbol], bool] = is_harmless,
) -> Any:
    """The object that a pickle describes, as plain Python values, Symbols, Opaques and what the callbacks return.

    The stream is left behind the pickle's STOP.

    Args:
        stream: Where the pickle starts. `read` and `readline` must bound what a hostile length can ask for.
        call: Gives the meaning of calling a symbol.
        persistent: Gives the meaning of a persistent id.
        knows: Which symbols may occur at all.

    Raises:
        PickleError: see the class.
    """
    machine = _Machine(call, persistent, knows)
    try:
        with catch_warnings():
            simplefilter("ignore")  # of escape sequences that no text has
            return _run(machine, stream)
    # What genops and the machine meet in damaged input.
    except (ValueError, IndexError, KeyError, TypeError, StructError, EOFError, OverflowError, MemoryError) as error:
        raise PickleError("it is damaged") from error


def _run(machine: _Machine, stream: IO[bytes]) -> Any:
    start = stream.tell()
    for count, (opcode, argument, position) in enumerate(pickletools.genops(stream)):
        if count > OPCODE_LIMIT or (position or 0) - start > BYTES_LIMIT:
            raise PickleError("it is larger than that of any model")
        if opcode.name == "STOP":
            break
        machine.step(opcode.name, argument)
    return machine.stack.pop()


class _Machine:
    """Stack, marks and memo of one pickle."""

    def __init__(
        self,
        call: Callable[[Symbol, tuple[Any, ...]], Any],
        persistent: Callable[[Any], Any],
        knows: Callable[[Symbol], bool],
    ) -> None:
        self.stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks under each open mark
        self._memo: dict[int, Any] = {}
        self._call = call
        self._persistent = persistent
        self._knows = knows

    def step(self, name: str, argument: Any) -> None:
        """Carry out one opcode."""
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _PUTS:
            if not 0 <= argument < 1 << 32:
                raise IndexError
            self._memo[argument] = self.stack[-1]
        elif name in _GETS:
            self.stack.append(self._memo[argument])
        elif name in _ACTIONS:
            _ACTIONS[name](self)
        elif name == "GLOBAL":
            self._push_symbol(*argument.split(" ", 1))
        elif name not in ("PROTO", "FRAME"):
            raise PickleError(f"it uses the opcode {name}, which torch never writes")

    def mark(self) -> None:
        if len(self._below) >= MARK_LIMIT:
            raise PickleError("it is nested too deeply")
        self._below.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self._below.pop()
        return items

    def drop_mark(self) -> None:
        self.pop_mark()

    def memoize(self) -> None:
        self._memo[len(self._memo)] = self.stack[-1]

    def make_list(self) -> None:
        items = self.pop_mark()
        self.stack.append(items)

    def make_tuple(self) -> None:
        items = tuple(self.pop_mark())
        self.stack.append(items)

    def make_dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self._set(items)

    def take_tuple(self, count: int) -> None:
        items = tuple(self.stack[-count:])
        if len(items) != count:
            raise IndexError
        self.stack[-count:] = [items]

    def append(self) -> None:
        item = self.stack.pop()
        self._extend([item])

    def appends(self) -> None:
        items = self.pop_mark()
        self._extend(items)

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def set_items(self) -> None:
        items = self.pop_mark()
        self._set(items)

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self._push_symbol(module, name)

    def persistent(self) -> None:
        self.stack.append(self._persistent(self.stack.pop()))

    def reduce(self) -> None:
        arguments, symbol = self.stack.pop(), self.stack.pop()
        if type(symbol) is Opaque:  # e.g. the method of an object that is not rebuilt
            self.stack.append(Opaque(symbol.kind))
            return
        if type(symbol) is not Symbol or type(arguments) is not tuple:
            raise TypeError
        self.stack.append(self._call(symbol, arguments))

    def new_object_with_keywords(self) -> None:
        self.stack.pop()
        self.reduce()

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is Opaque:  # attributes of dicts and tensors do not matter
            target.state = state

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def _push_symbol(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise TypeError
        symbol = Symbol(module, name)
        if not self._knows(symbol):
            raise PickleError(f"it names `{shorten(str(symbol))}`, which is no part of a model and could be an attack")
        self.stack.append(symbol)

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif type(target) is not Opaque:
            raise TypeError

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if len(items) % 2:
            raise IndexError
        if type(target) is dict:
            for key, value in zip(items[::2], items[1::2], strict=True):
                target[_key(key)] = value
        elif type(target) is not Opaque:
            raise TypeError


def _key(key: Any) -> Any:
    """A key that hashes fast: hostile numbers can be chosen to collide, and lists do not hash at all."""
    if key is None or type(key) in (str, bytes, bool) or (type(key) is int and abs(key) < 1 << 60):
        return key
    return Opaque(type(key).__name__)


# Values whose opcode carries them.
_LITERALS = frozenset(
    {
        "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
        "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
        "BINBYTES8", "BYTEARRAY8",
    }
)  # fmt: skip
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": list,  # nothing of a set is ever used, and a list takes whatever does not hash
}
_PUTS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_GETS = frozenset({"GET", "BINGET", "LONG_BINGET"})
_ACTIONS: dict[str, Callable[[_Machine], None]] = {
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.drop_mark,
    "MEMOIZE": _Machine.memoize,
    "LIST": _Machine.make_list,
    "DICT": _Machine.make_dict,
    "TUPLE": _Machine.make_tuple,
    "TUPLE1": lambda machine: machine.take_tuple(1),
    "TUPLE2": lambda machine: machine.take_tuple(2),
    "TUPLE3": lambda machine: machine.take_tuple(3),
    "FROZENSET": _Machine.make_list,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "ADDITEMS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "STACK_GLOBAL": _Machine.stack_global,
    "BINPERSID": _Machine.persistent,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.reduce,
    "NEWOBJ_EX": _Machine.new_object_with_keywords,
    "BUILD": _Machine.build,
}


def refuse(what: str) -> NoReturn:
    """End the reading of a pickle; the message goes behind "the pickle of FILE cannot be read: "."""
    raise PickleError(what)

"""The pickle inside of a torch checkpoint: tensors over numbered storages, and what is around them. No torch.

Only what torch.save itself writes for a state dict, or for plain dicts and lists, in protocol 2, so that
`torch.load(weights_only=True)` and the checkers of the web UIs accept it. Opcodes are those of Python's `pickletools`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from struct import pack
from typing import Any

from sdops.core.spec import DTYPE_BITS, Spec
from sdops.core.tree import Leaf
from sdops.errors import OutputError

# Storage classes that torch has always had, and dtypes that came after them.
_STORAGES = {
    "F64": "DoubleStorage", "F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage",
    "I64": "LongStorage", "I32": "IntStorage", "I16": "ShortStorage", "I8": "CharStorage", "U8": "ByteStorage",
    "BOOL": "BoolStorage", "C64": "ComplexFloatStorage",
}  # fmt: skip
_DTYPES = {
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
_BATCH = 1000  # items that are set at once, as Python's pickler does


def state_dict_pickle(specs: Mapping[str, Spec], metadata: Mapping[str, str], wrap: str) -> bytes:
    """{name: tensor, ...}; with `wrap` {wrap: {name: tensor, ...}, **metadata}.

    The i-th tensor lies contiguously in the storage called str(i).

    Raises:
        OutputError: torch has no dtype for one of the tensors.
    """
    pickle = _Pickle()
    pickle.begin_dict()
    if wrap:
        pickle.text(wrap)
        pickle.begin_dict()
    for number, (key, spec) in enumerate(specs.items()):
        pickle.text(key)
        _tensor(pickle, key, spec, str(number))
        pickle.end_item()
    if wrap:
        pickle.end_dict()
        pickle.end_item()
        for key, text in metadata.items():
            pickle.text(key)
            pickle.text(text)
            pickle.end_item()
    pickle.end_dict()
    return b"\x80\x02" + bytes(pickle.out) + b"."


def tree_pickle(tree: Any, numbers: Mapping[str, int]) -> bytes:
    """Dicts, lists, numbers, texts and None, with tensors where Leafs are; a Leaf's storage is called by its number.

    Raises:
        OutputError: torch has no dtype for one of the tensors.
    """
    pickle = _Pickle()
    _value(pickle, tree, numbers)
    return b"\x80\x02" + bytes(pickle.out) + b"."


def _value(pickle: _Pickle, value: Any, numbers: Mapping[str, int]) -> None:
    if type(value) is Leaf:
        _tensor(pickle, value.key, value.spec, str(numbers[value.key]))
    elif type(value) is dict:
        pickle.begin_dict()
        for key, item in value.items():
            _value(pickle, key, numbers)
            _value(pickle, item, numbers)
            pickle.end_item()
        pickle.end_dict()
    elif type(value) is list:
        pickle.out += b"]("  # EMPTY_LIST MARK
        for item in value:
            _value(pickle, item, numbers)
        pickle.out += b"e"  # APPENDS
    elif type(value) is str:
        pickle.text(value)
    elif type(value) is int:
        pickle.integer(value)
    elif type(value) is float:
        pickle.out += b"G" + pack(">d", value)  # BINFLOAT
    else:
        pickle.out += {None: b"N", False: b"\x89", True: b"\x88"}[value]


def _tensor(pickle: _Pickle, key: str, spec: Spec, storage: str) -> None:
    """torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict()); v3 for the younger dtypes."""
    if spec.dtype not in _STORAGES and spec.dtype not in _DTYPES:
        raise OutputError(
            f"torch files cannot hold `{key}` of dtype {spec.dtype}", hint="write safetensors: `--to safetensors`"
        )
    old = spec.dtype in _STORAGES
    pickle.symbol("torch._utils", "_rebuild_tensor_v2" if old else "_rebuild_tensor_v3")
    pickle.begin_tuple()
    pickle.begin_tuple()
    pickle.text("storage")
    pickle.symbol(*(("torch", _STORAGES[spec.dtype]) if old else ("torch.storage", "UntypedStorage")))
    pickle.text(storage)
    pickle.text("cpu")
    pickle.integer(spec.numel if old else spec.numel * DTYPE_BITS[spec.dtype] // 8)
    pickle.end_tuple()
    pickle.out += b"Q"  # BINPERSID
    pickle.integer(0)
    pickle.integers(spec.shape)
    pickle.integers(_strides(spec.shape))
    pickle.out += b"\x89"  # NEWFALSE
    pickle.symbol("collections", "OrderedDict")
    pickle.out += b")R"  # EMPTY_TUPLE REDUCE
    if not old:
        pickle.symbol("torch", _DTYPES[spec.dtype])
    pickle.end_tuple()
    pickle.out += b"R"


def _strides(shape: Sequence[int]) -> list[int]:
    """Elements from one index to the next, as torch counts them: a dimension of 0 like one of 1."""
    strides = [1] * len(shape)
    for index in range(len(shape) - 1, 0, -1):
        strides[index - 1] = strides[index] * max(shape[index], 1)
    return strides


class _Pickle:
    """Opcodes in the making."""

    def __init__(self) -> None:
        self.out = bytearray()
        self._memo: dict[str, int] = {}
        self._open: list[int] = []  # items since the last MARK, per open dict

    def text(self, text: str) -> None:
        """BINUNICODE."""
        raw = text.encode("utf-8", "surrogatepass")
        self.out += b"X" + pack("<I", len(raw)) + raw

    def integer(self, number: int) -> None:
        """BININT, or LONG1 for what does not fit."""
        if -(1 << 31) <= number < 1 << 31:
            self.out += b"J" + pack("<i", number)
        else:
            self.out += b"\x8a\x08" + pack("<q", number)

    def symbol(self, module: str, name: str) -> None:
        """GLOBAL, the second time from the memo: BINPUT and BINGET."""
        text = f"{module}\n{name}\n"
        if text in self._memo:
            self.out += b"h" + pack("<B", self._memo[text])
            return
        self._memo[text] = len(self._memo)
        self.out += b"c" + text.encode() + b"q" + pack("<B", self._memo[text])

    def integers(self, numbers: Sequence[int]) -> None:
        """A tuple of integers."""
        self.begin_tuple()
        for number in numbers:
            self.integer(number)
        self.end_tuple()

    def begin_tuple(self) -> None:
        """MARK."""
        self.out += b"("

    def end_tuple(self) -> None:
        """TUPLE."""
        self.out += b"t"

    def begin_dict(self) -> None:
        """EMPTY_DICT MARK."""
        self.out += b"}("
        self._open.append(0)

    def end_item(self) -> None:
        """After a key and its value: SETITEMS when many have piled up."""
        self._open[-1] += 1
        if self._open[-1] % _BATCH == 0:
            self.out += b"u("

    def end_dict(self) -> None:
        """SETITEMS."""
        self.out += b"u"
        self._open.pop()

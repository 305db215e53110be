"""What torch's pickles mean: storages, tensors over them, and little else. No torch, nothing is executed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

from sdops.core.spec import DTYPE_BITS, Spec
from sdops.formats._pickle import Opaque, Symbol, is_harmless, load, refuse

RANK_LIMIT = 64

# torch.<Name>Storage -> dtype; torch.<name> -> dtype.
STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64", "UntypedStorage": "U8",
}  # fmt: skip
DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
    "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
# Known, but without a counterpart in safetensors.
_STRANGE = frozenset({
    "ComplexDoubleStorage", "QInt8Storage", "QUInt8Storage", "QInt32Storage", "QUInt4x2Storage", "QUInt2x4Storage",
    "complex32", "complex128", "qint8", "quint8", "qint32", "quint4x2", "quint2x4", "float4_e2m1fn_x2",
})  # fmt: skip

_PARAMETERS = Symbol("torch.nn.modules.container", "ParameterDict")


@dataclass(slots=True, eq=False)
class Storage:
    """Bytes in the file that tensors are cut from.

    Attributes:
        dtype: What the elements are.
        nbytes: Size.
        position: Of the first byte in the file; -1 while unknown.
    """

    dtype: str
    nbytes: int
    position: int = -1

    @property
    def item_bytes(self) -> int:
        """Bytes of an element."""
        return DTYPE_BITS[self.dtype] // 8


@dataclass(slots=True, eq=False)
class StorageView:
    """Part of a storage, as early versions of torch saved them: elements from `first` on."""

    storage: Storage
    first: int
    numel: int


@dataclass(slots=True, eq=False)
class Tensor:
    """A tensor over a storage.

    Attributes:
        storage: Its bytes.
        spec: Dtype and shape.
        first: Index of the first element in the storage.
        strides: Elements from one index to the next, per dimension.
    """

    storage: Storage
    spec: Spec
    first: int
    strides: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        """Bytes of an element."""
        return DTYPE_BITS[self.spec.dtype] // 8

    @property
    def position(self) -> int:
        """Where the first element lies in the file."""
        return self.storage.position + self.first * self.item_bytes

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie side by side in order."""
        expected = 1
        for size, stride in zip(reversed(self.spec.shape), reversed(self.strides), strict=True):
            if size > 1 and stride != expected:
                return False
            expected *= size
        return True

    @property
    def extent(self) -> int:
        """Elements of the storage from the first to the last that the tensor uses."""
        if self.spec.numel == 0:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.spec.shape, self.strides, strict=True))


def load_object(stream: IO[bytes], find_storage: Callable[[str, str, int], Storage]) -> Any:
    """The object in a torch pickle: dicts, lists, numbers, texts, Tensors, Opaques.

    Args:
        stream: Starts at the pickle, is left behind it.
        find_storage: (key, dtype, nbytes) -> Storage; refuses what the file does not have.

    Raises:
        PickleError: the pickle is damaged, hostile, or holds tensors of a kind that sdops does not read.
    """
    return load(stream, _call, lambda identity: _storage(identity, find_storage), _knows)


def load_plain(stream: IO[bytes]) -> Any:
    """A pickle of plain values.

    Raises:
        PickleError: it holds anything else.
    """
    return load(stream, lambda symbol, _: Opaque(str(symbol)), lambda _: refuse("it refers to tensors"))


def _storage(identity: Any, find: Callable[[str, str, int], Storage]) -> Storage | StorageView | Symbol:
    """The storage that a persistent id ("storage", type, key, device, numel[, view]) names. The device is ignored.

    ("module", class, file, source code) is how old versions name a class; that of a mere dict of tensors may pass.
    """
    if type(identity) is tuple and identity[:1] == ("module",) and identity[1:2] == (_PARAMETERS,):
        return _PARAMETERS
    if type(identity) is not tuple or len(identity) not in (5, 6) or identity[0] != "storage":
        if type(identity) is tuple and identity[:1] == ("module",):
            refuse("it holds a whole model object, not its weights")
        refuse("it is damaged")
    symbol, key, numel = identity[1], identity[2], identity[4]
    if type(symbol) is not Symbol or type(key) is not str or type(numel) is not int or numel < 0:
        refuse("it is damaged")
    if symbol.name not in STORAGES:
        refuse(f"it holds tensors of the type `{symbol}`, which sdops does not read")
    dtype = STORAGES[symbol.name]
    storage = find(key, dtype, numel * DTYPE_BITS[dtype] // 8)
    if len(identity) == 5 or identity[5] is None:
        return storage
    return _view(storage, numel, identity[5])


def _view(storage: Storage, numel: int, view: Any) -> StorageView:
    if type(view) is not tuple or len(view) != 3:
        refuse("it is damaged")
    _, first, count = view
    if not _is_size(first) or not _is_size(count) or first + count > numel:
        refuse("it is damaged: a view lies outside of its storage")
    return StorageView(storage, first, count)


def _knows(symbol: Symbol) -> bool:
    return str(symbol) in _CALLS or is_harmless(symbol) or _torch_name(symbol) is not None


def _torch_name(symbol: Symbol) -> str | None:
    """The name of a dtype or storage class; None for anything else."""
    if symbol.module in ("torch", "torch.storage", "torch.cuda"):
        name = symbol.name
        return name if name in STORAGES or name in DTYPES or name in _STRANGE else None
    return None


def _call(symbol: Symbol, arguments: tuple[Any, ...]) -> Any:
    """The meaning of a call that a pickle asks for."""
    meaning = _CALLS.get(str(symbol))
    return meaning(*arguments) if meaning else Opaque(str(symbol))


def _tensor(storage: Any, first: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    """torch._utils._rebuild_tensor(storage, storage_offset, size, stride): the dtype is the storage's."""
    return _cut(storage, None, first, shape, strides)


def _tensor_v2(
    storage: Any, first: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, metadata: Any = None
) -> Tensor:
    """torch._utils._rebuild_tensor_v2; metadata says whether values are kept conjugated or negated."""
    if type(metadata) is dict and any(metadata.get(name) for name in ("conj", "neg")):
        refuse("it holds conjugated or negated tensors; save them with `.resolve_conj().resolve_neg()`")
    return _tensor(storage, first, shape, strides)


def _tensor_v3(
    storage: Any, first: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, metadata: Any = None
) -> Tensor:
    """torch._utils._rebuild_tensor_v3: over an untyped storage, with the dtype beside it."""
    del metadata
    if type(dtype) is not Symbol:
        refuse("it is damaged")
    if dtype.name not in DTYPES:
        refuse(f"it holds tensors of the type `{dtype}`, which sdops does not read")
    return _cut(storage, DTYPES[dtype.name], first, shape, strides)


def _parameter(data: Any, *_: Any) -> Any:
    """torch._utils._rebuild_parameter(data, requires_grad, hooks): the tensor."""
    return data


def _subclass(function: Any, _type: Any, arguments: Any, _state: Any) -> Any:
    """torch._tensor._rebuild_from_type_v2(function, type, arguments, state): what the function gives."""
    if type(function) is not Symbol or str(function) not in _REBUILDS or type(arguments) is not tuple:
        refuse("it holds tensors of a class that sdops does not read")
    return _CALLS[str(function)](*arguments)


def _ordered_dict(items: Any = ()) -> dict[Any, Any]:
    if type(items) not in (list, tuple, dict):
        refuse("it is damaged")
    pairs = items.items() if type(items) is dict else items
    return {key: value for key, value in pairs if type(key) in (str, int)}


def _size(numbers: Any = ()) -> Any:
    return numbers if type(numbers) is tuple else tuple(numbers) if type(numbers) is list else refuse("it is damaged")


def _foreign(what: str) -> Callable[..., Any]:
    def call(*_: Any) -> Any:
        refuse(f"it holds {what}, which sdops does not read")

    return call


_REBUILDS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
_CALLS: dict[str, Callable[..., Any]] = _REBUILDS | {
    "collections.OrderedDict": _ordered_dict,
    "torch.Size": _size,
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "torch._utils._rebuild_qtensor": _foreign("quantised tensors"),
    "torch._utils._rebuild_sparse_tensor": _foreign("sparse tensors"),
    "torch._utils._rebuild_nested_tensor": _foreign("nested tensors"),
    "torch._utils._rebuild_meta_tensor_no_storage": _foreign("tensors without values (meta device)"),
    "torch._utils._rebuild_wrapper_subclass": _foreign("tensors of a class of its own"),
    "torch._utils._rebuild_device_tensor_from_numpy": _foreign("tensors of an unknown device"),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _foreign("tensors of an unknown device"),
}


def _cut(storage: Any, dtype: str | None, first: Any, shape: Any, strides: Any) -> Tensor:
    """A tensor, once it is certain that it lies within its storage."""
    whole, offset = (storage.storage, storage.first) if type(storage) is StorageView else (storage, 0)
    if type(whole) is not Storage or not _are_sizes(shape) or not _are_sizes(strides) or not _is_size(first):
        refuse("it is damaged: a tensor has no possible shape")
    if len(shape) != len(strides) or len(shape) > RANK_LIMIT:
        refuse(f"it is damaged: a tensor of {len(shape)} dimensions has {len(strides)} strides")
    tensor = Tensor(whole, Spec(dtype or whole.dtype, shape), offset + first, strides)
    capacity = whole.nbytes if storage is whole else (offset + storage.numel) * whole.item_bytes
    if tensor.extent and (tensor.first + tensor.extent) * tensor.item_bytes > capacity:
        refuse("it is damaged: a tensor lies outside of its storage")
    return tensor


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 <= number < 1 << 62


def _are_sizes(numbers: Any) -> bool:
    return type(numbers) is tuple and all(_is_size(number) for number in numbers)

"""What the layouts of embeddings read and write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sdops.core.tree import Leaf

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.floating[Any]]

# Width of a token's vector -> the text encoder it is for, named as in `archs/`.
WIDTHS = {768: "clip_l", 1024: "clip_h", 1280: "clip_g", 4096: "t5xxl"}
ENCODERS = ("clip_l", "clip_h", "clip_g", "t5xxl")
OUT = "_out"  # behind an encoder's name: vectors that are put in behind the text encoder, not in front of it

TOKENS = "tokens"
CLIP_IMAGE = "clip-image"
NULL_TEXT = "null-text"
AMBIGUOUS = "ambiguous"
KINDS = (TOKENS, CLIP_IMAGE, NULL_TEXT)


@dataclass(frozen=True, slots=True)
class Vectors:
    """The rows of one encoder.

    Attributes:
        values: [n, width]; null-text has [steps, 77, width].
        dtype: In which they were stored (safetensors name); the values are exact in it.
    """

    values: Floats
    dtype: str = "F32"

    def __len__(self) -> int:
        return len(self.values)

    @property
    def width(self) -> int:
        """Numbers in a vector."""
        return int(self.values.shape[-1])


@dataclass(frozen=True)
class Embedding:
    """One embedding: vectors in place of words, for one or more text encoders.

    Attributes:
        name: Its own, else that of the file.
        vectors: Encoder (`clip_l` ...; with `_out` behind it, output vectors) -> rows. All have the same number.
        placeholder: The word that the file has for it; "*" where it says nothing.
        kind: TOKENS; CLIP_IMAGE (the mean of CLIP image embeddings, as aesthetic gradients use it); NULL_TEXT (an
            unconditional text per step); AMBIGUOUS: one row of 768, which may be the first or the second.
        step: Steps of training.
        checkpoint: Start of the hash of the checkpoint it was trained on.
        checkpoint_name: Name of that.
    """

    name: str
    vectors: Mapping[str, Vectors]
    placeholder: str = "*"
    kind: str = TOKENS
    step: int | None = None
    checkpoint: str | None = None
    checkpoint_name: str | None = None

    @property
    def rows(self) -> int:
        """Number of vectors, i.e. of tokens that it takes in a prompt."""
        return max((len(part) for part in self.vectors.values()), default=0)

    @property
    def label(self) -> str:
        """The placeholder, or the name where that says nothing."""
        return self.name if self.placeholder == "*" else self.placeholder


@dataclass(frozen=True)
class Contents:
    """What a file holds, whatever its container.

    Attributes:
        tree: Plain values with Leafs (or arrays) for tensors; safetensors are a dict of Leafs. A picture is its bytes.
        metadata: Texts beside the tensors.
        stem: The file's name without its ending.
        load: Gives the values of a Leaf and their dtype.
    """

    tree: Any
    metadata: Mapping[str, str]
    stem: str
    load: Callable[[Leaf], Vectors]

    def entries(self) -> dict[Any, Any]:
        """The tree if it is a dict, else nothing."""
        return self.tree if type(self.tree) is dict else {}

    def vectors(self, item: Any) -> Vectors:
        """The rows of a Leaf or an array, one row if it has one dimension."""
        found = self.load(item) if type(item) is Leaf else Vectors(item)
        values = found.values
        return Vectors(values.reshape(1, -1) if values.ndim == 1 else values, found.dtype)


@dataclass(frozen=True)
class Written:
    """A file to be.

    Attributes:
        tree: As in Contents, with arrays (Vectors) for tensors; a picture is its bytes.
        metadata: For safetensors.
        suffix: What its name has behind that of the embedding, e.g. `_2` for the second of two files.
    """

    tree: Any
    metadata: Mapping[str, str] = field(default_factory=dict)
    suffix: str = ""


def is_rows(item: Any, widths: Sequence[int] = ()) -> bool:
    """Whether something is a float tensor or array of one or more rows (of one of the widths)."""
    if type(item) is Leaf:
        shape, is_float = item.spec.shape, item.spec.is_float
    elif hasattr(item, "dtype"):  # an array, out of a picture
        shape, is_float = item.shape, item.dtype.kind == "f"
    else:
        return False
    return is_float and len(shape) in (1, 2) and 0 not in shape and (not widths or shape[-1] in widths)


def width_of(item: Any) -> int:
    """The last dimension of what `is_rows`."""
    shape = item.spec.shape if type(item) is Leaf else item.shape
    return int(shape[-1])


def encoder_of(width: int) -> str:
    """The text encoder that a width tells; `width32` for one that is not known."""
    return WIDTHS.get(width, f"width{width}")


def by_encoder(vectors: Vectors) -> dict[str, Vectors]:
    """Rows under the encoder that their width tells."""
    return {encoder_of(vectors.width): vectors}

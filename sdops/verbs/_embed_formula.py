"""The language of `sdops embed make`: words, files and numbers, added, scaled and joined. Parsed by hand, never eval.

    sum      = product (("+" | "-") product)*
    product  = factor (("*" | "/") factor)*
    factor   = "-" factor | item ("[" rows "]")*
    item     = number | word | 'a text' | 'file.pt' | #2368 | function "(" sum ("," sum)* ")" | "(" sum ")"
    rows     = N | N ":" N | N ("," N)*

A text gives a vector per token. Functions: concat(x, ...), mean(x, ...), sum(x), slerp(x, y, t), norm(x[, length]),
ortho(x, y), pad(x, n), repeat(x, n), prune(x[, cosine]).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sdops.errors import MismatchError, UsageError
from sdops.text import suggest
from sdops.verbs import _embed_algebra as algebra
from sdops.verbs._embed_algebra import Rows

FILE_ENDINGS = (".pt", ".bin", ".safetensors", ".png", ".webp", ".pti", ".ckpt")
_DEPTH = 64
_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+)|(?P<id>#\d+)|(?P<text>'[^']*'|\"[^\"]*\")"
    r"|(?P<word>[^\W\d][\w.]*)|(?P<sign>[-+*/()\[\]:,]))"
)
Value = float | Rows


@dataclass(frozen=True, slots=True)
class Piece:
    """A word of the language: kind (`number`, `id`, `text`, `word`, `sign`, `end`), text, and where it stands."""

    kind: str
    text: str
    place: int


@dataclass(frozen=True)
class Meaning:
    """What words and files mean for one text encoder.

    Attributes:
        words: Text -> a row per token.
        row: Number of a token -> its row.
        files: File -> its rows.
        usual: Median norm of the vocabulary; None without one.
    """

    words: Callable[[str], Rows]
    row: Callable[[int], Rows]
    files: Mapping[str, Rows]
    usual: float | None


def pieces(formula: str) -> list[Piece]:
    """The formula cut up.

    Raises:
        UsageError: there is a sign that means nothing.
    """
    found, place = [], 0
    while place < len(formula.rstrip()):
        match = _TOKEN.match(formula, place)
        if match is None or match.lastgroup is None:
            rest = formula[place:].strip()
            raise UsageError(
                f"`{rest[:20]}` means nothing in the formula `{formula}`",
                hint="words, 'quoted texts', #numbers, files, + - * / ( ) [ ]; `sdops embed make --help` explains them",
            )
        text = match[match.lastgroup]
        found.append(Piece(match.lastgroup, text.strip("'\"") if match.lastgroup == "text" else text, place))
        place = match.end()
    return [*found, Piece("end", "", place)]


def files_in(formula: str) -> list[str]:
    """The files that a formula names, each once."""
    named = [piece.text for piece in pieces(formula) if is_file(piece)]
    return list(dict.fromkeys(named))


def has_words(formula: str) -> bool:
    """Whether a formula needs a vocabulary."""
    found = pieces(formula)
    return any(
        piece.kind == "id" or (piece.kind in ("word", "text") and not is_file(piece) and not _is_call(found, index))
        for index, piece in enumerate(found)
    )


def is_file(piece: Piece) -> bool:
    """Whether a piece names a file."""
    return piece.kind in ("word", "text") and piece.text.lower().endswith(FILE_ENDINGS)


def _is_call(found: Sequence[Piece], index: int) -> bool:
    return found[index].text in _FUNCTIONS and found[index].kind == "word" and found[index + 1].text == "("


def evaluate(formula: str, meaning: Meaning) -> Rows:
    """The rows that a formula makes, for one encoder.

    Raises:
        UsageError: it is no formula, or names what does not exist.
        MismatchError: parts do not fit each other.
    """
    value = _Parser(formula, meaning).whole()
    if isinstance(value, float):
        raise UsageError(f"the formula `{formula}` is a number, not an embedding", hint="`0.7*painting + 0.3*ink`")
    return value


class _Parser:
    """Recursive descent; every method reads its part and returns its value."""

    def __init__(self, formula: str, meaning: Meaning) -> None:
        self._formula, self._meaning = formula, meaning
        self._pieces = pieces(formula)
        self._at = 0
        self._depth = 0

    def whole(self) -> Value:
        value = self._sum()
        if self._next.kind != "end":
            raise self._odd()
        return value

    @property
    def _next(self) -> Piece:
        return self._pieces[self._at]

    def _accepts(self, *signs: str) -> str:
        """The sign that comes next if it is one of these, and step over it; else ""."""
        piece = self._next
        if piece.kind != "sign" or piece.text not in signs:
            return ""
        self._at += 1
        return piece.text

    def _expect(self, sign: str) -> None:
        if not self._accepts(sign):
            raise self._odd(f"`{sign}`")

    def _odd(self, wanted: str = "") -> UsageError:
        piece = self._next
        there = f"`{piece.text}` at place {piece.place + 1}" if piece.kind != "end" else "the end"
        lack = f", where {wanted} should be" if wanted else ""
        return UsageError(
            f"the formula `{self._formula}` does not make sense: {there}{lack}",
            hint="e.g. `0.7*painting + 0.3*'oil on canvas'[0:2] - photo`",
        )

    def _sum(self) -> Value:
        self._depth += 1
        if self._depth > _DEPTH:
            raise UsageError("the formula is nested too deeply", hint="make parts of it first, and use their files")
        value = self._product()
        while sign := self._accepts("+", "-"):
            value = _plus(value, self._product(), -1.0 if sign == "-" else 1.0)
        self._depth -= 1
        return value

    def _product(self) -> Value:
        value = self._factor()
        while sign := self._accepts("*", "/"):
            other = self._factor()
            value = _times(value, other) if sign == "*" else _over(value, other)
        return value

    def _factor(self) -> Value:
        sign = 1.0
        while minus := self._accepts("-", "+"):
            sign = -sign if minus == "-" else sign
        value = self._item()
        while self._accepts("["):
            value = _rows(value)[self._indices(len(_rows(value)))]
        return value if sign > 0 else -value

    def _item(self) -> Value:
        piece = self._next
        if _is_call(self._pieces, self._at):
            return self._call()
        if piece.kind == "sign":
            self._expect("(")
            value = self._sum()
            self._expect(")")
            return value
        if piece.kind == "end":
            raise self._odd("a word")
        self._at += 1
        if piece.kind == "number":
            return float(piece.text)
        if piece.kind == "id":
            return self._meaning.row(int(piece.text[1:]))
        return self._meaning.files[piece.text] if is_file(piece) else self._named(piece)

    def _named(self, piece: Piece) -> Value:
        if self._next.text == "(" and piece.kind == "word":
            close = suggest(piece.text, _FUNCTIONS)
            hint = f"did you mean `{close}`?" if close else f"there are {', '.join(_FUNCTIONS)}"
            raise UsageError(f"there is no function `{piece.text}`", hint=hint)
        return self._meaning.words(piece.text)

    def _call(self) -> Value:
        name = self._next.text
        self._at += 2  # the name and its bracket
        arguments = [self._sum()]
        while self._accepts(","):
            arguments.append(self._sum())
        self._expect(")")
        least, most, function = _FUNCTIONS[name]
        if not least <= len(arguments) <= most:
            wanted = str(least) if least == most else f"{least} or more" if most > 9 else f"{least} to {most}"
            raise UsageError(f"`{name}` takes {wanted} values, here are {len(arguments)}", hint=f"`{_USES[name]}`")
        return function(arguments, self._meaning)

    def _indices(self, length: int) -> list[int]:
        """Rows in brackets, behind the opening one."""
        first = self._index()
        if self._accepts(":"):
            numbers = list(range(length))[slice(first, self._index())]
        else:
            numbers = [first if first is not None else 0]
            if first is None:
                raise self._odd("a number")
            while self._accepts(","):
                further = self._index()
                if further is None:
                    raise self._odd("a number")
                numbers.append(further)
        self._expect("]")
        if not numbers or any(not -length <= number < length for number in numbers):
            raise UsageError(f"there are {length} vectors to choose from", hint="they are counted from 0: `x[0:2]`")
        return numbers

    def _index(self) -> int | None:
        sign = -1 if self._accepts("-") else 1
        piece = self._next
        if piece.kind != "number" or not piece.text.isdecimal():
            return None
        self._at += 1
        return sign * int(piece.text)


def _rows(value: Value) -> Rows:
    if isinstance(value, float):
        raise UsageError(f"`{value:g}` stands where vectors are needed", hint="numbers scale words: `0.5*cat`")
    return value


def _number(value: Value) -> float:
    if not isinstance(value, float):
        raise UsageError("vectors stand where a number is needed", hint="e.g. `slerp(cat, dog, 0.5)`, `pad(cat, 4)`")
    return value


def _plus(a: Value, b: Value, sign: float) -> Value:
    if isinstance(a, float) and isinstance(b, float):
        return a + sign * b
    return algebra.add([_rows(a), _rows(b)], [1.0, sign])


def _times(a: Value, b: Value) -> Value:
    if not isinstance(a, float) and not isinstance(b, float):
        raise UsageError("two words cannot be multiplied", hint="`concat(a, b)` joins them, `a + b` adds them")
    return a * b


def _over(a: Value, b: Value) -> Value:
    divisor = _number(b)
    if divisor == 0:
        raise UsageError("the formula divides by 0", hint="`x / 2`")
    return a / divisor


def _whole(value: Value) -> int:
    number = _number(value)
    if number != int(number) or not 1 <= number <= 1000:
        raise UsageError(f"`{number:g}` is no number of vectors", hint="a whole one from 1 to 1000")
    return int(number)


def _mean(values: Sequence[Value], meaning: Meaning) -> Rows:
    del meaning
    parts = [_rows(value) for value in values]
    return parts[0].mean(axis=0, keepdims=True) if len(parts) == 1 else algebra.average(parts, [1.0] * len(parts))


def _norm(values: Sequence[Value], meaning: Meaning) -> Rows:
    if len(values) > 1:
        return algebra.scaled_to(_rows(values[0]), _number(values[1]))
    if meaning.usual is None:
        raise MismatchError("the usual norm is not known without a model", hint="`--model M`, or `norm(x, 0.39)`")
    return algebra.scaled_to(_rows(values[0]), meaning.usual)


def _prune(values: Sequence[Value], meaning: Meaning) -> Rows:
    del meaning
    rows = _rows(values[0])
    kept = algebra.distinct(rows, _number(values[1]) if len(values) > 1 else algebra.ALIKE)
    if not kept:
        raise MismatchError("nothing is left: all vectors are zeros", hint="leave `prune` out")
    return rows[kept]


_MANY = 1000
# Name -> least and most values, and what is done with them.
_FUNCTIONS: dict[str, tuple[int, int, Callable[[Sequence[Value], Meaning], Rows]]] = {
    "concat": (1, _MANY, lambda values, _: algebra.concat([_rows(value) for value in values])),
    "mean": (1, _MANY, _mean),
    "sum": (1, 1, lambda values, _: _rows(values[0]).sum(axis=0, keepdims=True)),
    "slerp": (3, 3, lambda values, _: algebra.slerp(_rows(values[0]), _rows(values[1]), _number(values[2]))),
    "norm": (1, 2, _norm),
    "ortho": (2, 2, lambda values, _: algebra.without(_rows(values[0]), _rows(values[1]))),
    "pad": (2, 2, lambda values, _: algebra.padded(_rows(values[0]), _whole(values[1]))),
    "repeat": (2, 2, lambda values, _: algebra.repeated(_rows(values[0]), _whole(values[1]))),
    "prune": (1, 2, _prune),
}
_USES = {
    "concat": "concat(a, b)", "mean": "mean(a, b)", "sum": "sum(a)", "slerp": "slerp(a, b, 0.5)",
    "norm": "norm(a, 0.39)", "ortho": "ortho(a, b)", "pad": "pad(a, 4)", "repeat": "repeat(a, 4)",
    "prune": "prune(a, 0.95)",
}  # fmt: skip

"""A dial: one number, or one per block, component or pattern of tensor names. Any float knob can be one. No torch.

    0.3                                        one number
    0.3, IN00-IN05=0.1, vae=0, *attn2*=0.6     a default, then rules; the last rule that matches a tensor wins
    GRAD_V, BASE=0.5                           a preset or a list of block weights in place of the default
    0.3, IN00-IN05:attn2:0.6                   BLOCKS:ELEMENTS:RATIO, as supermerger writes it

A rule's selector, the text before `=`, is one of

    IN04  IN00-IN05  block:IN04   a block slot of the model's family, or a range in the order of the slots
    vae   component:vae           a component
    *attn2.to_k*                  a pattern for the whole tensor name (* ? [...]), or a complete tensor name
    /attn[12]/                    a regular expression searched in the tensor name
    BLOCKS:ELEMENTS               slots and ranges divided by spaces (empty = all), and texts of which the tensor name
                                  must contain one (empty = any); `NOT ` before either inverts it

Rules are divided by commas, semicolons or line breaks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import translate
from math import isfinite
from numbers import Real
from typing import NamedTuple

from sdops.core.block_weights import OUTSIDE, find_slot, from_numbers, from_preset, preset_name
from sdops.errors import UsageError
from sdops.text import shorten, suggest

DialValue = float | str | Mapping[str, float] | Sequence[float]

MAX_PATTERN = 200  # characters of a pattern; a short one may take long, too: Ctrl-C ends it
MAX_TEXT = 20_000

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
# One item of a dial's text; a regular expression may contain the dividers.
_ITEM = re.compile(r"\s*(?:(?P<selector>/.+?/)\s*=\s*(?P<number>[^,;\n]*?)|(?P<plain>[^,;\n]*?))[ \t\r]*(?:[,;\n]|\Z)")


class Place(NamedTuple):
    """A tensor's name, the block slot it lies in and the component it belongs to ("" for none)."""

    key: str
    block: str
    component: str


@dataclass(frozen=True, slots=True)
class Rule:
    """A number for the tensors that meet all of the conditions.

    Attributes:
        selector: As the user wrote it.
        value: The number.
        blocks: The block must be one of these; None = any.
        component: The component must be this; None = any.
        pattern: Must be found in the tensor's name; None = any.
    """

    selector: str
    value: float
    blocks: frozenset[str] | None = None
    component: str | None = None
    pattern: re.Pattern[str] | None = None

    def matches(self, place: Place) -> bool:
        """Whether the rule speaks of this tensor."""
        if self.blocks is not None and place.block not in self.blocks:
            return False
        if self.component is not None and place.component != self.component:
            return False
        return self.pattern is None or self.pattern.search(place.key) is not None

    def __str__(self) -> str:
        # BLOCKS:ELEMENTS also takes `=`, so one form serves all
        return f"{self.selector}={self.value!r}"


class Tally(NamedTuple):
    """What one rule does to a model: how many tensors it matches, and for how many it is the last to match."""

    rule: Rule
    matched: int
    decided: int


@dataclass(frozen=True, slots=True)
class Dial:
    """A number for each tensor.

    Attributes:
        knob: The knob's name, for messages.
        default: The number where nothing else applies.
        blocks: A number per block slot; empty if the dial has no block weights.
        rules: In the order given; the last one that matches wins over blocks and default.
        notes: What was assumed in reading block weights, for the user.
    """

    knob: str
    default: float
    blocks: Mapping[str, float] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def is_constant(self) -> bool:
        """Whether it is the same number for every tensor, whatever the model."""
        return all(value == self.default for value in (*self.blocks.values(), *(rule.value for rule in self.rules)))

    def resolve(self, key: str, block: str, component: str) -> float:
        """The number for one tensor."""
        rule = self._deciding(Place(key, block, component))
        return rule.value if rule else self.blocks.get(block, self.default)

    def explain(self, key: str, block: str, component: str) -> str:
        """The number for one tensor and where it comes from, one line."""
        place = Place(key, block, component)
        matching = [f"`{rule}`" for rule in self.rules if rule.matches(place)]
        if matching:
            before = f", which comes after {', '.join(matching[:-1])}" if matching[1:] else ""
            return f"{self.knob} {self.resolve(*place):g} from {matching[-1]}{before}"
        if block in self.blocks:
            return f"{self.knob} {self.blocks[block]:g} from the weight of block {block}"
        return f"{self.knob} {self.default:g}, the default"

    def tally(self, places: Iterable[Place]) -> list[Tally]:
        """Per rule, how many of the tensors it matches and decides."""
        matched, decided = [0] * len(self.rules), [0] * len(self.rules)
        for place in places:
            last = None
            for index, rule in enumerate(self.rules):
                if rule.matches(place):
                    matched[index] += 1
                    last = index
            if last is not None:
                decided[last] += 1
        return [Tally(*counts) for counts in zip(self.rules, matched, decided, strict=True)]

    def check(self, places: Iterable[Place]) -> list[Tally]:
        """As `tally`, but a rule that matches no tensor is an error.

        Raises:
            UsageError: names the rule, with what the model has instead.
        """
        places = list(places)
        tallies = self.tally(places)
        for rule, matched, _ in tallies:
            if not matched:
                raise UsageError(
                    f"`{self.knob}`: the rule `{rule}` matches none of the {len(places):,} tensors",
                    hint=_instead(rule, places),
                    knob=self.knob,
                    rule=str(rule),
                )
        return tallies

    def to_json(self) -> float | str:
        """A number, or the dial's text; `parse_dial` reads both back to the same dial."""
        if not self.blocks and not self.rules:
            return self.default
        return str(self)

    def __str__(self) -> str:
        first = list(self.blocks.values()) or [self.default]
        return ", ".join([*(f"{value!r}" for value in first), *map(str, self.rules)])

    def _deciding(self, place: Place) -> Rule | None:
        return next((rule for rule in reversed(self.rules) if rule.matches(place)), None)


def _instead(rule: Rule, places: Sequence[Place]) -> str:
    """A hint for a rule that matched nothing."""
    if rule.component is not None:
        return f"the components here are {', '.join(sorted({p.component for p in places if p.component})) or 'unknown'}"
    if rule.pattern is None:
        return f"the blocks here are {', '.join(sorted({p.block for p in places if p.block})) or 'unknown'}"
    bare = rule.selector.strip("*/")
    if rule.blocks is None and any(bare in place.key for place in places):
        return f"a pattern must cover the whole name: `*{bare}*`"
    return "`sdops inspect FILE --keys` lists the names"


# Reading


def parse_dial(
    value: DialValue, *, knob: str, default: float, slots: Sequence[str] = (), components: Sequence[str] = ()
) -> Dial:
    """Read what a user gave for a float knob.

    Args:
        value: A number; a text (see the module); a mapping from selectors to numbers, where "" or "default" is the
            default; or a list of block weights (see core.block_weights for the lengths).
        knob: The knob's name, for messages.
        default: The number where `value` gives none.
        slots: The block slots of the model's family in order.
        components: The components of the model's family.

    Raises:
        UsageError: something in it is not a finite number, names no slot or component, or is malformed; the message
            has its place in the text.
    """
    reader = _Reader(knob, slots, components)
    if isinstance(value, str):
        return reader.text(value, default)
    if isinstance(value, Mapping):
        return reader.mapping(value, default)
    if isinstance(value, Sequence):
        return reader.weights([reader.number(item) for item in value], default)
    return Dial(knob, reader.number(value))


@dataclass(frozen=True, slots=True)
class _Reader:
    """Parses one knob's value for one model family."""

    knob: str
    slots: Sequence[str]
    components: Sequence[str]

    def text(self, text: str, default: float) -> Dial:
        """The command line's form."""
        if len(text) > MAX_TEXT:
            raise self._error(f"its text has {len(text):,} characters", f"at most {MAX_TEXT:,} are read")
        numbers: list[float] = []
        preset: str | None = None
        rules: list[Rule] = []
        for position, selector, number in self._items(text):
            at = f" at character {position + 1}" if position else ""
            if selector is not None:
                rules.append(self.rule(selector, self.number(number, at), at))
            elif rules or preset is not None:
                raise self._error(f"`{number}`{at} comes after rules", "the default or the block weights come first")
            elif _NUMBER.fullmatch(number.split()[0]):
                numbers += [self.number(word, at) for word in number.split()]
            elif numbers:
                raise self._error(f"`{number}`{at} is neither a number nor a rule", _FORMS)
            elif preset_name(number.split(":")[0]):
                preset = number
            else:
                raise self._error(f"`{shorten(number, 60)}`{at} is neither a number nor a rule", self._meant(number))
        if preset is not None or len(numbers) > 1:
            return self.weights(numbers if preset is None else preset, default, rules)
        return Dial(self.knob, numbers[0] if numbers else default, rules=tuple(rules))

    def mapping(self, mapping: Mapping[str, float], default: float) -> Dial:
        """Python's form."""
        rules = []
        for selector, value in mapping.items():
            if selector in ("", "default"):
                default = self.number(value)
            else:
                rules.append(self.rule(selector, self.number(value), ""))
        return Dial(self.knob, default, rules=tuple(rules))

    def weights(self, given: Sequence[float] | str, default: float, rules: Sequence[Rule] = ()) -> Dial:
        """A dial from block weights or a preset; a listed VAE that is no slot of the family becomes a rule."""
        try:
            read = from_preset(given, self.slots) if isinstance(given, str) else from_numbers(given, self.slots)
        except UsageError as error:
            raise UsageError(f"`{self.knob}`: {error.message}", hint=error.hint, **error.data) from None
        blocks = {slot: weight for slot, weight in read.weights.items() if slot in self.slots}
        beside = [
            self.rule(f"component:{slot.lower()}", weight, "")
            for slot, weight in read.weights.items()
            if slot not in blocks
        ]
        notes = (f"`{self.knob}`: {read.note}",) if read.note else ()
        return Dial(self.knob, blocks.get("BASE", default), blocks, (*beside, *rules), notes)

    def number(self, value: object, at: str = "") -> float:
        """A finite number, from Python or from text."""
        if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, Real):
            raise self._error(f"`{shorten(str(value), 60)}`{at} is not a number", _FORMS)
        if not isfinite(value):
            raise self._error(f"{value}{at} is not a finite number", "give a number such as 0.3")
        return float(value)

    def rule(self, selector: str, value: float, at: str) -> Rule:
        """One rule; the selector's form decides what it matches."""
        selector = " ".join(selector.split())
        if not selector:
            raise self._error(f"a rule{at} has nothing before its `=`", _FORMS)
        if len(selector) > MAX_PATTERN:
            raise self._error(
                f"the pattern `{shorten(selector, 40)}`{at} is too long", f"at most {MAX_PATTERN} characters"
            )
        if len(selector) > 2 and selector[0] == selector[-1] == "/":
            return Rule(selector, value, pattern=self._regex(selector, at))
        if re.search(r"[,;=]", selector):
            raise self._error(f"`{selector}`{at} holds `,`, `;` or `=`", "write it as /regular expression/")
        kind, colon, rest = selector.partition(":")
        if colon and kind == "component":
            return Rule(selector, value, component=self._component(rest, at))
        if colon and kind == "block":
            return Rule(selector, value, blocks=self._range(rest, at))
        if colon:
            return Rule(selector, value, blocks=self._blocks(kind, at), pattern=_elements(rest))
        if any(mark in selector for mark in "*?["):
            return Rule(selector, value, pattern=re.compile(rf"\A{translate(selector)}"))
        return self._bare(selector, value, at)

    def _bare(self, selector: str, value: float, at: str) -> Rule:
        """A slot, a range, a component or a complete tensor name."""
        if find_slot(selector, self.slots):
            return Rule(selector, value, blocks=self._range(selector, at))
        if _component_name(selector) in self.components:
            return Rule(selector, value, component=_component_name(selector))
        if "." in selector:
            return Rule(selector, value, pattern=re.compile(rf"\A{re.escape(selector)}\Z"))
        if all(find_slot(end, self.slots) for end in selector.split("-")):
            return Rule(selector, value, blocks=self._range(selector, at))
        raise self._error(f"`{selector}`{at} is no block or component of this model", self._meant(selector))

    def _regex(self, selector: str, at: str) -> re.Pattern[str]:
        try:
            return re.compile(selector[1:-1])
        except re.error as error:
            raise self._error(f"`{selector}`{at} is no regular expression: {error}", "see Python's `re`") from None

    def _component(self, name: str, at: str) -> str:
        if _component_name(name) not in self.components:
            raise self._error(f"`{name}`{at} is no component of this model", self._meant(name))
        return _component_name(name)

    def _blocks(self, text: str, at: str) -> frozenset[str] | None:
        """Slots and ranges divided by spaces, perhaps after NOT; None for an empty text = all."""
        words = text.split()
        inverted = bool(words) and words[0].upper() == "NOT"
        words = words[inverted:]
        if not words:
            return None
        chosen = frozenset().union(*(self._range(word, at) for word in words))
        return frozenset(self.slots) - chosen if inverted else chosen

    def _range(self, text: str, at: str) -> frozenset[str]:
        """The slots of `IN04` or `IN00-IN05`."""
        ends = [find_slot(end, self.slots) for end in text.split("-")]
        if not 1 <= len(ends) <= 2 or None in ends:
            raise self._error(f"`{text}`{at} is no block of this model", self._meant(text))
        first, last = (list(self.slots).index(str(end)) for end in (ends[0], ends[-1]))
        if first > last:
            raise self._error(f"the range `{text}`{at} runs backwards", f"write `{ends[-1]}-{ends[0]}`")
        return frozenset(self.slots[first : last + 1])

    def _items(self, text: str) -> Iterator[tuple[int, str | None, str]]:
        """Position, selector (None for a bare number or preset) and number of each item."""
        if not text.strip():
            raise self._error("it is empty", _FORMS)
        position = 0
        while position < len(text):
            item = _ITEM.match(text, position)
            if item is None:
                raise self._error(f"`{shorten(text[position:], 40)}` at character {position + 1} is malformed", _FORMS)
            start = item.start("plain" if item["selector"] is None else "selector")
            position = item.end()
            if item["selector"] is not None:
                yield start, item["selector"], item["number"]
            elif item["plain"]:
                yield start, *_split(item["plain"])

    def _meant(self, word: str) -> str:
        """A hint for a word that is neither slot nor component."""
        close = suggest(word, [*self.slots, *self.components])
        if close:
            return f"did you mean `{close}`?"
        blocks = [slot for slot in self.slots if slot not in OUTSIDE]
        known = [f"blocks {blocks[0]} to {blocks[-1]}"] if blocks else []
        known += [f"components {', '.join(self.components)}"] if self.components else []
        return f"{'; '.join(known) or 'this model has no known blocks'}; for tensor names that hold it write `*{word}*`"

    def _error(self, problem: str, hint: str) -> UsageError:
        return UsageError(f"`{self.knob}`: {problem}", hint=hint, knob=self.knob)


_FORMS = "for example `0.3`, `0.3, IN00-IN05=0.1, vae=0, *attn2*=0.6` or `GRAD_V`"


def _split(item: str) -> tuple[str | None, str]:
    """Selector and number of `SELECTOR=NUMBER` or `BLOCKS:ELEMENTS:RATIO`; a bare item has no selector."""
    if "=" in item:
        selector, _, number = item.rpartition("=")
        return selector.strip(), number.strip()
    first, *others = item.split(":")
    if len(others) == 2 and not (preset_name(first) and preset_name(others[0])):  # OUT07 is a slot and a preset
        return f"{first}:{others[0]}", others[1].strip()
    return None, item


def _component_name(text: str) -> str:
    return text.strip().lower().replace("-", "_")


def _elements(text: str) -> re.Pattern[str] | None:
    """Tensor names that contain one of the words, or none of them after NOT; None = any name."""
    words = text.split()
    inverted = bool(words) and words[0].upper() == "NOT"
    words = words[inverted:]
    if not words:
        return None
    one = "|".join(map(re.escape, words))
    return re.compile(rf"\A(?!.*(?:{one}))" if inverted else one)

"""A merge's request, checked against its method's card before any file is opened. No torch, no numpy."""

from __future__ import annotations

from sdops.card import Card
from sdops.errors import UsageError


def check_count(card: Card, count: int, base: bool) -> None:
    """Refuse a wrong number of models.

    Args:
        card: The method.
        count: How many models there are, the base not counted.
        base: Whether there is one.

    Raises:
        UsageError: the method takes another number, needs a base or has none.
    """
    method = card.name.replace("_", "-")
    hint = f"`sdops methods {method}` explains the method"
    many = any(name.startswith("*") for name in card.inputs)
    if base and not card.base:
        raise UsageError(f"`{method}` takes no base model", hint=hint, option="base")
    if card.base and not base:
        raise UsageError(
            f"`{method}` needs the models' common ancestor", hint="name it with `--base FILE`", option="base"
        )
    if count != len(card.inputs) and not (many and count):
        wanted = "at least 1 model" if many else f"{len(card.inputs)} models ({', '.join(card.inputs)})"
        raise UsageError(f"`{method}` merges {wanted}, {count} given", hint=hint, option="models")

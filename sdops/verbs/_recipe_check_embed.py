"""Who may read embeddings that a step of a recipe makes: steps of embeddings alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdops.verbs._recipe_text import Recipe, Step, wrong


def is_embed(step: Step) -> bool:
    """Whether a step makes embeddings."""
    return step.verb.startswith("embed ")


def check_embed(recipe: Recipe, step: Step, arguments: Mapping[str, Any], uses: Sequence[str]) -> None:
    """Steps of embeddings read each other, and nobody else reads them; their models and LoRAs are files.

    Args:
        recipe: All of it.
        step: One of its steps.
        arguments: Of the step, parameters' values in place.
        uses: The inputs and steps that it reads.

    Raises:
        UsageError: it reads what it cannot.
    """
    embeds = {one.id: is_embed(one) for one in recipe.steps}
    for name in uses:
        if name in recipe.inputs or embeds[name] == is_embed(step):
            continue
        if embeds[name]:
            message, hint = f"`{name}` makes embeddings, which `{step.verb}` does not read", "steps of `embed` do"
        else:
            message = f"`{step.verb}` reads files and embeddings, `{name}` makes neither"
            hint = f"build `{name}` apart, and name its result under `[inputs]`"
        raise wrong(step.path, message, hint)
    for key in ("model", "lora"):
        if is_embed(step) and embeds.get(arguments.get(key, "")):
            raise wrong(f"{step.path}.{key}", f"`{arguments[key]}` makes embeddings", "name a file under `[inputs]`")

"""`sdops methods [NAME]`."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem

from sdops.commands._console import Console
from sdops.commands._options import general_options


def _complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    del ctx, param
    from sdops.card import cards
    from sdops.verbs.methods import kebab

    shelf = [(kebab(card.name), card.summary) for card in cards().values()]
    return [CompletionItem(name, help=text) for name, text in shelf if name.startswith(incomplete)]


@click.command(
    epilog="""\b
    Examples:
      sdops methods
      sdops methods weighted-sum
    """
)
@click.argument("name", required=False, shell_complete=_complete, help="The method to explain")
@general_options
def command(console: Console, name: str | None) -> int:
    """List the merge methods, or explain one."""
    from sdops.verbs.methods import methods

    return console.show(methods(name))

"""`sdops env`."""

from __future__ import annotations

import click

from sdops.commands._console import Console
from sdops.commands._options import general_options


@click.command()
@general_options
def command(console: Console) -> int:
    """Show versions, devices and caches, for a bug report."""
    from sdops.verbs.env import env

    return console.show(env())

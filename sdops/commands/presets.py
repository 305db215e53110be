"""`sdops presets [NAME]`."""

from __future__ import annotations

import click

from sdops.commands._console import Console
from sdops.commands._options import general_options


@click.command(
    epilog="""\b
    Examples:
      sdops presets
      sdops presets inpainting
      sdops build inpainting --model mine.safetensors
    """
)
@click.argument("name", required=False, help="Explain this one")
@general_options
def command(console: Console, name: str | None) -> int:
    """List the recipes for use cases that come with sdops, or explain one."""
    from sdops.verbs.presets import presets

    return console.show(presets(name))

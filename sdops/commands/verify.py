"""`sdops verify FILE...`."""

from __future__ import annotations

import click

from sdops.commands._console import Console
from sdops.commands._options import files_argument, general_options


@click.command(
    epilog="""\b
    Examples:
      sdops verify model.safetensors
      sdops verify -q *.safetensors
    Exit code 1 if a file is damaged.
    """
)
@files_argument
@general_options
def command(console: Console, files: tuple[str, ...]) -> int:
    """Read every tensor and report damage."""
    from sdops.verbs.verify import verify

    return console.show(verify(*files, progress=console.progress))

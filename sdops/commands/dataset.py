"""`sdops dataset check FOLDER`."""

from __future__ import annotations

from typing import Any

import click

from sdops.commands._console import Console
from sdops.commands._options import FILE, general_options


@click.group(no_args_is_help=True)
def command() -> None:
    """Check a folder of pictures before training."""


@command.command(
    "check",
    epilog="""\b
    Examples:
      sdops dataset check photos
      sdops dataset check photos --resolution 1024 --masks photos-masks
    """,
)
@click.argument("folder", metavar="FOLDER", type=FILE, help="Pictures, with captions beside them")
@click.option("--resolution", type=click.IntRange(8), default=512, show_default=True, help="Pixels of a square")
@click.option("--bucket-step", type=click.IntRange(8), default=64, show_default=True, help="Sides are multiples of it")
@click.option(
    "--caption",
    type=click.Choice(["auto", "txt", "caption", "filename", "template"]),
    default="auto",
    show_default=True,
    help="Where captions come from",
)
@click.option("--template", default="", help="Caption of pictures that have none")
@click.option("--masks", default="", help="Folder of masks, or alpha")
@general_options
def check_command(console: Console, folder: str, **options: Any) -> int:
    """Show sizes, buckets, captions, duplicates and pictures that cannot be read; exit code 1 if some cannot."""
    from sdops.verbs.dataset import check

    return console.show(check(folder, **options))

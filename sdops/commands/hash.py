"""`sdops hash FILE...`."""

from __future__ import annotations

import click

from sdops.commands._console import Console
from sdops.commands._options import files_argument, general_options


@click.command(
    epilog="""\b
    Examples:
      sdops hash model.safetensors
      sdops hash --verify lora.safetensors
      sdops hash -q *.safetensors > SHA256SUMS
    """
)
@files_argument
@click.option("--verify", is_flag=True, help="Read the files anew and check the hashes stored inside them")
@general_options
def command(console: Console, files: tuple[str, ...], verify: bool) -> int:
    """Show the hashes of model files, in all the forms in use."""
    from sdops.verbs.hash import hash_files

    return console.show(hash_files(*files, verify=verify, progress=console.progress))

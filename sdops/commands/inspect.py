"""`sdops inspect FILE...`."""

from __future__ import annotations

import click

from sdops.commands._console import Console
from sdops.commands._options import files_argument, general_options


@click.command(
    epilog="""\b
    Examples:
      sdops inspect model.safetensors
      sdops inspect --keys lora.safetensors
      sdops inspect --norms lora.safetensors
      sdops inspect --json *.safetensors
    """
)
@files_argument
@click.option("--keys", is_flag=True, help="List every tensor")
@click.option(
    "--hash",
    "hashes",
    is_flag=True,
    envvar="SDOPS_INSPECT_HASH",
    help="Add the hashes, which takes reading the whole file",
)
@click.option("--norms", is_flag=True, help="LoRAs: measure the change block by block, look for damage by clamping")
@general_options
def command(console: Console, files: tuple[str, ...], keys: bool, hashes: bool, norms: bool) -> int:
    """Show what a model file is and what is in it."""
    from sdops.verbs.inspect import inspect

    return console.show(inspect(*files, keys=keys, hashes=hashes, norms=norms, progress=console.progress))

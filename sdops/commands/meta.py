"""`sdops meta FILE`."""

from __future__ import annotations

from typing import Any

import click

from sdops.commands._console import Console
from sdops.commands._options import FILE, general_options


def _pairs(_ctx: click.Context, _option: click.Parameter, words: tuple[str, ...]) -> dict[str, str]:
    pairs = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"`{word}` is not KEY=VALUE")
        pairs[key] = value
    return pairs


@click.command(
    epilog="""\b
    Examples:
      sdops meta model.safetensors
      sdops meta model.safetensors --set title="My model" --set author=me --thumbnail cover.jpg
      sdops meta lora.safetensors --strip-training --strip-workflow
      sdops meta model.safetensors --json > meta.json
      sdops meta model.safetensors --from-json meta.json
    Tensors and their hashes stay as they are; the file is changed in place if its header has room.
    """
)
@click.argument("file", metavar="FILE", type=FILE, help="A model file")
@click.option("--set", "set_", multiple=True, metavar="KEY=VALUE", callback=_pairs, help="Write a value")
@click.option("--unset", multiple=True, metavar="KEY", help="Remove a key")
@click.option("--strip", multiple=True, metavar="PATTERN", help="Remove all keys that match, such as `ss_*`")
@click.option("--strip-training", is_flag=True, help="Remove tags, folders and settings of the training")
@click.option("--strip-workflow", is_flag=True, help="Remove prompts and workflows")
@click.option("--from-json", type=FILE, metavar="FILE", help="Write keys and values from a JSON file")
@click.option("--thumbnail", type=FILE, metavar="IMAGE", help="Put an image in")
@click.option("-o", "--output", type=FILE, help="Write to this file, leave the input alone")
@click.option("-f", "--force", is_flag=True, help="Replace an existing output")
@click.option("-n", "--dry-run", is_flag=True, help="Show what would change, write nothing")
@general_options
def command(console: Console, file: str, **options: Any) -> int:
    """Show or change a model's metadata, in place."""
    from sdops.verbs.meta import meta

    return console.show(meta(file, **options, progress=console.progress))

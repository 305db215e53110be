"""`sdops embed inspect|convert ...`: embeddings (textual inversion) and their kin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from sdops.commands._console import Console
from sdops.commands._options import FILE, general_options

_KIND = click.option("--kind", help="What one row of 768 is: tokens, or clip-image (aesthetic)")
_MODEL = click.option("--model", type=FILE, help="A checkpoint whose words the vectors are compared with")
_OUTPUT: tuple[Callable[[Any], Any], ...] = (
    click.option("-o", "--output", type=FILE, help="A file or a folder; default: beside the input"),
    click.option("-f", "--force", is_flag=True, help="Replace an existing output"),
    click.option("-n", "--dry-run", is_flag=True, help="Say what would be written, write nothing"),
    click.option(
        "--dtype",
        type=click.Choice(["keep", "fp32", "fp16", "bf16"]),
        default="keep",
        show_default=True,
        help="Round the values",
    ),
)


def _output_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_OUTPUT):
        function = option(function)
    return function


@click.group(no_args_is_help=True)
def command() -> None:
    """Inspect, convert, explain and make embeddings (textual inversion), of all layouts."""


@command.command(
    "inspect",
    epilog="""\b
    Examples:
      sdops embed inspect style.pt
      sdops embed inspect *.pt --model sd15.safetensors
    """,
)
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=FILE, help="Embeddings of any layout")
@_MODEL
@click.option("--near", type=click.IntRange(0, 100), default=3, show_default=True, help="So many nearest words each")
@_KIND
@click.option("--matrix/--no-matrix", default=True, help="Compare the embeddings with each other")
@general_options
def inspect_command(console: Console, files: tuple[str, ...], **options: Any) -> int:
    """Show family, vectors, origin, checksum, nearest words and health of embeddings.

    Reads `.pt`, `.bin`, safetensors, pictures with an embedding inside, LoRAs that bundle some, checkpoints with added
    words, aesthetic vectors and null texts. Nothing in a file is executed.
    """
    from sdops.verbs.embed import inspect

    return console.show(inspect(*files, **options))


@command.command(
    "convert",
    epilog="""\b
    Examples:
      sdops embed convert style.pt --to diffusers
      sdops embed convert preview.png --to a1111 -o style.pt
      sdops embed convert lora.safetensors --to encoders --only mystyle
    """,
)
@click.argument(
    "file", metavar="FILE", type=FILE, help="An embedding, or a LoRA, checkpoint or picture with some inside"
)
@click.option("--to", required=True, help="Layout: a1111, diffusers, kohya, encoders, onetrainer, bundle, png ...")
@_output_options
@click.option("--only", metavar="NAME", help="Take just the embedding of this name or placeholder")
@click.option("--encoder", help="Take just the vectors for this text encoder: clip_l, clip_g ...")
@click.option("--name", help="Call the embedding so")
@_KIND
@general_options
def convert_command(console: Console, file: str, **options: Any) -> int:
    """Write embeddings in another layout, their values bit for bit."""
    from sdops.verbs.embed import convert

    return console.show(convert(file, **options))

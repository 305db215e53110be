"""`sdops embed inspect|convert ...`: embeddings (textual inversion) and their kin."""

from __future__ import annotations

from typing import Any

import click

from sdops.commands._console import Console
from sdops.commands._options import FILE, general_options
from sdops.commands._personal import BESIDE, dtype_option, numbers, output_options

_KIND = click.option("--kind", help="What one row of 768 is: tokens, or clip-image (aesthetic)")
_MODEL = click.option("--model", type=FILE, help="A checkpoint whose words the vectors are compared with")
_DTYPE = dtype_option("keep", "fp32", "fp16", "bf16")


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
@output_options(BESIDE)
@_DTYPE
@click.option("--only", metavar="NAME", help="Take just the embedding of this name or placeholder")
@click.option("--encoder", help="Take just the vectors for this text encoder: clip_l, clip_g ...")
@click.option("--name", help="Call the embedding so")
@click.option("--alone", is_flag=True, help="Leave the other half of a pair (X and X-neg) where it is")
@click.option("--lora", type=FILE, help="A LoRA to put it into, with `--to bundle`; the output has both")
@_KIND
@general_options
def convert_command(console: Console, file: str, **options: Any) -> int:
    """Write embeddings in another layout, their values bit for bit."""
    from sdops.verbs.embed import convert

    return console.show(convert(file, **options))


@command.command(
    "make",
    epilog="""\b
    Formulas:
      0.7*painting + 0.3*ink - photo     words, added and scaled
      'oil on canvas'                    a text: a vector per token
      'style.pt'[0:3]   #2368            rows of an embedding; a token by its number
      concat(x, y)   mean(x, y)   sum(x)   slerp(x, y, 0.5)   norm(x, 0.39)
      ortho(x, y)   pad(x, 4)   repeat(x, 4)   prune(x, 0.95)
    Examples:
      sdops embed make "0.7*painting + 0.3*ink - photo" --model sd15.safetensors -o ink.pt
      sdops embed make "norm('style.pt')" --model sd15.safetensors -o calm.pt
    """,
)
@click.argument("formula", help="Words, files and numbers, see below")
@click.option("--model", type=FILE, help="A checkpoint that gives the words' vectors")
@click.option("--to", help="Layout; default: a1111, or encoders for several text encoders")
@click.option("--name", help="The embedding's own name; default: the output's")
@output_options("Where to write", required=True)
@_DTYPE
@general_options
def make_command(console: Console, formula: str, **options: Any) -> int:
    """Make an embedding by a formula of words and other embeddings."""
    from sdops.verbs.embed import make

    return console.show(make(formula, **options))


@command.command(
    "explain",
    epilog="""\b
    Example:
      sdops embed explain style.pt --model sd15.safetensors
    """,
)
@click.argument("file", metavar="FILE", type=FILE, help="Embeddings of any layout")
@click.option("--model", type=FILE, required=True, help="A checkpoint of the same family")
@click.option(
    "--terms", type=click.IntRange(1, 64), default=8, show_default=True, help="At most so many words a vector"
)
@click.option(
    "--atoms", type=click.Choice(["words", "all"]), default="words", show_default=True, help="What may be a term"
)
@click.option(
    "--atoms-from", multiple=True, type=FILE, help="Embeddings, or folders of them, that may be terms, too: its origins"
)
@click.option("--positive", is_flag=True, help="No word may be subtracted")
@click.option("--only", metavar="NAME", help="Just the embedding of this name or placeholder")
@general_options
def explain_command(console: Console, file: str, **options: Any) -> int:
    """Show the sum of few words that comes nearest to each vector.

    Tens of thousands of words explain a good part of anything, so random vectors are explained, too, and only terms
    that are better than on them are shown. `sdops embed make` takes the formula.
    """
    from sdops.verbs.embed import explain

    return console.show(explain(file, **options))


@command.command(
    "merge",
    epilog="""\b
    Examples:
      sdops embed merge a.pt b.pt -o both.pt
      sdops embed merge a.pt b.pt --mode average --weights 0.7,0.3 -o between.pt
      sdops embed merge style.pt --prune 0.95 -o short.pt
      sdops embed merge style.pt --rows 2,0,1 -o reordered.pt
    """,
)
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=FILE, help="Embeddings for the same encoders")
@click.option(
    "--mode",
    default="join",
    show_default=True,
    help="join, average, sum, slerp; collect: separate embeddings in one file",
)
@click.option("--weights", callback=numbers(float, "0.7,0.3"), help="One each: 0.7,0.3; slerp takes one")
@click.option("--rows", callback=numbers(int, "2,0,1"), help="Keep these vectors, in this order: 2,0,1")
@click.option(
    "--prune", type=click.FloatRange(0, 1), help="Drop vectors whose cosine with an earlier one is above this"
)
@click.option("--to", help="Layout; default: a1111, or encoders for several text encoders")
@click.option("--name", help="The embedding's own name; default: the output's")
@_KIND
@output_options("Where to write", required=True)
@_DTYPE
@general_options
def merge_command(console: Console, files: tuple[str, ...], **options: Any) -> int:
    """Join, average, add or interpolate embeddings; prune or reorder vectors; collect several in one file."""
    from sdops.verbs.embed import merge

    return console.show(merge(*files, **options))

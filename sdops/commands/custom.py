"""`sdops custom inspect|convert|apply|to-lora|merge`: custom diffusion."""

from __future__ import annotations

from typing import Any

import click

from sdops.commands._console import Console
from sdops.commands._options import FILE, general_options
from sdops.commands._personal import BESIDE, dtype_option, output_options, work_options

_WORDS = click.option(
    "--words", multiple=True, type=FILE, help="The embedding to take for its words, if it has none, or others"
)


@click.group(no_args_is_help=True)
def command() -> None:
    """Inspect, apply, convert and merge custom diffusion.

    A concept can be put into a model, turned into a LoRA, or merged with others.

    Reads `delta.bin` and compressed deltas of adobe's code, CompVis' `delta.ckpt`, the web UI's `.delta.safetensors`,
    and diffusers' `pytorch_custom_diffusion_weights`.
    """


@command.command("inspect")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=FILE, help="Custom diffusion of any layout")
@click.option("--model", type=FILE, help="The checkpoint it was trained on: how large are the changes beside it?")
@_WORDS
@general_options
def inspect_command(console: Console, files: tuple[str, ...], **options: Any) -> int:
    """Show layers, ranks, sizes of the changes and new words. Nothing in a file is executed."""
    from sdops.verbs.custom import inspect

    return console.show(inspect(*files, **options))


@command.command(
    "convert",
    epilog="""\b
    Examples:
      sdops custom convert delta.bin --to diffusers -o concept/
      sdops custom convert compressed_delta.bin --to webui
    """,
)
@click.argument("file", metavar="FILE", type=FILE, help="Custom diffusion of any layout")
@click.option("--to", required=True, help="Layout: adobe, compvis, diffusers (whole weights), compressed, webui")
@output_options(BESIDE)
@_WORDS
@general_options
def convert_command(console: Console, file: str, **options: Any) -> int:
    """Write custom diffusion in another layout, bit for bit, its words inside or beside it."""
    from sdops.verbs.custom import convert

    return console.show(convert(file, **options))


@command.command(
    "apply",
    epilog="""\b
    Example:
      sdops custom apply sd15.safetensors delta.bin:0.8 -o cat.safetensors
    """,
)
@click.argument("model", type=FILE, help="The checkpoint, best the one that it was trained on")
@click.argument("files", metavar="FILE[:STRENGTH]...", nargs=-1, required=True, type=FILE, help="Custom diffusion")
@output_options()
@work_options
@dtype_option("keep", "fp32", "fp16", "bf16", of="Of the tensors that change")
@general_options
def apply_command(console: Console, model: str, files: tuple[str, ...], no_hash: bool, **options: Any) -> int:
    """Put custom diffusion into a model's weights. New words stay in files of their own."""
    from sdops.verbs.custom import apply

    return console.show(apply(model, *files, **options, hash_inputs=not no_hash, progress=console.progress))


@command.command(
    "to-lora",
    epilog="""\b
    Examples:
      sdops custom to-lora compressed_delta.bin
      sdops custom to-lora delta.bin --model sd15.safetensors --rank 16 -o cat.safetensors
    """,
)
@click.argument("file", metavar="FILE", type=FILE, help="Custom diffusion of any layout")
@click.option("--model", type=FILE, help="The checkpoint it was trained on; needed for whole weights alone")
@_WORDS
@output_options()
@work_options
@click.option("--rank", type=click.IntRange(1), help="Highest rank of what is no factors yet; default: 32")
@click.option("--energy", type=click.FloatRange(0, 1), help="Keep this share of the squared singular values instead")
@click.option("--to", default="kohya", show_default=True, help="Dialect: kohya, comfy, diffusers ...")
@dtype_option("keep", "fp16", "bf16", "fp32", of="Of what is computed")
@general_options
def to_lora_command(console: Console, file: str, no_hash: bool, **options: Any) -> int:
    """Write custom diffusion as a LoRA, its new words inside. Factors keep every bit."""
    from sdops.verbs.custom import to_lora

    return console.show(to_lora(file, **options, hash_inputs=not no_hash, progress=console.progress))


@command.command(
    "merge",
    epilog="""\b
    Example:
      sdops custom merge cat.bin chair.bin --model sd15.safetensors --class cat --class chair -o both.safetensors
    """,
)
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=FILE, help="Custom diffusion with words")
@click.option("--model", type=FILE, required=True, help="The checkpoint that all were trained on, whole")
@click.option("--class", "classes", multiple=True, help="What each word is: cat, chair ...; one for each file or word")
@_WORDS
@click.option("--captions", "captions_file", type=FILE, help="Texts that shall change least, one a line")
@output_options("Where to write", required=True)
@work_options
@click.option("--to", default="kohya", show_default=True, help="Dialect of LoRA, or webui: custom-diffusion-webui's")
@dtype_option("fp32", "fp16", "bf16", default="fp32")
@general_options
def merge_command(console: Console, files: tuple[str, ...], no_hash: bool, **options: Any) -> int:
    """Merge concepts in closed form: their words work as in their own models, other texts change least.

    The result is a LoRA whose rank is the number of the words' tokens, with the words inside.
    """
    from sdops.verbs.custom import merge

    return console.show(merge(*files, **options, hash_inputs=not no_hash, progress=console.progress))

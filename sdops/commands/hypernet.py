"""`sdops hypernet inspect|convert|merge|apply|to-lora`: hypernetworks."""

from __future__ import annotations

from typing import Any

import click

from sdops.commands._console import Console
from sdops.commands._options import FILE, general_options
from sdops.commands._personal import dtype_option, numbers, output_options, work_options

_NETWORKS = click.argument(
    "networks", metavar="FILE[:STRENGTH]...", nargs=-1, required=True, type=FILE, help="In the order in which they act"
)
_FIT = click.option("--fit", is_flag=True, help="Take the nearest linear map of networks that are not linear")


@click.group(no_args_is_help=True)
def command() -> None:
    """Inspect, convert, merge and bake in hypernetworks.

    They can be turned into a LoRA, too.
    """


@command.command("inspect")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=FILE, help="Hypernetworks of any layout")
@click.option("--effect", is_flag=True, help="Work out what they do: size, directions, how linear (seconds)")
@general_options
def inspect_command(console: Console, files: tuple[str, ...], **options: Any) -> int:
    """Show widths, structure, activation and norms of hypernetworks. Nothing in a file is executed."""
    from sdops.verbs.hypernet import inspect

    return console.show(inspect(*files, **options))


@command.command(
    "convert",
    epilog="""\b
    Examples:
      sdops hypernet convert style.pt                     style.safetensors
      sdops hypernet convert style.safetensors            style.pt, bit for bit as it was
    """,
)
@click.argument("file", metavar="FILE", type=FILE, help="A hypernetwork of any layout")
@click.option("--to", help="Layout: a1111, novelai, safetensors")
@output_options("Where to write; default: beside the input")
@general_options
def convert_command(console: Console, file: str, **options: Any) -> int:
    """Write a hypernetwork in another layout, its numbers bit for bit."""
    from sdops.verbs.hypernet import convert

    return console.show(convert(file, **options))


@command.command(
    "merge",
    epilog="""\b
    Examples:
      sdops hypernet merge a.pt:0.7 b.pt:0.3 -o both.pt
      sdops hypernet merge a.pt b.pt --weights 0.7,0.3 -o both.pt
      sdops hypernet merge a.pt:0.5 -o weaker.pt
    """,
)
@click.argument(
    "files", metavar="FILE[:STRENGTH]...", nargs=-1, required=True, type=FILE, help="Hypernetworks of any layout"
)
@click.option("--weights", callback=numbers(float, "0.7,0.3"), help="One each, as strengths are: 0.7,0.3; default: 1")
@click.option("--name", help="The network's own name; default: the output's")
@click.option("--to", help="Layout: a1111, safetensors; default: as the output's ending says")
@dtype_option("keep", "fp32", "fp16", "bf16")
@output_options("Where to write", required=True)
@general_options
def merge_command(console: Console, files: tuple[str, ...], **options: Any) -> int:
    """Make one hypernetwork that does exactly what the weighted sum of several does."""
    from sdops.verbs.hypernet import merge

    return console.show(merge(*files, **options))


@command.command(
    "apply",
    epilog="""\b
    Examples:
      sdops hypernet apply sd15.safetensors style.pt:0.8 -o styled.safetensors
      sdops hypernet apply sd15.safetensors curved.pt --fit
    """,
)
@click.argument("model", type=FILE, help="A checkpoint of SD1, SD2 or SDXL, or its U-Net alone")
@_NETWORKS
@output_options()
@_FIT
@dtype_option("keep", "fp32", "fp16", "bf16", of="Of the tensors that change")
@work_options
@general_options
def apply_command(console: Console, model: str, networks: tuple[str, ...], no_hash: bool, **options: Any) -> int:
    """Bake hypernetworks into a model: exact where they are linear, as AUTOMATIC1111 makes them by default."""
    from sdops.verbs.hypernet import apply

    return console.show(apply(model, *networks, **options, hash_inputs=not no_hash, progress=console.progress))


@command.command(
    "to-lora",
    epilog="""\b
    Examples:
      sdops hypernet to-lora style.pt --model sd15.safetensors
      sdops hypernet to-lora style.pt:0.8 --model sd15.safetensors --rank 64 -o style.safetensors
    """,
)
@_NETWORKS
@click.option("--model", type=FILE, required=True, help="The checkpoint that the LoRA will be used with")
@output_options()
@click.option("--rank", type=click.IntRange(1), help="Highest rank of a layer; default: whatever is exact")
@click.option("--energy", type=click.FloatRange(0, 1), help="Keep this share of the squared singular values")
@_FIT
@click.option("--to", default="kohya", show_default=True, help="Dialect: kohya, comfy ...")
@dtype_option("fp16", "bf16", "fp32", default="fp16")
@work_options
@general_options
def to_lora_command(console: Console, networks: tuple[str, ...], no_hash: bool, **options: Any) -> int:
    """Write a LoRA that does what hypernetworks do: exact where they are linear, biases included."""
    from sdops.verbs.hypernet import to_lora

    return console.show(to_lora(*networks, **options, hash_inputs=not no_hash, progress=console.progress))

"""`sdops extract TUNED --base BASE`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from sdops.commands._console import Console
from sdops.commands._options import FILE, device_option, general_options, size_option, stream_option

_RANK = click.IntRange(1)
_SHARE = click.FloatRange(0, 1)

_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.argument("tuned", metavar="TUNED", type=FILE, help="The fine-tuned model"),
    click.option("--base", type=FILE, required=True, help="The model that it was made from"),
    click.option("-o", "--output", type=FILE, help="Where to write; default: TUNED.lora.safetensors, in this folder"),
    click.option("-f", "--force", is_flag=True, help="Replace an existing output"),
    click.option("-n", "--dry-run", is_flag=True, help="Check everything, show what would be done, write nothing"),
    click.option("--rank", type=_RANK, help="The same rank for all layers; default: above rounding noise, at most 128"),
    click.option("--conv-rank", type=_RANK, help="Another rank for convolutions larger than 1x1"),
    click.option("--te-rank", type=_RANK, help="Another rank for text encoders"),
    click.option("--energy", type=_SHARE, help="Keep this share of the squared singular values, e.g. 0.9"),
    click.option("--ratio", type=_SHARE, help="Keep singular values above this share of the largest"),
    click.option("--absolute", type=float, help="Keep singular values above this"),
    click.option("--quantile", type=_SHARE, help="Keep this share of the sum of singular values, as LyCORIS does"),
    click.option("--noise-floor", is_flag=True, help="Keep all that stands above rounding noise, whatever the size"),
    size_option("--budget", help="Spend this size on all layers together, where it helps most, e.g. 100MB"),
    click.option("--max-rank", type=_RANK, help="No layer gets more than this"),
    click.option(
        "--svd",
        type=click.Choice(["auto", "exact", "gram", "krylov"]),
        default="auto",
        show_default=True,
        help="How: auto is within 0.1 % of the optimum and fast",
    ),
    click.option("--to", default="kohya", show_default=True, help="Dialect: kohya, diffusers, peft, comfy ..."),
    click.option(
        "--dtype", type=click.Choice(["fp16", "bf16", "fp32"]), default="fp16", show_default=True, help="Of the factors"
    ),
    click.option("--norms", is_flag=True, help="Keep changes of norms (not all programs read them)"),
    click.option("--bias", is_flag=True, help="Keep changes of biases (not all programs read them)"),
    click.option("--include", multiple=True, metavar="PATTERN", help="Only tensors of these names, e.g. '*attn2*'"),
    click.option("--exclude", multiple=True, metavar="PATTERN", help="Not these tensors"),
    click.option("--seed", type=int, default=0, show_default=True, help="Of the random start of the approximation"),
    click.option("-j", "--jobs", type=click.IntRange(1), help="Threads; default: one per core"),
    device_option,
    click.option("--no-hash", is_flag=True, help="Do not record the inputs' SHA-256"),
)


def _with_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


@click.command(
    epilog="""\b
    Examples:
      sdops extract tuned.safetensors --base base.safetensors
      sdops extract tuned.safetensors --base base.safetensors --rank 32 --conv-rank 16 -o style.safetensors
      sdops extract tuned.safetensors --base base.safetensors --budget 100MB --to comfy
    """
)
@_with_options
@stream_option
@general_options
def command(console: Console, tuned: str, no_hash: bool, **options: Any) -> int:
    """Extract a LoRA: the difference of a fine-tune to its base.

    Factors have the least error that their rank allows; nothing is clamped. The report says how much of the change is
    captured (`-v`: layer by layer).
    """
    from sdops.verbs.extract import extract

    return console.show(extract(tuned, **options, hash_inputs=not no_hash, progress=console.progress))

"""`sdops resize LORA`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from sdops.commands._console import Console
from sdops.commands._options import FILE, device_option, general_options, size_option, stream_option

_RANK = click.IntRange(1)
_SHARE = click.FloatRange(0, 1)

_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.argument("lora", metavar="LORA", type=FILE, help="A LoRA-like file of any dialect, or a PEFT folder"),
    click.option("-o", "--output", type=FILE, help="Where to write; default: LORA.resized.safetensors, in this folder"),
    click.option("-f", "--force", is_flag=True, help="Replace an existing output"),
    click.option("-n", "--dry-run", is_flag=True, help="Work everything out, show it, write nothing"),
    click.option("--rank", type=_RANK, help="No layer keeps a higher rank; without a rule nothing is lost"),
    click.option("--conv-rank", type=_RANK, help="Another rank for convolutions larger than 1x1"),
    click.option("--te-rank", type=_RANK, help="Another rank for text encoders"),
    click.option("--energy", type=_SHARE, help="Keep this share of the squared singular values, e.g. 0.99"),
    click.option("--frobenius", type=_SHARE, help="Keep this share of each layer's norm (kohya's sv_fro)"),
    click.option("--ratio", type=_SHARE, help="Keep singular values above this share of the largest"),
    click.option("--absolute", type=float, help="Keep singular values above this"),
    click.option("--quantile", type=_SHARE, help="Keep this share of the sum of singular values, as LyCORIS does"),
    size_option("--budget", help="Make the file this small, and spend it where it helps most, e.g. 20MB"),
    click.option("--max-rank", type=_RANK, help="No layer gets more, whatever the rule says"),
    click.option("--to", help="Dialect: kohya, diffusers, peft, comfy ...; default: as it is"),
    click.option(
        "--dtype",
        type=click.Choice(["keep", "fp16", "bf16", "fp32"]),
        default="keep",
        show_default=True,
        help="Of new factors",
    ),
    click.option(
        "--strip-training-metadata", is_flag=True, help="Leave out tags, folders and settings of the training"
    ),
    click.option("--allow-unknown", is_flag=True, help="Leave out tensors that are not understood"),
    click.option("--architecture", metavar="NAME", help="What it was made for, where it does not tell: flux1 ..."),
    click.option("-j", "--jobs", type=click.IntRange(1), help="Threads; default: one per core"),
    click.option("--no-hash", is_flag=True, help="Do not record the input's SHA-256"),
)


def _with_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


@click.command(
    epilog="""\b
    Examples:
      sdops resize style.safetensors --rank 8
      sdops resize style.safetensors --energy 0.99 --max-rank 32 -o small.safetensors
      sdops resize style.safetensors --budget 20MB
    """
)
@_with_options
@device_option
@stream_option
@general_options
def command(console: Console, lora: str, no_hash: bool, **options: Any) -> int:
    """Give a LoRA lower ranks, with the least error that they allow.

    Works on the factors alone: no dense matrix is built, and without a rule nothing is lost. The report says what each
    layer lost (`-v`: layer by layer).
    """
    from sdops.verbs.resize import resize

    return console.show(resize(lora, **options, hash_inputs=not no_hash, progress=console.progress))

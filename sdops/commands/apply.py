"""`sdops apply MODEL --lora FILE[:STRENGTH] ...`: add LoRAs to a model's weights."""

from __future__ import annotations

from typing import Any

import click

from sdops.commands._console import Console
from sdops.commands._options import FILE, device_option, general_options, stream_option
from sdops.errors import UsageError

_DTYPES = click.Choice(["keep", "fp32", "fp16", "bf16"])


@click.command(
    epilog="""\b
    Examples:
      sdops apply sdxl.safetensors --lora style.safetensors:0.8
      sdops apply sdxl.safetensors --lora style.safetensors:0.8 --lora detail.safetensors:-0.3
      sdops apply sd15.safetensors --lora face.safetensors:0.7:te=0.4:lbw=MIDD
      sdops apply flux.safetensors --lora "x.safetensors:0.8, D00-D05=0.2" --rounding stochastic --seed 7
    """
)
@click.argument("model", type=FILE, help="The model, whole or some of its components")
@click.option(
    "--lora",
    multiple=True,
    required=True,
    metavar="FILE[:STRENGTH]",
    help="What is added, any number of times; a strength may name blocks, and te=, unet=, lbw= may follow it",
)
@click.option("-o", "--output", type=FILE, help="Where to write; default: a derived name, in this folder")
@click.option("-f", "--force", is_flag=True, help="Replace an existing output")
@click.option("-n", "--dry-run", is_flag=True, help="Check everything, show what would change, write nothing")
@click.option("--dtype", default="keep", type=_DTYPES, show_default=True, help="Of the result; keep = as the model's")
@click.option("--touched-dtype", default="keep", type=_DTYPES, show_default=True, help="Of the tensors that change")
@click.option(
    "--rounding",
    default="nearest",
    type=click.Choice(["nearest", "stochastic"]),
    show_default=True,
    help="stochastic = at random, so that small changes survive on average",
)
@click.option("--seed", type=int, default=0, show_default=True, help="For stochastic rounding")
@click.option(
    "--dora-strength",
    default="lerp",
    type=click.Choice(["lerp", "peft"]),
    show_default=True,
    help="lerp = from the model (0) to the full change (1); peft = scale what goes into DoRA's norm",
)
@click.option("--sequential", is_flag=True, help="DoRA, OFT and the like see the LoRAs before them, as in ComfyUI")
@click.option("--allow-unmatched", is_flag=True, help="Leave out layers that the model does not have")
@click.option("--allow-unknown", is_flag=True, help="Leave out tensors of a LoRA that are not understood")
@click.option("--architecture", metavar="NAME", help="What the LoRAs were made for, where they do not tell: flux1 ...")
@click.option("-j", "--jobs", type=click.IntRange(1), help="Threads; default: one per core")
@device_option
@click.option("--no-hash", is_flag=True, help="Do not record the inputs' SHA-256")
@stream_option
@general_options
def command(
    console: Console,
    model: str,
    output: str | None,
    force: bool,
    dry_run: bool,
    jobs: int | None,
    no_hash: bool,
    **options: Any,
) -> int:
    """Add LoRAs of any dialect and family to a model's weights."""
    from sdops.verbs.apply import Apply, apply

    made = apply(model, **options)
    if not isinstance(made, Apply):
        raise UsageError("an apply without output is lazy")
    target = output or made.derived_name()
    if dry_run:
        return console.show(made.dry_run(target, force=force, jobs=jobs))
    return console.show(made.save(target, jobs=jobs, force=force, hash_inputs=not no_hash, progress=console.progress))

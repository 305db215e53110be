"""`sdops convert FILE --to KIND`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from sdops.commands._console import Console
from sdops.commands._options import FILE, general_options, size_option, stream_option

_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.argument("file", metavar="FILE", type=FILE, help="A model file, a shard, or a folder of diffusers"),
    click.option(
        "--to",
        help="Default: as it is, but pickles and GGUF become safetensors; diffusers (a folder), original "
        "(one file as its authors spell it), safetensors, ckpt or gguf; "
        "of LoRAs kohya, diffusers, peft, comfy, bfl, xlabs, cloneofsimo, lycoris, onetrainer",
    ),
    click.option("-o", "--output", type=FILE, help="Where to write; default: a derived name, in this folder"),
    click.option("-f", "--force", is_flag=True, help="Replace an existing output"),
    click.option("-n", "--dry-run", is_flag=True, help="Check everything, show what would be done, write nothing"),
    click.option(
        "--dtype", metavar="DTYPE", help="fp16, bf16, fp32, fp8_e4m3, fp8_scaled ..., or by component: fp16,vae=fp32"
    ),
    click.option("--include", multiple=True, metavar="PATTERN", help="Cast only tensors of these names"),
    click.option("--exclude", multiple=True, metavar="PATTERN", help="Do not cast tensors of these names"),
    click.option("--components", metavar="A,B", help="Convert only these: unet, vae, clip_l, text_encoder ..."),
    click.option(
        "--ema",
        type=click.Choice(["keep", "drop", "use"]),
        default="keep",
        show_default=True,
        help="The moving average; use = in place of the U-Net",
    ),
    click.option("--prune", is_flag=True, help="Leave out the moving average, noise schedules and other ballast"),
    click.option("--unet", type=FILE, help="Take the U-Net or transformer from this file"),
    click.option("--vae", type=FILE, help="Take the VAE from this file"),
    click.option("--text-encoder", type=FILE, multiple=True, help="Take the text encoders from this file; repeatable"),
    click.option(
        "--tokenizer", type=FILE, help="Of folders: T5's tokenizer.json or spiece.model, or where there is one"
    ),
    click.option("--keep-unknown", "unknown", flag_value="keep", help="Keep tensors that no layout has a place for"),
    click.option("--drop-unknown", "--allow-unknown", "unknown", flag_value="drop", help="Leave them out"),
    click.option("--prefix/--no-prefix", default=None, help="Of a component that is alone in a single file"),
    size_option("--shard", help="Cut into files of at most this size, e.g. 5GB"),
    click.option("--reference", type=FILE, help="Take configurations and tokenizers from this diffusers folder"),
    click.option("--family", help="LoRAs: lora (of LoHa, LoKr, GLoRA, DoRA, OFT ...), or full (plain differences)"),
    click.option("--rank", type=click.IntRange(1), help="LoRAs: highest rank of what --family lora makes"),
    click.option("--energy", type=click.FloatRange(0, 1), help="LoRAs: or the share of the energy to keep"),
    click.option("--base", type=FILE, help="LoRAs: the checkpoint it is for, where the change depends on it"),
    click.option("--architecture", metavar="NAME", help="LoRAs: what it was made for, where the file does not tell"),
    click.option("--strip-training-metadata", is_flag=True, help="LoRAs: leave out tags, folders and settings"),
    click.option("--strict", is_flag=True, help="Refuse values that are too large for the dtype instead of clamping"),
    click.option("--seed", type=int, help="Round at random with this seed instead of to nearest"),
    click.option("-j", "--jobs", type=click.IntRange(1), help="Threads; default: one per core"),
)


def _with_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


@click.command(
    epilog="""\b
    Examples:
      sdops convert model.ckpt --to safetensors --prune
      sdops convert model.safetensors --to diffusers
      sdops convert folder --to original -o model.safetensors
      sdops convert model.safetensors --to safetensors --dtype fp16,vae=fp32
      sdops convert model.safetensors --to original --components vae
      sdops convert lora.safetensors --to diffusers
      sdops convert lokr.safetensors --family lora --rank 32
    """
)
@_with_options
@stream_option
@general_options
def command(console: Console, file: str, components: str | None, unknown: str | None, **options: Any) -> int:
    """Convert a model to another container, layout or dtype, a LoRA to another dialect or family.

    Layouts are changed by copying; a folder made here becomes the same file again, byte for byte.
    """
    from sdops.verbs.convert import convert

    names = [name.strip() for name in (components or "").split(",") if name.strip()]
    report = convert(file, components=names, unknown=unknown or "refuse", **options, progress=console.progress)
    return console.show(report)

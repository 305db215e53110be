"""`sdops merge A B [C ...]`: the options are those below and the knobs of the chosen method."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import click

from sdops.card import Card, Knob, find, names
from sdops.commands._console import Console
from sdops.commands._options import FILE, device_option, general_options, size_option, stream_option
from sdops.errors import UsageError
from sdops.verbs._merge_adapters_wish import METHODS

DEFAULT_METHOD = "weighted-sum"
_LORA_ONLY = ("weights", "blocks", "rank", "density", "to", "strip_training_metadata")


class MergeCommand(click.Command):
    """Looks for `--method` before parsing and parses with that method's knobs as options."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """The context of a command with all options."""
        method = _method_in(args)
        card = find(method) if method not in METHODS or method in names() else None
        known = {name for option in self.params for name in option.opts}
        offered = card.knobs if card else ()
        knobs = [_option(knob) for knob in offered if f"--{knob.name.replace('_', '-')}" not in known]
        known |= {name for option in knobs for name in option.opts}
        knobs += [option for option in _lora_options(alone=card is None) if option.opts[0] not in known]
        text = _help(card) if card else f"Merge LoRAs into one.\n\nWith --method {method}: {METHODS[method]}."
        full = click.Command(
            self.name, params=[*self.params, *knobs], callback=self.callback, help=text, epilog=self.epilog
        )
        return full.make_context(info_name, args, parent, **extra)


def _method_in(args: Sequence[str]) -> str:
    """The value of the last `-m`, as click would find it."""
    method = DEFAULT_METHOD
    for index, word in enumerate(args):
        if word == "--":
            break
        if found := re.fullmatch(r"(?:-[nfqv]*m|--method=)(.+)", word):
            method = found[1]
        elif re.fullmatch(r"-[nfqv]*m|--method", word) and index + 1 < len(args):
            method = args[index + 1]
    return method


def _help(card: Card) -> str:
    formula = card.doc.partition("\n")[0]
    method = card.name.replace("_", "-")
    return f"Merge checkpoints into one.\n\nWith --method {method}: {formula}\n\n`sdops methods` lists all methods."


def _option(knob: Knob) -> click.Option:
    """A knob as an option."""
    name = f"--{knob.name.replace('_', '-')}"
    text = f"{knob.help} [{knob.range}]" if knob.range else knob.help
    if knob.type == "bool":
        return click.Option([f"{name}/--no-{name[2:]}"], default=knob.default, help=text)
    if knob.choices:
        return click.Option([name], type=click.Choice(knob.choices), default=knob.default, help=text)
    if knob.type == "float":  # may be a dial, see core.dial
        return click.Option([name], metavar="NUMBER|RULES", default=str(knob.default), show_default=True, help=text)
    if knob.type == "floats":
        return click.Option([name], metavar="W1,W2,...", callback=_numbers, help=text)
    return click.Option([name], type={"int": int, "str": str}[knob.type], default=knob.default, help=text)


def _numbers(_ctx: click.Context, _option: click.Parameter, value: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in re.split(r"[,\s]+", value.strip())) if value else ()
    except ValueError:
        raise click.BadParameter(f"`{value}` is not a list of numbers such as 0.5,0.3,0.2") from None


def _lora_options(*, alone: bool) -> list[click.Option]:
    """What only merges of LoRAs have; all default to None, which means: not given.

    Args:
        alone: Whether the method is for LoRAs alone.
    """
    density = click.Option(["--density"], type=float, help="Share of the numbers that knots and dare keep")
    return [
        click.Option(
            ["--weights"], metavar="W1,W2,...", callback=_given_numbers, help="LoRAs: one per file, also negative"
        ),
        click.Option(["--blocks"], multiple=True, metavar="RULES", help="LoRAs: block weights, once or once per file"),
        click.Option(["--rank"], type=click.IntRange(1), help="LoRAs: no layer gets a higher rank"),
        *([density] if alone else []),
        click.Option(["--to"], help="LoRAs: dialect of the result; default: the first file's"),
        click.Option(["--strip-training-metadata"], is_flag=True, help="LoRAs: leave out tags, folders and settings"),
    ]


def _given_numbers(ctx: click.Context, option: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    return _numbers(ctx, option, value) if value else None


_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.argument("models", metavar="A B [C ...]", nargs=-1, required=True, type=FILE, help="Model files"),
    click.option("-m", "--method", default=DEFAULT_METHOD, show_default=True, allow_from_autoenv=False, help="How"),
    click.option("--base", type=FILE, help="The models' common ancestor, for methods that have one"),
    click.option("-o", "--output", type=FILE, help="Where to write; default: a derived name, in this folder"),
    click.option("-f", "--force", is_flag=True, help="Replace an existing output"),
    click.option("-n", "--dry-run", is_flag=True, help="Check everything, show the plan, write nothing"),
    click.option(
        "--dtype",
        default="keep",
        type=click.Choice(["keep", "fp32", "fp16", "bf16"]),
        show_default=True,
        help="Of the result; keep = as the first model's, per tensor",
    ),
    click.option("--include", multiple=True, metavar="PATTERN", help="Merge only these tensors, copy A's others"),
    click.option("--exclude", multiple=True, metavar="PATTERN", help="Copy A's tensors of these names"),
    click.option(
        "--missing",
        default="error",
        type=click.Choice(["error", "keep", "drop"]),
        show_default=True,
        help="What to do with tensors that not all models have",
    ),
    click.option("--vae", type=FILE, help="Take the VAE from this file, in its dtype unless --dtype is given"),
    click.option("--text-encoder", type=FILE, help="Likewise the text encoders"),
    click.option(
        "--lora", multiple=True, metavar="FILE[:STRENGTH]", help="Add this LoRA to the result; see `sdops apply --help`"
    ),
    click.option("--prune", is_flag=True, help="Leave out EMA weights, noise schedules and other ballast"),
    click.option("--seed", type=int, default=0, show_default=True, help="For random methods"),
    click.option("-j", "--jobs", type=click.IntRange(1), help="Threads; default: one per core"),
    size_option("--memory", help="Stay below this, e.g. 300MB"),
    device_option,
    click.option("--no-hash", is_flag=True, help="Do not record the inputs' SHA-256"),
    stream_option,
)


def _with_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def _is_given(value: Any) -> bool:
    return value is not None and value is not False and value != ()


@click.command(
    cls=MergeCommand,
    epilog="""\b
    Examples:
      sdops merge a.safetensors b.safetensors --alpha 0.3
      sdops merge a.safetensors b.safetensors --alpha "0.3, IN00-IN05=0.1, vae=0"
      sdops merge tuned.safetensors inpaint.safetensors -m add-difference ... --dry-run
      sdops merge a.safetensors b.safetensors c.safetensors -m ties --base base.safetensors --density 0.3
      sdops merge style-lora.safetensors face-lora.safetensors --weights 0.7,-0.3
    """,
)
@_with_options
@general_options
def command(
    console: Console,
    models: tuple[str, ...],
    output: str | None,
    force: bool,
    dry_run: bool,
    jobs: int | None,
    no_hash: bool,
    **options: Any,
) -> int:
    """Merge checkpoints, or LoRAs, into one."""
    from sdops.report import Report
    from sdops.verbs._adapter_peek import are_adapters
    from sdops.verbs._merge_adapters_wish import request

    if are_adapters(models):
        from sdops.verbs._merge_adapters import merge_adapters

        how: dict[str, Any] = {"jobs": jobs, "force": force, "dry_run": dry_run, "progress": console.progress}
        how["device"] = options.pop("device")
        wishes = request(options.pop("method"), options)
        return console.show(merge_adapters(models, **wishes, output=output, hash_inputs=not no_hash, **how))
    from sdops.verbs.merge import merge

    options = {name: value for name, value in options.items() if name not in _LORA_ONLY or _is_given(value)}
    made = merge(*models, **options)
    if isinstance(made, Report):
        raise UsageError("a merge without output is lazy")
    target = output or made.derived_name()
    if dry_run:
        return console.show(made.dry_run(target, force=force, jobs=jobs))
    return console.show(made.save(target, jobs=jobs, force=force, hash_inputs=not no_hash, progress=console.progress))

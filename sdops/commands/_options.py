"""Options that mean the same in every command, as decorators."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import update_wrapper
from typing import Any

import click

from sdops import hub
from sdops.commands._console import Console

Function = Callable[..., Any]

# Whether it can be read is for the verb to say: click takes it for wrong usage.
FILE = click.Path(readable=False)

_GENERAL: tuple[Callable[[Function], Function], ...] = (
    click.option("--json", is_flag=True, help="One JSON object on stdout"),
    click.option("-q", "--quiet", is_flag=True, help="Only the result, one a line"),
    click.option("-v", "--verbose", is_flag=True, help="More detail"),
    click.option(
        "--color",
        type=click.Choice(["auto", "always", "never"]),
        default="auto",
        show_default=True,
        help="When to use colour; NO_COLOR is honoured",
    ),
    click.option("--no-progress", is_flag=True, help="No progress bar"),
)


def general_options(function: Function) -> Function:
    """Give a command the options of all commands and, as its first argument, the console."""

    @click.pass_obj
    def command(
        console: Console,
        /,
        *args: Any,
        json: bool,
        quiet: bool,
        verbose: bool,
        color: str,
        no_progress: bool,
        **kwargs: Any,
    ) -> Any:
        console.json, console.quiet, console.verbose = json, quiet, verbose
        console.color, console.bars = color, not no_progress
        hub.show_progress(console.progress)
        return function(console, *args, **kwargs)

    wrapped: Function = update_wrapper(command, function)
    for option in reversed(_GENERAL):
        wrapped = option(wrapped)
    return wrapped


def _set_streaming(_ctx: click.Context, _option: click.Parameter, value: bool) -> None:
    hub.set_streaming(value)


stream_option = click.option(
    "--stream",
    is_flag=True,
    expose_value=False,
    callback=_set_streaming,
    help="Read hf:// files over the net while working, keep no copy of them",
)

files_argument = click.argument(
    "files",
    metavar="FILE...",
    nargs=-1,
    required=True,
    type=FILE,
    help="Model files or diffusers folders",
)

_UNITS = ("", "k", "m", "g")


def size_option(name: str, **attributes: Any) -> Function:
    """An option whose value is a number of bytes, written as 300MB, 2G or 1.5GiB."""
    return click.option(name, metavar="SIZE", callback=_bytes, **attributes)


def _bytes(_ctx: click.Context, _option: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?)(i?)b?\s*", value, re.IGNORECASE)
    if not found:
        raise click.BadParameter(f"`{value}` is not an amount of memory such as 300MB or 2G")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** _UNITS.index(found[2].lower()))


def device_option(function: Function) -> Function:
    """`--device`, which says what computes."""
    return click.option(
        "--device",
        type=click.Choice(["cpu", "cuda"]),
        default="cpu",
        show_default=True,
        help="cuda = on a GPU, with Triton",
    )(function)

"""Options that the commands on embeddings, hypernetworks and custom diffusion share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from sdops.commands._options import FILE, Function

BESIDE = "A file or a folder; default: beside the input"


def output_options(where: str = "Where to write; default: a derived name", *, required: bool = False) -> Function:
    """`-o`, `-f` and `-n`."""

    def decorate(function: Function) -> Function:
        function = click.option("-n", "--dry-run", is_flag=True, help="Check everything, write nothing")(function)
        function = click.option("-f", "--force", is_flag=True, help="Replace existing outputs")(function)
        return click.option("-o", "--output", type=FILE, required=required, help=where)(function)

    return decorate


def work_options(function: Function) -> Function:
    """`-j` and `--no-hash`, of what takes longer."""
    function = click.option("--no-hash", is_flag=True, help="Do not record the inputs' SHA-256")(function)
    return click.option("-j", "--jobs", type=click.IntRange(1), help="Threads; default: one per core")(function)


def dtype_option(*dtypes: str, default: str = "keep", of: str = "Round the values") -> Function:
    """`--dtype`."""
    return click.option("--dtype", type=click.Choice(dtypes), default=default, show_default=True, help=of)


def numbers(kind: Callable[[str], Any], example: str) -> Callable[..., list[Any] | None]:
    """A callback for options that take numbers with commas between them."""

    def parsed(_ctx: click.Context, _option: click.Parameter, text: str | None) -> list[Any] | None:
        try:
            return None if text is None else [kind(part) for part in text.split(",")]
        except ValueError:
            raise click.BadParameter(f"`{text}` is no list of numbers such as {example}") from None

    return parsed

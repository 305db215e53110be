"""`sdops diff A B`."""

from __future__ import annotations

import click

from sdops.commands._console import Console
from sdops.commands._options import FILE, general_options, stream_option
from sdops.errors import SdopsError

_TROUBLE = 2  # as with `diff`: scripts must tell a file that cannot be read from one that differs


@click.command(
    epilog="""\b
    Examples:
      sdops diff base.safetensors tuned.safetensors
      sdops diff base.safetensors tuned.safetensors --html report.html
      sdops diff -q model.safetensors converted/ && echo same
    Exit code 0 if all tensors are the same, 1 if some differ, 2 in case of trouble.
    """
)
@click.argument("a", metavar="A", type=FILE, help="The old model: a file or folder")
@click.argument("b", metavar="B", type=FILE, help="The new one")
@click.option("--html", type=FILE, metavar="FILE", help="Write a report with pictures, complete in one file")
@click.option("-f", "--force", is_flag=True, help="Replace an existing report")
@click.option("-j", "--jobs", type=click.IntRange(1), help="Threads; default: one per core")
@stream_option
@general_options
def command(console: Console, a: str, b: str, html: str | None, force: bool, jobs: int | None) -> int:
    """Compare two models, through containers, prefixes and layouts."""
    from sdops.verbs.diff import diff

    try:
        report = diff(a, b, html=html, force=force, jobs=jobs, progress=console.progress)
    except SdopsError as error:
        error.exit_code = _TROUBLE
        raise
    return console.show(report)

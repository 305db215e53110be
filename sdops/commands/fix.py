"""`sdops fix FILE`."""

from __future__ import annotations

from typing import Any

import click

from sdops.commands._console import Console
from sdops.commands._options import FILE, general_options
from sdops.verbs._repairs import HASHES, HASHES_EXPLAINED, TABLE

_EXPLAINED = {name: TABLE[name].explanation for name in TABLE} | {HASHES: HASHES_EXPLAINED}
_ON_REQUEST = [name for name, repair in TABLE.items() if not repair.by_default]
_LIST = "\n".join(f"      {name:19}{text}" for name, text in _EXPLAINED.items())


@click.command(
    epilog=f"""\b
    Examples:
      sdops fix model.safetensors
      sdops fix model.safetensors --dry-run
      sdops fix lora.safetensors --only hashes --in-place

    \b
    Repairs (only on request: {", ".join(_ON_REQUEST)}):
{_LIST}
    """
)
@click.argument("file", metavar="FILE", type=FILE, help="A model file")
@click.option("--only", multiple=True, metavar="NAME", help="Only this repair; may be given several times")
@click.option("-o", "--output", type=FILE, help="Where to write; default: NAME.fixed.safetensors beside the file")
@click.option("--in-place", is_flag=True, help="Replace the file, once the new one is complete")
@click.option("-f", "--force", is_flag=True, help="Replace an existing output")
@click.option("-n", "--dry-run", is_flag=True, help="Say what would be done, write nothing")
@general_options
def command(console: Console, file: str, **options: Any) -> int:
    """Repair a model file, telling every repair."""
    from sdops.verbs.fix import fix

    return console.show(fix(file, **options, progress=console.progress))

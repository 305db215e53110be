"""`sdops compare A B`."""

from __future__ import annotations

import click

from sdops.commands._console import Console
from sdops.commands._options import FILE, general_options


@click.command(
    epilog="""\b
    Examples:
      sdops compare style.safetensors face.safetensors
      sdops compare -q old.safetensors new.safetensors
    Exit code 0 whatever the result; 1 in case of trouble.
    """
)
@click.argument("a", metavar="A", type=FILE, help="A LoRA-like file of any dialect")
@click.argument("b", metavar="B", type=FILE, help="Another one for the same kind of model")
@click.option("--base", type=FILE, help="The checkpoint that they are for, for DoRA, OFT and the like")
@click.option("-j", "--jobs", type=click.IntRange(1), help="Threads; default: one per core")
@general_options
def command(console: Console, a: str, b: str, base: str | None, jobs: int | None) -> int:
    """Compare two LoRAs: do they push layers the same way, on the same inputs?

    The cosine is +1 for the same change, 0 for unrelated ones. The overlap of inputs (outputs) is the share of the
    smaller LoRA's directions that the larger one has too; where it is high, the two get in each other's way.
    """
    from sdops.verbs.compare import compare

    return console.show(compare(a, b, base=base, jobs=jobs, progress=console.progress))

"""`sdops pull REFERENCE`: bring a model from the Hub."""

from __future__ import annotations

import click

from sdops.commands._console import Console
from sdops.commands._options import FILE, general_options


@click.command(
    epilog="""\b
    Examples:
      sdops pull owner/repo
      sdops pull hf://owner/repo/model.safetensors -o model.safetensors
      sdops pull hf://owner/repo --revision v1.0 -o models/
      sdops pull hf://owner/repo/ -o everything
      sdops pull https://huggingface.co/owner/repo/blob/main/model.safetensors
    """
)
@click.argument(
    "reference",
    help="hf://owner/repo[@revision]/path, owner/repo for its one model, owner/repo/ for all of it, or a link",
)
@click.option("--revision", help="Branch, tag, commit or refs/pr/N; default: the main branch")
@click.option(
    "-o", "--output", type=FILE, help="A file, or a folder for it; default: the cache of huggingface_hub alone"
)
@click.option("-f", "--force", is_flag=True, help="Replace an existing output")
@general_options
def command(console: Console, reference: str, revision: str | None, output: str | None, force: bool) -> int:
    """Download a model from the Hub and check it.

    A download that broke off is resumed; the SHA-256 is compared.

    Every other command takes hf:// references, too. `HF_HOME` says where the cache is, `HF_TOKEN` opens private and
    gated repositories.
    """
    from sdops.verbs.pull import pull

    return console.show(pull(reference, revision=revision, output=output, force=force, progress=console.progress))

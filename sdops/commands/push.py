"""`sdops push FILE|FOLDER OWNER/REPO`: publish a model on the Hub."""

from __future__ import annotations

from typing import Any

import click

from sdops.commands._console import Console
from sdops.commands._options import FILE, general_options


@click.command(
    epilog="""\b
    Examples:
      sdops push merged.safetensors me/my-merge --private
      sdops push merged.safetensors me/my-merge --base owner/base --license creativeml-openrail-m
      sdops push lora.safetensors someone/loras --pr
      sdops push folder/ me/my-pipeline --dry-run
    """
)
@click.argument("path", metavar="FILE|FOLDER", type=FILE, help="A model file, or a folder with all that is in it")
@click.argument("repo", metavar="OWNER/REPO", help="The repository; it is made if there is none")
@click.option("--private", is_flag=True, help="Make a new repository private")
@click.option("--pr", is_flag=True, help="Open a pull request instead of writing to the branch")
@click.option("--revision", help="Branch to write to; default: the main branch")
@click.option("--message", help="Of the commit; default: what was made, and how")
@click.option(
    "--base", multiple=True, metavar="OWNER/REPO", help="What it was made from, where its metadata do not tell"
)
@click.option(
    "--license", "license_", metavar="NAME", help="For the model card: creativeml-openrail-m, apache-2.0, other"
)
@click.option("--tag", "tags", multiple=True, help="Another tag for the model card")
@click.option("--no-card", is_flag=True, help="Write no model card")
@click.option(
    "--allow-pickles", is_flag=True, help="Upload torch checkpoints, too, which can run code where they are loaded"
)
@click.option("-n", "--dry-run", is_flag=True, help="Show what would be uploaded, and the model card; upload nothing")
@general_options
def command(console: Console, path: str, repo: str, no_card: bool, **options: Any) -> int:
    """Publish a model on the Hub, with a model card.

    In one commit; the card tells how the model was made and how it can be made again.
    """
    from sdops.verbs.push import push

    return console.show(push(path, repo, card=not no_card, progress=console.progress, **options))

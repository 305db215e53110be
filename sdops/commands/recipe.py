"""`sdops recipe ls|show|cp|check|from`: recipes, but for building them."""

from __future__ import annotations

import click

from sdops.commands._console import Console
from sdops.commands._options import FILE, general_options
from sdops.errors import UsageError

_RECIPE = click.argument("recipe", metavar="RECIPE", help="A TOML file, or the name of a preset")
_FORCE = click.option("-f", "--force", is_flag=True, help="Replace an existing output")


@click.group(
    no_args_is_help=True,
    epilog="""\b
    Examples:
      sdops recipe ls
      sdops recipe cp inpainting -o mine.toml
      sdops recipe check mine.toml
      sdops recipe from merged.safetensors -o merged.toml
      sdops recipe from merged.safetensors --verify
    """,
)
def command() -> None:
    """List, show, copy and check recipes, and read them out of models."""


@command.command("ls")
@click.argument("folder", default=".", type=FILE, help="Where to look for TOML files")
@general_options
def ls_command(console: Console, folder: str) -> int:
    """List the recipes in a folder, and the presets."""
    from sdops.verbs.recipe import ls

    return console.show(ls(folder))


@command.command("show")
@_RECIPE
@general_options
def show_command(console: Console, recipe: str) -> int:
    """Show the text of a recipe."""
    from sdops.verbs.recipe import show

    return console.show(show(recipe))


@command.command("cp")
@_RECIPE
@click.option("-o", "--output", type=FILE, help="Where to write; default: NAME.toml, in this folder")
@_FORCE
@general_options
def cp_command(console: Console, recipe: str, output: str | None, force: bool) -> int:
    """Copy a recipe, to be changed."""
    from sdops.verbs.recipe import cp

    return console.show(cp(recipe, output, force=force))


@command.command("check")
@_RECIPE
@click.option("--set", "set_", multiple=True, metavar="NAME=VALUE", help="Set a parameter of the recipe")
@general_options
def check_command(console: Console, recipe: str, set_: tuple[str, ...]) -> int:
    """Check a recipe without looking at its files."""
    from sdops.verbs._recipe_sweep import read_settings
    from sdops.verbs.build import find_recipe
    from sdops.verbs.recipe import check

    return console.show(check(recipe, set_=read_settings(find_recipe(recipe), set_)))


@command.command("from")
@click.argument("file", metavar="FILE", type=FILE, help="A model that says how it was made, or a YAML file of mergekit")
@click.option("-o", "--output", type=FILE, help="Write the recipe here; default: show it")
@_FORCE
@click.option("--verify", is_flag=True, help="Build it again, in a folder that vanishes, and compare")
@click.option("--input", "inputs", multiple=True, metavar="NAME=FILE", help="With --verify: an input of another name")
@click.option("--root", multiple=True, metavar="FOLDER", help="With --verify: look for the inputs here, too")
@click.option("-j", "--jobs", type=click.IntRange(1), help="Threads; default: one per core")
@general_options
def from_command(
    console: Console,
    file: str,
    output: str | None,
    force: bool,
    verify: bool,
    inputs: tuple[str, ...],
    root: tuple[str, ...],
    jobs: int | None,
) -> int:
    """Read the recipe out of a model, as sdops, supermerger and the A1111 web UI record it, or out of mergekit's YAML.

    Building the recipe of a file that sdops made gives the same bytes again; `--verify` proves it.
    """
    from sdops.verbs.recipe import from_

    given = dict(word.partition("=")[::2] for word in inputs)
    if "" in given.values():
        raise UsageError("`--input` names an input and a file", hint="`--input NAME=FILE`")
    return console.show(
        from_(
            file,
            output=output,
            verify=verify,
            inputs=given,
            root=root,
            jobs=jobs,
            force=force,
            progress=console.progress,
        )
    )

"""The group `sdops`: an ordered table of commands, each imported when it is used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

from sdops import __version__

# section -> command -> summary. The command `name` is `sdops.commands.name.command`.
COMMANDS: dict[str, dict[str, str]] = {
    "Files": {
        "inspect": "Show what a model file is and what is in it",
        "hash": "Show the hashes of model files, in all the forms in use",
        "verify": "Read every tensor and report damage",
        "convert": "Convert a model to another container, layout or dtype",
        "fix": "Repair a model file, telling every repair",
        "meta": "Show or change a model's metadata",
        "diff": "Compare two models, through containers, prefixes and layouts",
    },
    "Merging": {
        "merge": "Merge checkpoints into one",
        "methods": "List the merge methods, or explain one",
    },
    "LoRA": {
        "apply": "Add LoRAs of any dialect and family to a model's weights",
        "extract": "Extract a LoRA: the difference of a fine-tune to its base",
        "resize": "Give a LoRA lower ranks, with the least error that they allow",
        "compare": "Compare two LoRAs: do they push layers the same way, on the same inputs?",
    },
    "Recipes": {
        "build": "Build a recipe: all of its steps in one pass",
        "recipe": "List, show, copy and check recipes, and read them out of models",
        "presets": "List the recipes for use cases that come with sdops, or explain one",
    },
    "Embeddings": {
        "embed": "Inspect, convert, explain and make embeddings (textual inversion)",
        "custom": "Inspect, apply, convert and merge custom diffusion",
        "hypernet": "Inspect, convert, merge and bake in hypernetworks",
    },
    "Hub": {
        "pull": "Download a model from the Hub and check it",
        "push": "Publish a model on the Hub, with a model card",
    },
    "Training": {
        "train": "Train LoRAs and new words (textual inversion)",
        "dataset": "Check a folder of pictures before training",
    },
    "Help": {
        "env": "Show versions, devices and caches, for a bug report",
        "completion": "Print the completion script of a shell",
    },
}


class LazyGroup(click.Group):
    """A group that knows its commands' names and summaries without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table."""
        del ctx
        return [name for section in COMMANDS.values() for name in section]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = import_module(f"sdops.commands.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, but with suggestions from the table."""
        try:
            return super().resolve_command(ctx, args)
        except click.NoSuchCommand as error:
            names = self.list_commands(ctx)
            raise click.NoSuchCommand(error.command_name, possibilities=names, ctx=ctx) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table, in sections."""
        del ctx
        for section, commands in COMMANDS.items():
            with formatter.section(section):
                formatter.write_dl(list(commands.items()), col_max=12)


def _print_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        click.echo(f"sdops {__version__}")
        ctx.exit()


_SETTINGS: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "auto_envvar_prefix": "SDOPS",
    "max_content_width": 100,
}


@click.group(
    cls=LazyGroup,
    context_settings=_SETTINGS,
    epilog="`sdops COMMAND --help` explains a command. Options have environment twins: SDOPS_INSPECT_JSON=1.",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    allow_from_autoenv=False,
    callback=_print_version,
    help="Show the version and exit",
)
def app() -> None:
    """Merge, inspect and transform Stable Diffusion model files."""

"""`sdops train lora|ti|... [CONFIG.toml]`, `sdops train plot LOG`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field
from typing import Any

import click

from sdops.commands._console import Console
from sdops.commands._options import FILE, general_options
from sdops.trainers import METHODS
from sdops.training.config import GROUPS, settings_of

_FLAGS = {"resume", "force"}
_SHORT = {"output": "-o", "force": "-f"}


@click.group(no_args_is_help=True)
def command() -> None:
    """Train LoRAs and new words (textual inversion).

    And their relatives, on SD1, SD2 and SDXL.

    Settings come from a TOML file, from options, or both; options win.
    """


def _option(setting: Field[Any]) -> Callable[[Any], Any]:
    """A setting as an option. What is not given is None, so that the file's value counts."""
    told, default = setting.metadata, setting.default
    dashed = setting.name.replace("_", "-")
    names = [*filter(None, [_SHORT.get(setting.name)]), f"--{dashed}"]
    text = told["help"] + ("" if isinstance(default, bool | tuple) or default == "" else f" [default: {default}]")
    if isinstance(default, bool):
        if setting.name in _FLAGS:
            return click.option(*names, is_flag=True, default=None, help=text)
        return click.option(f"--{dashed}/--no-{dashed}", default=None, help=text)
    if isinstance(default, tuple):
        return click.option(*names, multiple=True, help=text)
    if told["choices"]:
        return click.option(*names, type=click.Choice(told["choices"]), help=text)
    kind: Any = {int: click.INT, float: click.FLOAT, str: click.STRING}[type(default)]
    return click.option(*names, type=kind, help=text)


class _Grouped(click.Command):
    """Options in the groups of the configuration."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One section per group, the general options last."""
        groups: dict[str, list[tuple[str, str]]] = {}
        grouped = {each.name: each.metadata["group"] for each in settings_of(self.name or "")}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups.setdefault(grouped.get(parameter.name or "", "options"), []).append(record)
        for group in (*GROUPS, "options"):
            if group in groups:
                with formatter.section(group.capitalize()):
                    formatter.write_dl(groups[group])


def _method(name: str, summary: str) -> click.Command:
    """The command of a training method."""

    @general_options
    def train(console: Console, config: str | None, dry_run: bool, **options: Any) -> int:
        from sdops import settings
        from sdops.verbs.train import run

        given = {key: value for key, value in options.items() if value not in (None, ())}
        report = run(name, config, dry_run=dry_run, say=console.note, **given)
        launched = settings.launched()
        return console.show(report) if launched is None or launched[0] == 0 else 0

    function: Any = train
    for setting in reversed(settings_of(name)):
        function = _option(setting)(function)
    function = click.option("-n", "--dry-run", is_flag=True, help="Check, show what was found, do not train")(function)
    function = click.argument("config", metavar="[CONFIG.toml]", required=False, type=FILE, help="Settings")(function)
    epilog = f"""\b
    Examples:
      sdops train {name} settings.toml
      sdops train {name} --model sd15.safetensors --images photos{_EXAMPLES.get(name, "")} --dry-run
    """
    return click.command(name, cls=_Grouped, help=f"{summary}.", epilog=epilog)(function)


_EXAMPLES = {
    "lora": " --rank 16 --steps 2000",
    "ti": " --tokens mystyle:4 --init painting",
    "hypernetwork": " --activation relu --lr 5e-6",
    "null-text": " --caption template --template 'a cat on a sofa'",
    "aesthetic": " --image-encoder clip-vit-large-patch14",
}

for _name, _card in METHODS.items():
    command.add_command(_method(_name, _card.help))


@command.command(
    "plot",
    epilog="""\b
    Examples:
      sdops train plot photos.lora.jsonl
      sdops train plot a.jsonl b.jsonl -o runs.html
    """,
)
@click.argument("logs", metavar="LOG...", nargs=-1, required=True, type=FILE, help="Logs of runs (.jsonl)")
@click.option("-o", "--output", type=FILE, help="Write a page (.html) or a picture (.svg)")
@general_options
def plot_command(console: Console, logs: tuple[str, ...], output: str | None) -> int:
    """Show the curves of runs: loss, loss with fixed noise, gradient, learning rate."""
    from sdops.verbs.train import plot

    return console.show(plot(*logs, output=output))

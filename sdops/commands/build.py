"""`sdops build RECIPE`: the options are those below, and one for each input that the recipe names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from sdops import hub
from sdops.commands._console import Console
from sdops.commands._options import FILE, general_options, size_option, stream_option
from sdops.verbs._recipe_text import Recipe

_SHORT_WITH_VALUE = "oj"

_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.argument(
        "recipe", metavar="RECIPE", help="A TOML file, here or on the Hub, or the name of a preset (`sdops presets`)"
    ),
    click.option(
        "--set",
        "set_",
        multiple=True,
        metavar="NAME=VALUE",
        help="Set a parameter of the recipe; 0.1:0.9:0.1, 0.1,0.5 or --set again build one result for each value",
    ),
    click.option(
        "-o",
        "--output",
        type=FILE,
        help="Where to write, a folder for several results; default: NAME.safetensors, in this folder",
    ),
    click.option("-f", "--force", is_flag=True, help="Replace existing outputs"),
    click.option("-n", "--dry-run", is_flag=True, help="Check everything, show what would be done, write nothing"),
    click.option("--root", multiple=True, metavar="FOLDER", help="Look for the recipe's files here, too"),
    click.option("--ignore-hashes", is_flag=True, help="Take inputs other than those that the recipe was written for"),
    click.option("-j", "--jobs", type=click.IntRange(1), help="Threads; default: one per core"),
    size_option("--memory", help="Stay below this, e.g. 300MB"),
    click.option("--html", type=FILE, help="Write a sweep's table of distances and norms as a page"),
    click.option("--no-hash", is_flag=True, help="Do not record the inputs' SHA-256"),
    click.option(
        "--workers",
        type=click.IntRange(1),
        help="Processes for a folder or a sweep; default: one per core if it is large",
    ),
    click.option("--cluster", metavar="ADDRESS", help="A dask scheduler (tcp://...) whose workers build instead"),
    stream_option,
)


class BuildCommand(click.Command):
    """Looks for the recipe before parsing, and parses with its inputs as options."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """The context of a command with all options."""
        name = self._recipe_in(args)
        if name is None:
            return super().make_context(info_name, args, parent, **extra)
        hub.set_streaming("--stream" in args)  # the recipe itself is read before options are
        if (folder := hub.located(name)).is_dir():
            return self._of_folder(folder).make_context(info_name, args, parent, **extra)
        from sdops.verbs.build import find_recipe

        recipe = find_recipe(name)
        inputs = [
            click.Option(
                [f"--{one.name.replace('_', '-')}", f"input_{one.name}"],
                type=FILE,
                metavar="FILE",
                help=(one.about or "An input of the recipe") + (f" [default: {one.file}]" if one.file else ""),
            )
            for one in recipe.inputs.values()
        ]
        full = click.Command(
            self.name,
            params=[self.params[0], *inputs, *self.params[1:]],
            callback=self.callback,
            help=_help(recipe),
            epilog=self.epilog,
        )
        return full.make_context(info_name, args, parent, **extra)

    def _of_folder(self, folder: Path) -> click.Command:
        """The command with the inputs of all recipes of a folder as options."""
        from sdops.verbs._build_folder import recipes_in

        names = {name: one.about for recipe in recipes_in(folder) for name, one in recipe.inputs.items()}
        inputs = [
            click.Option([f"--{name.replace('_', '-')}", f"input_{name}"], type=FILE, metavar="FILE", help=about)
            for name, about in names.items()
        ]
        text = f"Build all recipes in `{folder}`."
        params = [self.params[0], *inputs, *self.params[1:]]
        return click.Command(self.name, params=params, callback=self.callback, help=text, epilog=self.epilog)

    def _recipe_in(self, args: list[str]) -> str | None:
        """The first word that is neither an option nor the value of one."""
        flags = {name for one in self.params if isinstance(one, click.Option) and one.is_flag for name in one.opts}
        words = iter(args)
        for word in words:
            if word == "--":
                return next(words, None)
            if not word.startswith("-") or word == "-":
                return word
            takes = word not in flags and "=" not in word if word.startswith("--") else word[-1] in _SHORT_WITH_VALUE
            if takes and word not in ("--help", "-h"):
                next(words, None)
        return None


def _help(recipe: Recipe) -> str:
    """What the recipe says about itself."""
    text = f"Build `{recipe.name}`.\n\n{recipe.about}".strip()
    if recipe.notes:
        text += f"\n\n{recipe.notes}"
    lines = []
    for one in recipe.parameters.values():
        span = f", {one.range[0]:g} to {one.range[1]:g}" if one.range else ""
        span += f", one of {', '.join(map(str, one.choices))}" if one.choices else ""
        lines.append(f"  --set {one.name}={one.default}{span}" + (f"  {one.about}" if one.about else ""))
    return text + ("\n\n\b\nParameters:\n" + "\n".join(lines) if lines else "")


def _settings(recipe: str, words: tuple[str, ...]) -> dict[str, object]:
    """The values of `--set`, for a recipe or for all of a folder."""
    if not words:
        return {}
    from sdops.verbs._build_folder import recipes_in
    from sdops.verbs._recipe_sweep import read_settings
    from sdops.verbs.build import find_recipe

    if not (folder := hub.located(recipe)).is_dir():
        return read_settings(find_recipe(recipe), words)
    found: dict[str, object] = {}
    for one in recipes_in(folder):
        known = [word for word in words if word.partition("=")[0].strip().replace("-", "_") in one.parameters]
        found |= read_settings(one, known)
    unknown = [word for word in words if word.partition("=")[0].strip().replace("-", "_") not in found]
    return found | {word.partition("=")[0]: word.partition("=")[2] for word in unknown}


def _with_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


@click.command(
    cls=BuildCommand,
    epilog="""\b
    Examples:
      sdops build recipe.toml
      sdops build recipe.toml --set strength=0.8 -o out.safetensors
      sdops build recipe.toml --set strength=0:1:0.25
      sdops build inpainting --model mine.safetensors
      sdops build recipes/ --model mine.safetensors --workers 2
    """,
)
@_with_options
@general_options
def command(console: Console, recipe: str, set_: tuple[str, ...], no_hash: bool, **options: Any) -> int:
    """Build a recipe: all of its steps in one pass, without files in between."""
    from sdops.verbs.build import build

    given = {name.removeprefix("input_"): options.pop(name) for name in list(options) if name.startswith("input_")}
    inputs = {name: file for name, file in given.items() if file is not None}
    return console.show(
        build(
            recipe,
            set_=_settings(recipe, set_),
            inputs=inputs,
            hash_inputs=not no_hash,
            progress=console.progress,
            **options,
        )
    )

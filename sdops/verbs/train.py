"""Train LoRAs, new words and their relatives; `sdops.train.lora(images="photos", model="sd15.safetensors")`.

Every setting is a keyword, an option and a key of a TOML file alike: `training/config.py` has them all.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdops import settings
from sdops.errors import UsageError
from sdops.hub import is_reference
from sdops.report import Report
from sdops.trainers import METHODS
from sdops.training.config import read
from sdops.verbs._train_model import check_installed
from sdops.verbs._train_origin import open_origin
from sdops.verbs._train_plan import check
from sdops.verbs._train_report import report_of

FilePath = str | os.PathLike[str]
Say = Callable[[str], None]


def _nothing(text: str) -> None:
    del text


def run(
    method: str,
    config: FilePath | None = None,
    *,
    dry_run: bool = False,
    say: Say = _nothing,
    **given: Any,
) -> Report:
    """Train by a method.

    Args:
        method: Name of a trainer: lora, ti ...
        config: A TOML file with settings.
        dry_run: Check everything and tell what was found and what it takes, but do not train.
        say: Called with what happens, one line each.
        given: Settings; they go before those of the file.

    Returns:
        Loss with fixed noise before and after, and where the outputs are.

    Raises:
        UsageError: a setting does not exist or makes no sense, captions are missing.
        FormatError: a picture or the model is damaged.
        MismatchError: the model is of a kind that cannot be trained on.
        OutputError: the output exists, or has no room.
        SdopsError: a library is missing; the loss became NaN.
    """
    from sdops.trainers import check_method

    check_method(method)
    if config is not None and is_reference(config):
        raise UsageError(
            f"`{config}` is on the Hub, settings are read from this disk",
            hint=f"`sdops pull {config} -o FILE` brings it",
        )
    wanted = read(method, None if config is None else Path(config), given)
    check_installed()
    launched = settings.launched()
    course = check(method, wanted, open_origin(wanted), launched[2] if launched else 1)
    report = report_of(course)
    if dry_run:
        report.data["dry_run"] = True
        report.hints.append("nothing was trained; leave `--dry-run` away to begin")
        return report
    from sdops.verbs._train_model import device_of
    from sdops.verbs._train_run import train

    device_of(wanted.device)  # refused before anything is told
    if launched is None or launched[0] == 0:
        say(str(report))
    return train(course, report, say)


def lora(config: FilePath | None = None, **given: Any) -> Report:
    """Train a LoRA, LoHa or LoKr; arguments as of `run`."""
    return run("lora", config, **given)


def ti(config: FilePath | None = None, **given: Any) -> Report:
    """Train new words (textual inversion); arguments as of `run`."""
    return run("ti", config, **given)


def pivotal(config: FilePath | None = None, **given: Any) -> Report:
    """Train new words, and a LoRA around them; arguments as of `run`."""
    return run("pivotal", config, **given)


def dreamartist(config: FilePath | None = None, **given: Any) -> Report:
    """Train a new word and its negative together; arguments as of `run`."""
    return run("dreamartist", config, **given)


def custom_diffusion(config: FilePath | None = None, **given: Any) -> Report:
    """Train keys and values of cross-attention and a new word; arguments as of `run`."""
    return run("custom-diffusion", config, **given)


def dreambooth(config: FilePath | None = None, **given: Any) -> Report:
    """Train the whole UNet, with pictures of the class to keep it; arguments as of `run`."""
    return run("dreambooth", config, **given)


def hypernetwork(config: FilePath | None = None, **given: Any) -> Report:
    """Train small networks before keys and values; arguments as of `run`."""
    return run("hypernetwork", config, **given)


def null_text(config: FilePath | None = None, **given: Any) -> Report:
    """Learn the texts that lead back to one picture; arguments as of `run`."""
    return run("null-text", config, **given)


def aesthetic(config: FilePath | None = None, **given: Any) -> Report:
    """Pull the text encoder towards pictures, and keep their mean in CLIP; arguments as of `run`."""
    return run("aesthetic", config, **given)


def plot(*logs: FilePath, output: FilePath | None = None) -> Report:
    """Show the logs of runs as curves; with `output` as a page."""
    from sdops.verbs._train_plot import plot as draw

    return draw([Path(log) for log in logs], None if output is None else Path(output))


__all__ = [
    "METHODS",
    "aesthetic",
    "custom_diffusion",
    "dreamartist",
    "dreambooth",
    "hypernetwork",
    "lora",
    "null_text",
    "pivotal",
    "plot",
    "run",
    "ti",
]

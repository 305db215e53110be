"""One build as a job that anybody can do: a recipe, its settings, its files, and where the result goes."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdops.core.heap import no_garbage_collection
from sdops.report import Report
from sdops.verbs._build_place import streamed_once
from sdops.verbs._recipe_check import check_recipe
from sdops.verbs._recipe_inputs import FilePath, check_hashes, find_inputs
from sdops.verbs._recipe_plan import Planned, build_recipe, plan_recipe
from sdops.verbs._recipe_report import build_report
from sdops.verbs._recipe_text import Recipe, Scalar


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be built; plain values, so that another process can do it.

    Attributes:
        recipe: The recipe.
        settings: Parameter -> value.
        inputs: Input -> file.
        output: The result.
        root: Folders to look for files in.
        ignore_hashes: Whether inputs may hash to something else than the recipe says.
    """

    recipe: Recipe
    settings: Mapping[str, Scalar]
    inputs: Mapping[str, FilePath]
    output: Path
    root: tuple[FilePath, ...] = ()
    ignore_hashes: bool = False


def plan_job(job: Job, memory: int | None = None) -> Planned:
    """Check the recipe, find and open its files, plan all steps. The caller closes it.

    Raises:
        SdopsError: as `sdops.build`.
    """
    checked = check_recipe(job.recipe, job.settings)
    used = {name for step in checked.steps for name in step.uses}
    found = find_inputs(job.recipe, job.inputs, job.root, used=used)
    with no_garbage_collection():
        return plan_recipe(checked, found, job.output.parent, memory)


def build_job(job: Job, running: Mapping[str, Any]) -> Report:
    """Build a recipe once.

    Args:
        job: What.
        running: jobs, memory, force, hash_inputs, dry_run, progress.

    Raises:
        SdopsError: as `sdops.build`.
    """
    begin = time.monotonic()
    planned = plan_job(job, running["memory"])
    try:
        how = {**running, "hash_inputs": running["hash_inputs"] and job.recipe.hash_inputs}
        planned.check(job.output, force=running["force"])
        if planned.rehearse(job.output, how):
            planned.close()
            planned = plan_job(job, running["memory"])
        if not job.ignore_hashes:
            check_hashes(planned.found.values(), running["progress"])
        if "sdops.verbs._adapter_names" in sys.modules:  # all is opened
            from sdops.verbs._adapter_names import forget

            forget()
        again = (planned.is_trial or bool(planned.outputs())) and not running["dry_run"]
        with streamed_once(job.output.absolute().parent, again=again):
            done, asked = build_recipe(planned, job.output, how)
        seconds = time.monotonic() - begin
        return build_report(planned, job.output, done, asked, seconds, dry_run=running["dry_run"])
    finally:
        planned.close()

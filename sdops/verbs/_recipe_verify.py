"""Proof that a recipe makes a file: it is built again, in a folder that vanishes, and compared."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sdops.core.hashing import digests
from sdops.errors import SdopsError
from sdops.report import Progress, Report, Section
from sdops.verbs._build_place import place
from sdops.verbs._recipe_inputs import FilePath
from sdops.verbs._recipe_text import Recipe
from sdops.verbs.build import build, with_references

_OPTION = re.compile(r"--([a-z0-9-]+)(?: ([^`,;]+))?")
_TAKES_ANY = "; `--ignore-hashes` takes this one"  # what would be no proof


def verify_rebuilt(
    report: Report,
    recipe: Recipe,
    file: Path,
    *,
    inputs: Mapping[str, FilePath],
    root: Sequence[FilePath],
    jobs: int | None,
    progress: Progress,
) -> None:
    """Build a recipe and add to a report whether the file came out.

    Args:
        report: Gets `verified`, and fails if other bytes came out.
        recipe: That of the file.
        file: What should come out.
        inputs, root: Where the inputs are, see `build`.
        jobs: Threads.
        progress: Called as `progress(label, total_bytes)`.

    Raises:
        SdopsError: it cannot be built.
    """
    recipe = with_references(replace(recipe, folder=file.absolute().parent), file)
    with place(Path()) as folder:
        built = folder / file.name
        try:
            build(recipe, inputs=inputs, output=built, root=root, jobs=jobs, progress=progress)
        except SdopsError as error:
            error.hint = error.hint and _in_own_options(error.hint, recipe)
            raise
        one, two = digests(file, progress), digests(built, progress, fresh=True)
    same, tensors = one.sha256 == two.sha256, one.tensors is not None and one.tensors == two.tensors
    report.data["verified"] = {"same_bytes": same, "same_tensors": tensors, "sha256": two.sha256}
    if same:
        verdict = f"the same bytes, sha256 {two.sha256}"
    elif tensors:
        verdict = "the same tensors; the headers differ (another version of sdops, or other names of inputs)"
    else:
        verdict = "NOT the same: other tensors came out"
    report.sections.append(Section("Built again", [("result", verdict)]))
    report.failed = not (same or tensors)


def _in_own_options(hint: str, recipe: Recipe) -> str:
    """A hint of `build` in options of `recipe from`: `--base FILE` is `--input base=FILE`."""

    def spelled(found: re.Match[str]) -> str:
        name = found[1].replace("-", "_")
        return f"--input {name}={found[2] or 'FILE'}" if name in recipe.inputs else found[0]

    return _OPTION.sub(spelled, hint.removesuffix(_TAKES_ANY))

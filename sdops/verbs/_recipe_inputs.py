"""The files that a recipe reads: where they may lie, what they must hash to, each opened once.

A recipe that somebody else wrote names files below its own folder or below the folder one works in, or `hf://`
addresses. Whatever lies elsewhere, whoever builds it has to name on the command line.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sdops.errors import MismatchError, SdopsError, UsageError
from sdops.report import Progress
from sdops.text import shorten, suggest
from sdops.verbs._recipe_check_value import check_relative
from sdops.verbs._recipe_text import Input, Recipe

if TYPE_CHECKING:
    from sdops.formats import FileSource

HUB = "hf://"
FilePath = str | os.PathLike[str]


@dataclass(slots=True)
class Found:
    """An input that was found.

    Attributes:
        input: What the recipe says.
        address: A path, or `hf://...`.
        given: Whether the caller named it.
        root: The folder that all of it has to lie below; None = anywhere.
        checked: Whether it hashes to what the recipe expects.
    """

    input: Input
    address: str
    given: bool
    root: Path | None = None
    checked: bool = False
    _opened: FileSource | None = field(default=None, repr=False)

    def open(self) -> FileSource:
        """The file, opened once.

        Raises:
            SdopsError: it cannot be read.
            UsageError: part of it is a link that leads outside.
        """
        if self._opened is None:
            from sdops.formats import open_source
            from sdops.verbs._adapter_peek import is_adapter, open_adapter_file

            adapter = is_adapter(self.address)
            opened = open_adapter_file(Path(self.address)) if adapter else open_source(self.address)
            self._opened = opened
            if self.root is not None:  # what an index names, is known only now
                for file in opened.files:
                    _check_inside(file, self.root, self.input)
        return self._opened

    @property
    def opened(self) -> FileSource | None:
        """The file if it is open."""
        return self._opened

    def files(self) -> list[Path]:
        """Where it lies on this disk, as far as it has been opened."""
        return (
            list(self._opened.files) if self._opened else [] if self.address.startswith(HUB) else [Path(self.address)]
        )

    def close(self) -> None:
        """Close it if it is open."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None


def find_inputs(
    recipe: Recipe, given: Mapping[str, FilePath], roots: Sequence[FilePath] = (), *, used: Iterable[str] | None = None
) -> dict[str, Found]:
    """Where all inputs are. Nothing is opened.

    Args:
        recipe: Names the inputs.
        given: Input -> file that the caller names instead; anywhere.
        roots: Folders to look in besides the recipe's own and the current one.
        used: Only these inputs; None = all.

    Raises:
        UsageError: an input must be given, there is none of that name, or its path leads outside.
        SdopsError: a file is not there.
    """
    for name in given:
        if name not in recipe.inputs:
            close = suggest(name, recipe.inputs)
            known = ", ".join(f"--{_option(one)}" for one in recipe.inputs) or "none"
            hint = f"did you mean `--{_option(close)} FILE`?" if close else f"its inputs: {known}"
            raise UsageError(f"`{recipe.name}` has no input `{name}`", hint=hint, input=name)
    wanted = set(recipe.inputs if used is None else used)
    lacking = [one for name, one in recipe.inputs.items() if name in wanted and not one.file and name not in given]
    if lacking:
        told = "; ".join(f"--{_option(one.name)} FILE: {one.about or 'a model'}" for one in lacking)
        names = ", ".join(f"`{one.name}`" for one in lacking)
        raise UsageError(f"`{recipe.name}` has to be given {names}", hint=told, inputs=[one.name for one in lacking])
    folders = [folder for folder in (recipe.folder, Path(), *map(Path, roots)) if folder is not None]
    return {
        name: Found(one, os.fspath(given[name]), given=True) if name in given else _locate(one, folders)
        for name, one in recipe.inputs.items()
        if name in wanted
    }


def _option(name: str) -> str:
    return name.replace("_", "-")


def _locate(one: Input, folders: Sequence[Path]) -> Found:
    """A file below one of the folders.

    Raises:
        UsageError: the path leads outside.
        SdopsError: it is in none of them.
    """
    if one.file.startswith(HUB):
        return Found(one, one.file, given=False)
    check_relative(one.file, f"inputs.{one.name}.file")
    for folder in folders:
        path = folder / one.file
        if os.path.exists(path):  # false for names that no file can have, where Path.exists raises an error
            for part in (path, *_links(path)):
                _check_inside(part, folder, one)
            return Found(one, str(path), given=False, root=folder)
    looked = dict.fromkeys("this folder" if folder.resolve() == Path.cwd() else f"`{folder}`" for folder in folders)
    raise SdopsError(
        f"`inputs.{one.name}`: `{shorten(one.file)}` is {'neither' if len(looked) > 1 else 'not'} in "
        f"{' nor in '.join(looked)}",
        hint=f"`--{_option(one.name)} FILE` names it, `--root FOLDER` names a folder that holds it",
        path=f"inputs.{one.name}",
        file=one.file,
    )


def _links(path: Path) -> Iterator[Path]:
    """The links in a folder, such as diffusers saves."""
    for folder, folders, files in os.walk(path):
        yield from (link for name in (*folders, *files) if (link := Path(folder, name)).is_symlink())


def _check_inside(path: Path, folder: Path, one: Input) -> None:
    """Refuse links that lead out of the folder."""
    real, root = path.resolve(), folder.resolve()
    if root not in (real, *real.parents):
        raise UsageError(
            f"`inputs.{one.name}.file`: `{shorten(str(path))}` is a link that leads outside",
            hint=f"`--{_option(one.name)} {folder / one.file}` allows it",
            path=f"inputs.{one.name}.file",
        )


def check_stays(output: str, folder: Path, path: str) -> None:
    """Refuse an output that a link leads out of the folder.

    Args:
        output: As the recipe's step says.
        folder: Below which it has to be.
        path: Of the step.

    Raises:
        UsageError: it leads elsewhere.
    """
    root = folder.resolve()
    if root not in (folder / output).resolve().parents:
        raise UsageError(
            f"`{path}.output`: `{output}` goes through a link that leads outside",
            hint="`-o FILE` says where the result goes",
            path=f"{path}.output",
        )


def check_hashes(found: Iterable[Found], progress: Progress) -> None:
    """Compare inputs with the hashes that the recipe expects; digests are remembered between runs.

    Raises:
        MismatchError: a file is another one.
        FormatError, ChangedError: it cannot be read.
    """
    from sdops.archs.detect import detect
    from sdops.verbs._hashes import Hashes
    from sdops.verbs._inputs import Opened

    for one in found:
        if not one.input.sha256:
            continue
        source = one.open()
        with Hashes([Opened(source, source, detect(source.specs))], enabled=True) as hashes:
            digest = hashes.wait(progress)[0]
        if digest != one.input.sha256:
            option = f"--{_option(one.input.name)}"
            raise MismatchError(
                f"`inputs.{one.input.name}`: `{one.address}` is not the file that the recipe was written for: "
                f"its SHA-256 begins with {digest[:10]}, not {one.input.sha256[:10]}",
                hint=f"`{option} FILE` names another one; `--ignore-hashes` takes this one",
                path=f"inputs.{one.input.name}",
                expected=one.input.sha256,
                found=digest,
            )
        one.checked = True

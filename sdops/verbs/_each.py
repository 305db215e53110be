"""One verb over several files: a file that cannot be read does not keep the others from being looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike, fspath

from sdops.errors import SdopsError, UsageError
from sdops.report import Report, Section, joined

FilePath = str | PathLike[str]


def each_file(verb: str, files: Sequence[FilePath], look: Callable[[FilePath], Report]) -> Report:
    """Reports of `look(file)` as one.

    Raises:
        UsageError: no file is given.
        SdopsError: there is one file only and looking at it failed. Among several it becomes a line of the report.
    """
    if not files:
        raise UsageError(f"`{verb}` needs at least one file", hint=f"`sdops {verb} FILE`")
    if len(files) == 1:
        return joined(verb, [look(files[0])])
    return joined(verb, [_guarded(verb, file, look) for file in files])


def _guarded(verb: str, file: FilePath, look: Callable[[FilePath], Report]) -> Report:
    try:
        return look(file)
    except SdopsError as error:
        return Report(
            verb,
            data={"file": fspath(file), "error": error.message},
            sections=[Section(fspath(file), [[f"error: {error.message}"]])],
            result=[f"{fspath(file)}: error: {error.message}"],
            hints=[error.hint] if error.hint else [],
            failed=True,
        )

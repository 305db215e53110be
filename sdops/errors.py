"""Every error that sdops raises on purpose.

    SdopsError                 something the user can understand and cure; exit code 1
    ├── UsageError             the request itself is wrong (unknown method, knob, pattern); exit code 2
    ├── FormatError            a file is not what it should be: damaged, foreign, hostile
    ├── MismatchError          inputs do not fit each other: architecture, keys, shapes
    ├── OutputError            the output cannot be written: exists, is an input, no space
    ├── ChangedError           an input changed while it was being read
    └── HubError               the Hub does not give or take what was asked for; `data["reason"]` says why

An error says what is wrong with the user's own names, carries those names as attributes (`data`), and
ends in a hint: the next command to type.
"""

from __future__ import annotations

from typing import Any

from sdops.standin import shown


class SdopsError(Exception):
    """Base of all expected failures.

    Args:
        message: What is wrong, one sentence without a full stop, the user's names in backticks.
        hint: What to do next, preferably a command.
        data: The facts behind the message, kept as attributes in `data`.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None, **data: Any) -> None:
        message = shown(message)
        super().__init__(message)
        self.message = message
        self.hint = hint and shown(hint)
        self.data = data


class UsageError(SdopsError):
    """The request names something that does not exist or does not make sense."""

    exit_code = 2


class FormatError(SdopsError):
    """A file is damaged, foreign or hostile."""


class MismatchError(SdopsError):
    """Inputs do not fit each other."""


class OutputError(SdopsError):
    """The output cannot or must not be written."""


class ChangedError(SdopsError):
    """An input file changed while it was being read."""


class HubError(SdopsError):
    """The Hub cannot be reached, refuses, or does not have what was asked for.

    `data["reason"]` is one of: access, gated, token, missing-repository, missing-revision, missing-file, ambiguous,
    offline, unreachable, busy (429), unavailable (5xx), damaged (wrong hash), refused.
    """

"""The new words of a run, as `tokens` names them. No torch."""

from __future__ import annotations

from sdops.errors import UsageError
from sdops.training.config import Config

NEGATIVE = "-neg"  # behind a word: its partner, for negative prompts
_MOST = 75  # vectors that a prompt has room for


def words_of(config: Config) -> dict[str, int]:
    """New word -> number of vectors, of `tokens`: NAME or NAME:VECTORS.

    Raises:
        UsageError: there are none, or one makes no sense.
    """
    if not config.tokens:
        raise UsageError("no new word is named", hint="e.g. `--tokens mystyle:4`, four vectors", key="tokens")
    found: dict[str, int] = {}
    for item in config.tokens:
        name, _, number = item.rpartition(":") if ":" in item else (item, "", "1")
        if not name.strip() or not number.isdecimal() or not 1 <= int(number) <= _MOST:
            raise UsageError(
                f"`{item}` is no new word", hint=f"NAME, or NAME:VECTORS with 1 to {_MOST} vectors", key="tokens"
            )
        if any(sign.isspace() or sign == "," for sign in name):
            raise UsageError(f"the new word `{name}` has blanks or commas", hint="one word, e.g. `mystyle`")
        if name in found:
            raise UsageError(f"the new word `{name}` is named twice", hint="every word once", key="tokens")
        found[name] = int(number)
    return found

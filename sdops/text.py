"""Numbers and words as people read them. Plain functions on plain values, no imports that cost time."""

from __future__ import annotations

from collections.abc import Iterable

_SIZES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def size(nbytes: int) -> str:
    """Bytes in decimal units with three digits: `6.94 GB`, `512 B`."""
    for unit, name in _SIZES:
        if nbytes >= unit * 0.9995:  # 999.5 kB would print as 1000 kB
            value = nbytes / unit
            return f"{value:.{max(0, 3 - len(str(int(value + 0.005))))}f} {name}"
    return f"{nbytes} B"


def count(number: int, noun: str) -> str:
    """A number with its noun: `1 key`, `1,131 keys`, `2 passes`, `3 entries`."""
    if number == 1:
        return f"1 {noun}"
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return f"{number:,} {noun[:-1]}ies"
    return f"{number:,} {noun}{'es' if noun.endswith('s') else 's'}"


def duration(seconds: float) -> str:
    """A time span: `0.4 s`, `42 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def shorten(text: str, limit: int = 200) -> str:
    """At most `limit` characters; a longer text says how many were left out."""
    if len(text) <= limit:
        return text
    return f"{text[: limit - 1]}… (+{len(text) - limit + 1:,} characters)"


def escaped(text: str) -> str:
    """A text with escapes, as TOML and YAML know them, for what would break its line, colour what follows, or hide."""
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else _escape(ord(sign)) for sign in text)


def _escape(code: int) -> str:
    return f"\\u{code:04x}" if code < 1 << 16 else f"\\U{code:08x}"


def suggest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that a misspelt `word` most likely meant, or None."""
    from difflib import get_close_matches

    folded = {choice.lower().replace("_", "-"): choice for choice in choices}
    close = get_close_matches(word.lower().replace("_", "-"), folded, n=1)
    return folded[close[0]] if close else None


def instead_of(word: str, choices: Iterable[str]) -> str:
    """A hint for who named something that does not exist: what was meant, or everything that there is."""
    known = list(choices)
    close = suggest(word, known)
    return f"did you mean `{close}`?" if close else f"there are {', '.join(known)}"

"""Self-contained HTML pages: text, tables, heat maps and charts without scripts; nothing is fetched.

A page carries its style inside, forbids the browser every request, follows the reader's light or dark setting, and is
laid out for narrow and wide windows: pictures hold no text, so that scaling them leaves all text readable; in narrow
ones a row of a table of many columns has its name in a line of its own.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from sdops.errors import OutputError
from sdops.report import printable

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --dim: #5d6671; --paper: #ffffff; --line: #d9dee4; --soft: #f3f5f7;
  --hot: 226 108 20; --strength: 0.85; --bar: #d4691b; --good: #1a7f4b; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --dim: #9aa4b0; --paper: #15181c; --line: #343b44; --soft: #1f242a;
    --hot: 226 108 20; --strength: 0.62; --bar: #e08a45; --good: #5cc48d; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem clamp(0.75rem, 3vw, 2.5rem) 3rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1, p, dd, li, td.name { overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0.5rem 0; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 0.5rem; }
p { margin: 0.4rem 0; max-width: 46rem; }
.dim { color: var(--dim); }
.good { color: var(--good); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: 0.15rem 1rem; margin: 0.8rem 0; }
dt { color: var(--dim); }
dd { margin: 0; }
.wide { overflow-x: auto; margin: 0.5rem 0; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--dim); }
th, td { padding: 0.2rem 0.6rem 0.2rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  white-space: nowrap; }
.number { text-align: right; }
td.name { min-width: 14rem; white-space: normal; font-family: ui-monospace, monospace; font-size: 0.8rem; }
.map { border-collapse: separate; border-spacing: 2px; }
.map th, .map td { border: 0; padding: 0.1rem 0.3rem; }
.map th[scope=row] { position: sticky; left: 0; background: var(--paper); }
.map td { min-width: 3.1rem; text-align: center; font-size: 0.75rem; border-radius: 3px; background: var(--soft); }
.map td.heat { background: rgb(var(--hot) / calc(0.08 + var(--heat) * var(--strength))); }
.map td.none { background: none; }
.bar { display: block; min-width: 4rem; width: 12vw; max-width: 8rem; height: 0.8rem; margin-top: 0.3rem;
  background: var(--soft); border-radius: 2px; }
.bar i { display: block; height: 100%; background: var(--bar); border-radius: 2px; }
figure { margin: 0.8rem 0; max-width: 46rem; }
svg { display: block; width: 100%; height: 9rem; background: var(--soft); border-radius: 3px; }
svg rect { fill: var(--bar); }
.axis { display: flex; justify-content: space-between; font-size: 0.75rem; color: var(--dim); }
figcaption { font-size: 0.875rem; color: var(--dim); margin-top: 0.3rem; }
ul { padding-left: 1.1rem; margin: 0.4rem 0; font-family: ui-monospace, monospace; font-size: 0.8rem; }
summary { cursor: pointer; }
@media (max-width: 36rem) { td { white-space: normal; } td.name { min-width: 0; }
  .map th { font-size: 0.75rem; padding: 0.1rem; }
  .map td { min-width: 0; padding: 0.1rem; font-size: 0.6875rem; }
  .rows, .rows thead, .rows tbody { display: block; }
  .rows tr { display: grid; grid-template-columns: repeat(auto-fit, minmax(5rem, 1fr)); padding: 0.3rem 0;
    border-bottom: 1px solid var(--line); }
  .rows th, .rows td { border: 0; padding: 0 0.6rem 0 0; white-space: normal; }
  .rows tr > :first-child, .rows tr > :last-child:not(.number) { grid-column: 1 / -1; }
  .bar { min-width: 0; width: auto; }
  dl { grid-template-columns: 1fr; } dt { margin-top: 0.4rem; } dt:empty { display: none; } }
@media print { .wide { overflow: visible; } }
"""
# The page may use its own style and pictures written into it, and nothing else from anywhere.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

_NARROW = 4  # columns of a table that has room in a narrow window
_SHORT = 12  # lines of a list that is shown open


@dataclass(frozen=True, slots=True)
class Html:
    """Markup that is safe to show as it is."""

    text: str


Cell = str | Html


def page(title: str, parts: Iterable[Html]) -> str:
    """A whole document."""
    body = "\n".join(part.text for part in parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n'
        f"</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def heading(text: str, level: int = 2) -> Html:
    """A heading; level 1 is the page's title."""
    return Html(f"<h{level}>{_text(text)}</h{level}>")


def paragraph(text: str, kind: str = "") -> Html:
    """A paragraph; kinds: dim, good, bad."""
    return Html(f'<p class="{kind}">{_text(text)}</p>' if kind else f"<p>{_text(text)}</p>")


def facts(pairs: Iterable[Sequence[str]]) -> Html:
    """Names with values; a name that is empty goes on with the one before."""
    rows = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in pairs)
    return Html(f"<dl>{rows}</dl>")


def table(columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> Html:
    """Columns whose title ends in `>` are aligned right; the first one holds names."""
    right = [title.endswith(">") for title in columns]
    head = "".join(_tag("th", title.rstrip(">"), right[i] and "number") for i, title in enumerate(columns))
    body = "".join(
        "<tr>"
        + "".join(_tag("td", cell, "name" if not i else right[i] and "number") for i, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    kind = ' class="rows"' if len(columns) > _NARROW else ""
    return Html(f'<div class="wide"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')


@dataclass(frozen=True, slots=True)
class Heat:
    """A cell of a heat map.

    Attributes:
        share: How hot, 0 to 1; None for a cell without colour.
        text: What stands in it.
        title: What a pointer resting on it shows.
    """

    share: float | None
    text: str
    title: str = ""


def heat_map(columns: Sequence[str], rows: Iterable[tuple[str, Sequence[Heat | None]]]) -> Html:
    """Rows of coloured cells, each with its number; None leaves a gap."""
    head = "".join(f'<th scope="col">{_text(title)}</th>' for title in columns)
    body = "".join(f'<tr><th scope="row">{_text(name)}</th>{"".join(map(_heat, cells))}</tr>' for name, cells in rows)
    head = f"<thead><tr><th></th>{head}</tr></thead>"
    return Html(f'<div class="wide"><table class="map">{head}<tbody>{body}</tbody></table></div>')


def bar(share: float) -> Html:
    """A bar of a share of its cell's width, for tables."""
    return Html(f'<span class="bar"><i style="width:{100 * min(max(share, 0.0), 1.0):.1f}%"></i></span>')


def histogram(counts: Sequence[int], ends: Sequence[str], caption: str) -> Html:
    """Columns as high as their counts; `ends` are spread evenly below."""
    highest, width = max([*counts, 1]), 100 / max(len(counts), 1)
    bars = "".join(
        f'<rect x="{i * width + 0.1 * width:.2f}" y="{100 - 96 * n / highest:.2f}" width="{0.8 * width:.2f}"'
        f' height="{96 * n / highest:.2f}"><title>{n:,}</title></rect>'
        for i, n in enumerate(counts)
    )
    axis = "".join(f"<span>{_text(end)}</span>" for end in ends)
    label = f'role="img" aria-label="{_text(caption)}"'
    return Html(
        f'<figure><svg viewBox="0 0 100 100" preserveAspectRatio="none" {label}>{bars}</svg>'
        f'<div class="axis">{axis}</div><figcaption>{_text(caption)}</figcaption></figure>'
    )


def folded(summary: str, lines: Iterable[str]) -> Html:
    """A list that opens when its summary is clicked; a short one is open."""
    items = [f"<li>{_text(line)}</li>" for line in lines]
    state = " open" if len(items) <= _SHORT else ""
    return Html(f"<details{state}><summary>{_text(summary)}</summary><ul>{''.join(items)}</ul></details>")


def write(path: Path, text: str) -> None:
    """Write a page; the file is there whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    target = Path(os.path.realpath(path))
    draft = target.parent / f".sdops-{secrets.token_hex(4)}.tmp"
    try:
        try:
            draft.write_text(text, encoding="utf-8", errors="replace")
            os.replace(draft, target)
        finally:
            with contextlib.suppress(FileNotFoundError):
                draft.unlink()
    except OSError as error:
        raise OutputError(
            f"`{path}` cannot be written to: {error.strerror}", hint="choose another place for the page"
        ) from error


def _text(text: str) -> str:
    return escape(printable(text))


def _tag(name: str, content: Cell, kind: str | bool) -> str:
    inner = content.text if isinstance(content, Html) else _text(content)
    if kind == "name":  # long ones are cut behind a dot where that is enough
        inner = inner.replace(".", ".<wbr>")
    return f'<{name} class="{kind}">{inner}</{name}>' if kind else f"<{name}>{inner}</{name}>"


def _heat(cell: Heat | None) -> str:
    if cell is None:
        return '<td class="none"></td>'
    title = f' title="{_text(cell.title)}"' if cell.title else ""
    if cell.share is None:
        return f'<td class="dim"{title}>{_text(cell.text)}</td>'
    return f'<td class="heat" style="--heat:{min(max(cell.share, 0.0), 1.0):.3f}"{title}>{_text(cell.text)}</td>'

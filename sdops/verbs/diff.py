"""What differs between two model files: tensors, values, dtypes, shapes, metadata; block by block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdops import standin
from sdops.report import HEAT, Progress, Report, Section, silent
from sdops.text import count, shorten
from sdops.verbs._each import FilePath
from sdops.verbs._traits import metadata_order

if TYPE_CHECKING:
    from sdops.core.compare import Measure
    from sdops.core.patch import Adapter
    from sdops.verbs._counterparts import Counterparts, Model
    from sdops.verbs._difference import Difference

_ROWS = 12  # of a list; `-v` shows up to _MORE, the JSON has all
_MORE = 200
_NAME = 120
_WORDS = {
    "identical": "identical",
    "equal": "of equal values, stored in another dtype or shape",
    "rounded": "of equal values, but for rounding to the narrower dtype",
    "changed": "with other values",
    "shape": "of another shape",
}
_FORMS = {"shape": "Other shapes", "equal": "Same values in another form", "rounded": "Rounded"}

# Relative change -> shade of report.HEAT. Fixed bounds, so that two reports can be compared.
BOUNDS = (0.001, 0.01, 0.03, 0.1)


@dataclass(frozen=True, slots=True)
class Compared:
    """Two models and all that was found; of adapters also what `inspect` tells.

    `derived` are position ids that one model has and the other leaves out, as diffusers does; they hold 0, 1, 2 ... as
    they must, so nothing differs.
    """

    a: Model
    b: Model
    seen: Counterparts
    records: list[Difference]
    blocks: dict[str, dict[str, Measure]]
    only_a: list[str]
    only_b: list[str]
    derived: list[str]
    adapters: tuple[dict[str, Any], dict[str, Any]] | None = None

    @property
    def same(self) -> bool:
        """Whether all tensors are there on both sides, with the same bits."""
        return not (self.only_a or self.only_b or any(record.state != "identical" for record in self.records))

    @property
    def verdict(self) -> str:
        """In words."""
        if self.same:
            return "the same"
        states = {record.state for record in self.records}
        if self.only_a or self.only_b or not self.records or states & {"changed", "shape"}:
            return "different"
        return "the same values but for rounding" if "rounded" in states else "the same values in another form"

    @property
    def changed(self) -> list[Difference]:
        """Tensors whose values differ, the relatively largest change first."""
        found = [record for record in self.records if record.state == "changed"]
        return sorted(found, key=lambda record: -_rank(record.measure))


def diff(
    a: FilePath,
    b: FilePath,
    *,
    html: FilePath | None = None,
    force: bool = False,
    jobs: int | None = None,
    progress: Progress = silent,
) -> Report:
    """Compare two models tensor by tensor, whatever their containers, dtypes, prefixes and layouts.

    Per tensor x of `a` and y of `b`: relative change |y - x| / |x| in Euclidean norms, cosine of the angle between
    them, largest |y - x|, and the number of elements that differ. Sums over a block are over its tensors that differ.
    Where one is the other rounded to a narrower dtype, as fp16 of fp32, that is told and counts as no change of values.
    Scaled fp8 weights are compared by value. `report.failed` says that tensors differ; metadata do not count, nor do
    position ids that one file leaves out.

    Args:
        a: The old model: a file or folder.
        b: The new one.
        html: Write a self-contained report with pictures to this file.
        force: Replace that file if it exists.
        jobs: Threads or processes; default: one per core.
        progress: Called as `progress(label, total_bytes)`.

    Raises:
        SdopsError: a file cannot be read, or changes meanwhile.
        OutputError: the HTML file exists or cannot be written.
    """
    if html is not None:
        _check_page(Path(html), (Path(a), Path(b)), force)
    old, first = _opened(Path(a))
    try:
        new, second = _opened(Path(b))
        try:
            standin.prepare([*old.origin.files, *new.origin.files])
            adapters = None if first is None or second is None else (first, second)
            found = _compare(old, new, adapters, jobs, progress)
            old.origin.check_unchanged()
            new.origin.check_unchanged()
        finally:
            new.origin.close()
    finally:
        old.origin.close()
    report = _report(found)
    if html is not None:
        _write_page(Path(html), found, report)
    return report


def _opened(path: Path) -> tuple[Model, Adapter | None]:
    """A model, or an adapter of any dialect."""
    from sdops.verbs._adapter_peek import is_adapter
    from sdops.verbs._counterparts import open_model

    if is_adapter(path):
        from sdops.verbs._counterparts_adapter import open_as_adapter

        if found := open_as_adapter(path):
            return found
    return open_model(path), None


def _compare(
    a: Model, b: Model, adapters: tuple[Adapter, Adapter] | None, jobs: int | None, progress: Progress
) -> Compared:
    from sdops.core.compare import compare
    from sdops.core.run import default_jobs
    from sdops.verbs._counterparts import counterparts
    from sdops.verbs._counterparts_embedding import as_vectors
    from sdops.verbs._difference import by_block, differences, pairs

    seen = None
    a, b = as_vectors(a, b) or (a, b)
    if adapters is not None:
        from sdops.verbs._counterparts_adapter import adapter_counterparts
        from sdops.verbs._inspect_adapter import facts_of

        if (pair := adapter_counterparts(a, b, adapters)) is not None:
            a, b, seen = pair
    seen = seen or counterparts(b, a)
    work = pairs(a, seen, b)
    with progress("comparing", sum(pair.nbytes for pair in work)) as advance:
        measures = compare(work, jobs=jobs or default_jobs(), progress=advance)
    records = differences(a, seen, b, measures)
    sound_a, sound_b = _sound_position_ids(a), _sound_position_ids(b)
    both = a.source.specs.keys() & seen.source.specs.keys()
    only_a = [key for key in a.source.specs if key not in both]
    only_b = [seen.keys[key] for key in seen.source.specs if key not in both]
    return Compared(
        a,
        b,
        seen,
        records,
        by_block(a, records),
        only_a=[key for key in only_a if key not in sound_a],
        only_b=[key for key in only_b if key not in sound_b],
        derived=[key for key in only_a if key in sound_a] + [key for key in only_b if key in sound_b],
        adapters=None if adapters is None else (facts_of(adapters[0]), facts_of(adapters[1])),
    )


def _sound_position_ids(model: Model) -> set[str]:
    from sdops.verbs._values import position_ids

    return {found.key for found in position_ids(model.origin) if found.state == "ok"}


# ---------------------------------------------------------------------------------------------------------- the report


def _report(found: Compared) -> Report:
    states = Counter(record.state for record in found.records)
    report = Report("diff", failed=not found.same)
    report.data = _facts(found, states)
    report.result = [f"{r.state} {r.key}" for r in found.records if r.state != "identical"]
    report.result += [f"only-a {key}" for key in found.only_a] + [f"only-b {key}" for key in found.only_b]
    report.sections = [
        Section(f"{found.a.origin.path} -> {found.b.origin.path}", _summary(found, states)),
        heat_map(found.blocks),
        *_lists(found),
    ]
    report.warnings = _warnings(found)
    if found.adapters is not None:
        from sdops.verbs._inspect_adapter import told_apart

        report.data["adapters"] = list(found.adapters)
        report.sections.insert(1, told_apart(*found.adapters))
    if not found.same and found.a.detection.family == found.b.detection.family == "adapter":
        a, b = found.a.origin.path, found.b.origin.path
        report.hints.append(f"`sdops compare {a} {b}` compares what LoRAs do, through dialects, families and ranks")
    return report


def _facts(found: Compared, states: Mapping[str, int]) -> dict[str, Any]:
    from sdops.verbs._difference import STATES, measured, total

    return {
        "a": str(found.a.origin.path),
        "b": str(found.b.origin.path),
        "same": found.same,
        "architecture": [found.a.detection.family, found.b.detection.family],
        "layout": [found.a.detection.layout, found.b.detection.layout],
        "respelled": dict(found.seen.notes),
        "tensors": {state: states[state] for state in STATES}
        | {"only_a": len(found.only_a), "only_b": len(found.only_b)},
        **measured(total(record.measure for record in found.changed if record.measure)),
        "blocks": {
            block: measured(total(cells.values())) | {"kinds": {kind: measured(cell) for kind, cell in cells.items()}}
            for block, cells in found.blocks.items()
        },
        "differences": {record.key: record.facts() for record in found.records if record.state != "identical"},
        "only_a": found.only_a,
        "only_b": found.only_b,
        "derived": found.derived,
        "metadata": metadata(found),
    }


def metadata(found: Compared) -> dict[str, list[str]]:
    """Keys of the headers that differ."""
    a, b = found.a.origin.metadata, found.b.origin.metadata
    changed = (key for key in a.keys() & b.keys() if a[key] != b[key])
    return {
        name: sorted(keys, key=metadata_order)
        for name, keys in {"only_a": a.keys() - b.keys(), "only_b": b.keys() - a.keys(), "changed": changed}.items()
    }


def _summary(found: Compared, states: Mapping[str, int]) -> list[list[str]]:
    """The name-value pairs at the top; only what there is."""
    from sdops.verbs._difference import total

    whole = total(record.measure for record in found.changed if record.measure)
    titles = dict.fromkeys(model.detection.title for model in (found.a, found.b))
    rows = [["result", found.verdict], ["architecture", " / ".join(titles)]]
    respelled = [(part, how) for part, how in found.seen.notes.items() if how.startswith("dialect") or "layout" in how]
    rows += [["" if n else "spelling", f"{part}: B has it in the {how}"] for n, (part, how) in enumerate(respelled)]
    counts = [f"{states[state]:,} {words}" for state, words in _WORDS.items() if states[state]]
    models = {"A": found.a, "B": found.b}
    counts += [f"{len(keys):,} only in {side}{_owners(models[side], keys)}" for keys, side in _sides(found) if keys]
    rows += [["" if index else "tensors", text] for index, text in enumerate(counts)]
    if found.changed:
        rows.append(["elements", f"{whole.changed:,} of {whole.elements:,} differ in the tensors with other values"])
        rows.append(["relative change", relative(whole.relative)])
        rows.append(["cosine", cosine(whole.cosine)])
        rows.append(["largest change", f"{whole.largest:.4g}"])
    if found.derived:
        rows.append(["derived", f"{count(len(found.derived), 'table')} of position ids in one of them (not counted)"])
    if any(names := metadata(found).values()):
        rows.append(["metadata", f"differs in {count(sum(map(len, names)), 'entry')} (not counted)"])
    return rows


def _owners(model: Model, keys: Iterable[str]) -> str:
    """How many tensors are of which component: ` (248 vae, 196 clip_l)`."""
    from sdops.archs.detect import OTHER, component_of

    owners = Counter(component_of(model.detection, key) for key in keys)
    told = ", ".join(f"{number:,} {name}" for name, number in owners.most_common())
    return f" ({told})" if owners.keys() - {OTHER, "adapter", "embedding"} else ""


def _sides(found: Compared) -> tuple[tuple[list[str], str], ...]:
    return (found.only_a, "A"), (found.only_b, "B")


def heat_map(blocks: Mapping[str, Mapping[str, Measure]]) -> Section:
    """Relative change of every block, shaded by what its tensors do."""
    from sdops.verbs._difference import KINDS, total

    kinds = [kind for kind in KINDS if any(kind in cells for cells in blocks.values())]
    rows = []
    for block, cells in blocks.items():
        whole = total(cells.values())
        shades = [_shade(cells.get(kind)) for kind in kinds]
        rows.append([block, *shades, change(whole), cosine(whole.cosine)])
    if not any(measure.changed for cells in blocks.values() for measure in cells.values()):
        return Section("", [])
    bounds = [f"< {100 * bound:g}%" for bound in BOUNDS] + ["more"]
    legend = "  ".join(f"{shade * 2} {bound}" for shade, bound in zip(HEAT, bounds, strict=True))
    rows += [["== the same  " + legend]]
    return Section("Change by block", rows, ("block", *kinds, "change>", "cosine>"), heat=True)


def _shade(measure: Measure | None) -> str:
    if measure is None:
        return ""
    if not measure.changed:
        return "=="
    found = measure.relative
    return HEAT[-1 if found is None or measure.broken else sum(found >= bound for bound in BOUNDS)] * 2


def change(measure: Measure) -> str:
    """The relative change, or what is worse."""
    return "NaN" if measure.broken else relative(measure.relative)


def relative(value: float | None) -> str:
    """A relative change as people read it."""
    if value is None:
        return "-"
    if not value:
        return "0"
    return f"{value:.3%}" if value >= 1e-4 else f"{value:.1e}"


def cosine(value: float | None) -> str:
    """A cosine, with digits that tell it from 1."""
    return "" if value is None else f"{value:.7f}"


def _lists(found: Compared) -> Iterable[Section]:
    """The tensors behind the numbers; more of them with `-v`."""
    rows = [
        [change(m), cosine(m.cosine), f"{m.largest:.4g}", _specs(r), shorten(r.key, _NAME)]
        for r in found.changed
        if (m := r.measure)
    ]
    columns = (
        "change>",
        "cosine>",
        "largest>",
        "dtype, shape",
        "tensor",
    )  # names are long: the end of a line may break
    yield from _short_and_long("Most changed tensors", rows, columns)
    for state, heading in _FORMS.items():
        chosen = [[_specs(r), shorten(r.key, _NAME)] for r in found.records if r.state == state]
        yield from _short_and_long(heading, chosen, ("dtype, shape", "tensor"))
    for keys, side in _sides(found):
        yield from _short_and_long(f"Only in {side}", [[shorten(key, _NAME)] for key in keys], ())
    names = [[what, key] for what, keys in metadata(found).items() for key in keys]
    yield Section("Metadata", names, ("", "key"), detail=True)


def _short_and_long(heading: str, rows: list[list[str]], columns: Sequence[str]) -> Iterable[Section]:
    more = [[f"... and {len(rows) - _ROWS:,} more"]] if len(rows) > _ROWS else []
    yield Section(heading, rows[:_ROWS] + more, columns)
    if more:
        yield Section(f"{heading}, continued", rows[_ROWS : _ROWS + _MORE], columns, detail=True)


def _specs(record: Difference) -> str:
    return " -> ".join(dict.fromkeys(str(spec) for spec in record.specs))


def _warnings(found: Compared) -> list[str]:
    odd = [record for record in found.changed if record.measure and record.measure.nonfinite]
    warnings = [f"NaN or infinity in {count(len(odd), 'tensor')}: the sums leave them out"] if odd else []
    if not found.records:
        warnings.append(f"`{found.a.origin.name}` and `{found.b.origin.name}` have no tensor in common")
    return warnings


def _rank(measure: Measure | None) -> float:
    if measure is None:
        return 0.0
    return float("inf") if measure.relative is None or measure.broken else measure.relative


# ------------------------------------------------------------------------------------------------------------ the page


def _check_page(path: Path, inputs: Sequence[Path], force: bool) -> None:
    from sdops.core.sink import check_inputs, check_target

    check_inputs(path, inputs)
    check_target(path, force=force)


def _write_page(path: Path, found: Compared, report: Report) -> None:
    from sdops.verbs._diff_page import page
    from sdops.verbs._html import write

    write(path, page(found, report))
    report.data["html"] = str(path)

"""What was measured, as text: every row, ours beside the best of the others, and the bars."""

from __future__ import annotations

from typing import Any

from bench import OURS, Bench


def table(bench: Bench) -> str:
    """The whole report."""
    facts = bench.facts
    lines = [
        f"{facts['gpu']}, torch {facts['torch']}, Triton {facts.get('triton', 'none')}",
        f"clocks {facts.get('clocks', 'unknown')}",
        f"copy {facts['copy_bytes_per_second'] / 1e12:.2f} TB/s, bf16 {facts['bf16_flops'] / 1e12:.0f} TFLOP/s",
        f"correct: {', '.join(facts['correct']) or 'nothing'}",
        "",
        f"{'case':<56} {'arm':<40} {'ms':>9} {'+-':>7} {'floor':>9} {'of floor':>8} {'wrong':>8}",
        *(_line(row) for row in bench.rows),
        "",
        f"{'case':<56} {'ours ms':>9} {'best other':<40} {'ms':>9} {'times as fast':>13}",
        *_beside(bench),
        "",
        *bars(bench),
    ]
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    name = f"{row['case']:<56} {row.get('arm', ''):<40}"
    if "ms" not in row:
        said = row.get("failed") or row.get("skipped") or row.get("ratio") or row.get("chosen")
        return f"{name} {said}"
    floor = f"{'':>18}" if row["floor_ms"] is None else f"{row['floor_ms']:9.3f} {row['of_floor']:8.0%}"
    more = f"{row['wrong']:8.3%}" if row.get("wrong") is not None else ""
    more += f" {row['memory_gb']:.1f} GB" if row.get("memory_gb") else ""
    more += f" {row['launches']} launches" if row.get("launches") else ""
    return f"{name} {row['ms']:9.3f} {row['spread']:7.3f} {floor} {more}".rstrip()


def _beside(bench: Bench) -> list[str]:
    """Per case the fastest of our arms and of the others; closer than their spreads is equal."""
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in bench.rows:
        if "ms" in row and row["arm"] != "frozen layer alone":
            cases.setdefault(row["case"], []).append(row)
    lines = []
    for case, rows in cases.items():
        own = [row for row in rows if row["arm"].startswith(OURS)]
        others = [row for row in rows if row not in own]
        if not own or not others:
            continue
        ours, best = min(own, key=_ms), min(others, key=_ms)
        equal = abs(ours["ms"] - best["ms"]) <= ours["spread"] + best["spread"]
        ratio = "equal" if equal else f"{best['ms'] / ours['ms']:.2f}"
        lines.append(f"{case:<56} {ours['ms']:9.3f} {best['arm']:<40} {best['ms']:9.3f} {ratio:>13}")
    return lines


def _ms(row: dict[str, Any]) -> float:
    return float(row["ms"])


def bars(bench: Bench) -> list[str]:
    """What was promised, and whether it was met; what was not measured says so."""
    found = {(row["case"], row["arm"]): row for row in bench.rows if "ms" in row and not row["case"].startswith("tiny")}

    def ms(case: str, arm: str) -> float | None:
        return found[case, arm]["ms"] if (case, arm) in found else None

    def share(case: str, arm: str) -> float | None:
        return found[case, arm]["of_floor"] if (case, arm) in found else None

    one, four = "sdxl rank 16 x 1", "sdxl rank 16 x 4"
    checks: list[tuple[str, float | None, float, bool]] = [
        ("bake of SDXL over the copy bandwidth", share(one, "ours"), 0.8, True),
        ("bake of SDXL beside PEFT's merge", _times(ms(one, "PEFT merge"), ms(one, "ours")), 10, True),
        ("bake of SDXL beside an addmm loop", _times(ms(one, "addmm loop"), ms(one, "ours")), 2, True),
        ("four LoRAs beside one", _times(ms(four, "ours"), ms(one, "ours")), 1.15, False),
        *(
            (f"merge of {n} over the copy bandwidth", share(f"sdxl weighted sum of {n}", "ours exact"), 0.85, True)
            for n in (2, 3, 8)
        ),
        *(
            (
                f"exact merge of {n} beside a fast one",
                _times(ms(f"sdxl weighted sum of {n}", "ours exact"), ms(f"sdxl weighted sum of {n}", "ours fast")),
                1.05,
                False,
            )
            for n in (2, 3, 8)
        ),
        ("seconds for the factors of SDXL", _times(ms("788 matrices, rank 32", "ours"), 1000.0), 0.25, False),
        (
            "error of factors over the least",
            max(
                (row["ratio"] for row in bench.rows if row["case"].startswith("error over") and not bench.dry),
                default=None,
            ),
            1.001,
            False,
        ),
    ]
    lines = [f"{'bar':<44} {'found':>9} {'wanted':>10}"]
    for name, value, wanted, at_least in checks:
        sign = ">=" if at_least else "<="
        met = (
            "not measured" if value is None else "met" if (value >= wanted) == at_least or value == wanted else "missed"
        )
        lines.append(f"{name:<44} {'' if value is None else format(value, '9.3f'):>9} {sign} {wanted:>7} {met}")
    return lines + [
        f"LoRA layers slower than {other}: {_slower(found, other)}" for other in ("ours, plain", "PEFT order")
    ]


def _slower(found: dict[tuple[str, str], dict[str, Any]], other: str) -> str:
    """Shapes where our layers take longer than another arm by more than both spreads."""
    pairs = {
        case: (row, found[case, other]) for (case, arm), row in found.items() if arm == OURS and (case, other) in found
    }
    slower = [case for case, (own, row) in pairs.items() if own["ms"] - row["ms"] > own["spread"] + row["spread"]]
    return f"{len(slower)} of {len(pairs)}{': ' if slower else ''}{'; '.join(slower)}" if pairs else "not measured"


def _times(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one / other

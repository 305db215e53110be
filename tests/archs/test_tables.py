"""The contract of the shelf: every TOML file, and the template language."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import sdops.archs.tables as shelf
from sdops.archs.blocks import block_of, block_slots
from sdops.archs.detect import detect
from sdops.archs.tables import FOLDER, KINDS, Table, expand, read, tables
from sdops.core.spec import Spec
from sdops.core.template import alternatives

FILES = sorted(FOLDER.glob("*.toml"))
TABLES = tables()


def label(table: Table) -> str:
    return f"{table.family}-{table.name}-{table.layout}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file_has_a_title_and_components(path: Path) -> None:
    rows = read(path)
    assert rows
    assert all(row["title"] and row["name"] and row["kind"] and row["layout"] for row in rows)


@pytest.mark.parametrize("table", TABLES, ids=label)
def test_table(table: Table) -> None:
    assert table.kind in KINDS
    assert table.need or table.one_of or table.ends, "nothing to recognise it by"
    assert len(set(table.prefixes)) == len(table.prefixes)
    names = table.plain_names
    assert len(set(names)) == len(names), "a key is listed twice"
    assert not set(names) & set(table.optional_names())
    listed = {*names, *(name for variant in table.variants for name in table.expected((variant,)))}
    for need in (*table.need, *table.hint):
        assert not names or "*" in need.name or need.name.startswith("/") or need.name in listed, need.name
    for name in table.values.values():
        assert name in listed


@pytest.mark.parametrize("table", [table for table in TABLES if table.variants], ids=label)
def test_variants(table: Table) -> None:
    plain = set(table.plain_names)
    for variant in table.variants:
        names = table.expected((variant,))
        assert len(set(names)) == len(names)
        removed = expand(variant.removed, table.ranges_of((variant,)), table.parts)
        assert set(removed) <= {*plain, *expand(table.keys, table.ranges_of((variant,)), table.parts)}
        needed = {need.name for need in variant.need if "*" not in need.name and not need.name.startswith("/")}
        if plain and not variant.loose and not variant.name.startswith(("edit-", "lcm")):
            assert needed <= {*names, *table.optional_names()}, "a variant is recognised by a key that it does not list"


@pytest.mark.parametrize("table", [table for table in TABLES if table.slots], ids=label)
def test_slots(table: Table) -> None:
    slots = [slot for template in table.slots.split() for slot in alternatives(template, table.ranges, width=2)]
    assert slots[0] == "BASE"
    assert len(set(slots)) == len(slots)
    lines = [line.split() for line in table.blocks.strip().splitlines()]
    assert {slot for template, *_ in lines for slot in alternatives(template, table.ranges, width=2)} == set(slots[1:])
    listed = {*table.plain_names, *(name for variant in table.variants for name in table.expected((variant,)))}
    for template, *patterns in lines:
        for pattern in patterns:
            names = alternatives(pattern, table.ranges)
            assert len(alternatives(template, table.ranges, width=2)) in (1, len(names))
            if listed and not pattern.startswith("@"):
                assert all(any(key == name or key.startswith(f"{name}.") for key in listed) for name in names), pattern


@pytest.mark.parametrize(
    ("template", "names"),
    [
        ("a.b", ["a.b"]),
        ("a.{q,k}", ["a.q", "a.k"]),
        ("a.{0-2}.b", ["a.0.b", "a.1.b", "a.2.b"]),
        ("{D}.{x,y}", ["0.x", "0.y", "1.x", "1.y"]),
        ("a.{1,3-4}", ["a.1", "a.3", "a.4"]),
    ],
)
def test_templates(template: str, names: list[str]) -> None:
    assert alternatives(template, {"D": 2}) == names


def test_slot_numbers_have_two_digits() -> None:
    assert alternatives("IN{8-11}", {}, width=2) == ["IN08", "IN09", "IN10", "IN11"]


def test_parts_stand_for_their_lines() -> None:
    assert expand("x.{0,1}.<p>\ny", {}, {"p": "a\nb"}) == ["x.0.a", "x.0.b", "x.1.a", "x.1.b", "y"]


def test_needs_no_heavy_import() -> None:
    import subprocess
    import sys

    code = "import sys, sdops.archs.blocks as b; b.component_of; print({'torch', 'numpy', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


NEW_FAMILY = """
title = "Newcomer"

[[component]]
name = "transformer"
kind = "model"
layout = "native"
prefixes = ["model.diffusion_model.", ""]
need = ["portal.weight [64,*]"]
ranges = { D = 3 }
keys = '''
portal.weight
storeys.{D}.{lift,stairs}.weight
'''
slots = "BASE IN F{D}"
blocks = '''
IN     portal
F{D}   storeys.{D}
'''
variant = [{ name = "wide", need = ["portal.weight [*,32]"] }]
"""


def test_a_family_is_added_by_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in FILES:
        shutil.copy(path, tmp_path)
    (tmp_path / "newcomer.toml").write_text(NEW_FAMILY)
    monkeypatch.setattr(shelf, "FOLDER", tmp_path)
    tables.cache_clear()
    try:
        names = ["portal.weight", *[f"storeys.{i}.{way}.weight" for i in range(3) for way in ("lift", "stairs")]]
        found = detect({f"model.diffusion_model.{name}": Spec("F16", (64, 32)) for name in names[:-1]})
    finally:
        tables.cache_clear()
    assert (found.family, found.title, found.variants) == ("newcomer", "Newcomer", ("wide",))
    assert found.components[0].missing == ("model.diffusion_model.storeys.2.stairs.weight",)
    assert block_slots(found) == ["BASE", "IN", "F00", "F01", "F02"]
    assert block_of(found, "model.diffusion_model.storeys.1.lift.weight") == "F01"

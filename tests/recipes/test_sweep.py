"""Sweeps: grids of parameters, outputs named by them, and the sheet of distances."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import sdops
from sdops.errors import OutputError, UsageError
from sdops.verbs._recipe_sweep import cells, read_settings
from sdops.verbs._recipe_text import Recipe, parse_recipe
from tests import tiny

TEXT = """
name = "mix"
[inputs]
a = "m1.safetensors"
b = "m2.safetensors"
[parameters]
alpha = { default = 0.5, range = [0, 1] }
method = { default = "weighted-sum", choices = ["weighted-sum", "slerp"] }
note = { default = "0.5, IN00=0.1" }
[[steps]]
verb = "merge"
models = ["a", "b"]
method = "$method"
alpha = "$alpha"
"""


@pytest.fixture
def recipe() -> Recipe:
    return parse_recipe(TEXT, name="x", folder=Path())


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in (1, 2):
        tiny.write(tmp_path / f"m{seed}.safetensors", tiny.checkpoint(seed))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["alpha=0.1:0.9:0.1"], {"alpha": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]}),
        (["alpha=1:0:-0.5"], {"alpha": [1, 0.5, 0]}),
        (["alpha=0.1, 0.5,0.9"], {"alpha": [0.1, 0.5, 0.9]}),
        (["alpha=0.1", "alpha=0.5"], {"alpha": [0.1, 0.5]}),
        (["alpha=0.3"], {"alpha": 0.3}),
        (["alpha=0.3:0.3:0.1"], {"alpha": [0.3]}),
        (["method=slerp,weighted-sum"], {"method": ["slerp", "weighted-sum"]}),
        (["note=0.1, IN00=0.2"], {"note": "0.1, IN00=0.2"}),
    ],
)
def test_values_are_read(recipe, words, values):
    assert read_settings(recipe, words) == values


WRONG = ["alpha=0:1:0", "alpha=0:1:-0.1", "alpha=0:1:1e-9", "alpha=x", "alpha", "alpha=0:1", "alpha=0:1e9999999:1"]


@pytest.mark.parametrize("word", WRONG)
def test_what_is_no_value_is_refused(recipe, word):
    with pytest.raises(UsageError):
        read_settings(recipe, [word])


def test_every_combination_is_checked(recipe):
    assert len(cells(recipe, {"alpha": [0.1, 0.2], "method": ["slerp", "weighted-sum"]})) == 4
    with pytest.raises(UsageError, match=r"parameters\.alpha"):
        cells(recipe, {"alpha": [0.1, 2.0]})
    with pytest.raises(UsageError, match="no parameter `apha`"):
        cells(recipe, {"apha": [0.1, 0.2]})
    with pytest.raises(UsageError, match="too many"):
        cells(recipe, {"alpha": list(np.linspace(0, 1, 2000))})


def test_a_sweep_builds_the_grid_and_measures_it(recipe):
    report = sdops.build(recipe, set_={"alpha": [0.0, 0.25, 1.0]}, output="out", html="sheet.html", workers=1)
    names = [f"mix.alpha{alpha}.safetensors" for alpha in ("0", "0.25", "1")]
    assert report.result == [*(f"out/{name}" for name in names), "sheet.html"]
    sdops.build(recipe, set_={"alpha": 0.25}, output="one.safetensors")
    assert Path("one.safetensors").read_bytes() == Path("out", names[1]).read_bytes()
    a, b = tiny.checkpoint(1), tiny.checkpoint(2)
    keys = [key for key in a if key != tiny.IDS]
    norm = {name: sum(float(np.sum(tiny.numbers(m[key]) ** 2)) for key in keys) for name, m in (("a", a), ("b", b))}
    for cell, name in zip(report.data["cells"], names, strict=True):
        out = tiny.load(Path("out", name))
        for role, model in (("a", a), ("b", b)):
            change = sum(float(np.sum((tiny.numbers(out[key]) - tiny.numbers(model[key])) ** 2)) for key in keys)
            expected = np.sqrt(change / norm[role])
            assert cell["distances"][role]["all"] == pytest.approx(expected, rel=1e-6, abs=1e-12)
        whole = sum(float(np.sum(tiny.numbers(out[key]) ** 2)) for key in keys)
        assert cell["norm"] == pytest.approx(np.sqrt(whole), rel=1e-6)
        assert "IN04" in cell["distances"]["a"]["blocks"]
    assert [cell["settings"] for cell in report.data["cells"]] == [{"alpha": 0.0}, {"alpha": 0.25}, {"alpha": 1.0}]
    page = Path("sheet.html").read_text().replace("<wbr>", "")
    assert all(name in page for name in names)
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")


def test_a_sweep_goes_on_where_it_was_cut_short(recipe):
    sdops.build(recipe, set_={"alpha": [0.1, 0.5]}, output="out", workers=1)
    before = Path("out/mix.alpha0.1.safetensors").stat().st_mtime_ns
    trial = sdops.build(recipe, set_={"alpha": [0.1, 0.5, 0.9]}, output="out", dry_run=True)
    sdops.build(recipe, set_={"alpha": [0.1, 0.5]}, output="new", dry_run=True)
    assert not Path("new").exists()
    assert [cell["kept"] for cell in trial.data["cells"]] == [True, True, False]
    report = sdops.build(recipe, set_={"alpha": [0.1, 0.5, 0.9]}, output="out", workers=1)
    assert [cell["kept"] for cell in report.data["cells"]] == [True, True, False]
    assert Path("out/mix.alpha0.1.safetensors").stat().st_mtime_ns == before
    assert report.sections[0].rows[1][1].startswith("1 file in")
    assert report.sections[0].rows[2] == ("kept", "2 files of an earlier run")
    Path("out/mix.alpha0.9.safetensors").unlink()
    again = sdops.build(recipe, set_={"alpha": [0.1, 0.5, 0.9]}, output="out", workers=1)
    measured = [
        [{key: cell[key] for key in ("norm", "distances")} for cell in one.data["cells"]] for one in (report, again)
    ]
    assert measured[0] == measured[1]


def test_nothing_is_built_if_one_cell_cannot_be(recipe):
    Path("out").mkdir()
    Path("out/mix.alpha0.5.safetensors").write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists"):
        sdops.build(recipe, set_={"alpha": [0.1, 0.5]}, output="out")
    assert [path.name for path in Path("out").iterdir()] == ["mix.alpha0.5.safetensors"]
    with pytest.raises(UsageError, match="several files"):
        sdops.build(recipe, set_={"alpha": [0.1, 0.5]}, output="x.safetensors")
    with pytest.raises(UsageError, match="shows a sweep"):
        sdops.build(recipe, html="x.html", output="y.safetensors")


def test_values_that_are_close_have_names_of_their_own(recipe):
    trial = sdops.build(recipe, set_={"alpha": [0.1234567, 0.1234568]}, output="out", dry_run=True)
    assert trial.result == ["out/mix.alpha0.1234567.safetensors", "out/mix.alpha0.1234568.safetensors"]

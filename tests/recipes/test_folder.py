"""Folders of recipes: what is wrong in one of them is told with its name."""

from __future__ import annotations

from pathlib import Path

import pytest

import sdops
from sdops.errors import OutputError, SdopsError, UsageError
from sdops.verbs import recipe
from tests import tiny

TEXT = """
[inputs]
a = "m1.safetensors"
b = "m2.safetensors"
[parameters]
strength = 0.5
[[steps]]
verb = "merge"
models = ["a", "b"]
alpha = "$strength"
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in (1, 2):
        tiny.write(tmp_path / f"m{seed}.safetensors", tiny.checkpoint(seed))
    monkeypatch.chdir(tmp_path)
    Path("recipes").mkdir()
    Path("recipes/good.toml").write_text(TEXT)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("alpha", "alpa", r"`bad`: `steps\.1\.alpa`"),
        ("m2", "m3", r"`bad`: `inputs\.b`: .*m3"),
        ("0.5", '"x"', r"`bad`: `steps\.1\.alpha`: `x`"),
        ("strength = 0.5", "strength = []", r"`recipes/bad\.toml`: `parameters\.strength"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_an_error_names_the_recipe(old: str, new: str, problem: str, *, dry_run: bool) -> None:
    Path("recipes/bad.toml").write_text(TEXT.replace(old, new))
    with pytest.raises(SdopsError, match=problem):
        sdops.build("recipes", output="out", workers=1, dry_run=dry_run)
    assert not Path("out").exists()


def test_what_is_for_sweeps_is_refused() -> None:
    with pytest.raises(UsageError, match="`strength` has several values"):
        sdops.build("recipes", set_={"strength": [0.1, 0.2]}, output="out")
    with pytest.raises(UsageError, match="a page shows a sweep"):
        sdops.build("recipes", html="x.html", output="out")
    with pytest.raises(OutputError, match=r"need a folder, `m1.safetensors` is a file"):
        sdops.build("recipes", output="m1.safetensors")


def test_a_list_tells_what_it_leaves_out() -> None:
    Path("recipes/bad.toml").write_text("name = 3")
    report = recipe.ls("recipes")
    assert report.result[0] == "recipes/good.toml"
    assert report.warnings == ["`recipes/bad.toml` is left out: `recipes/bad.toml` has no steps"]

"""hf:// references where recipes, personalisation files and their models stand."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdops.settings import hub_cache_directory
from tests.custom_diffusion import files as custom_files
from tests.embeddings import files as embedding_files
from tests.hypernetworks import files as hypernetwork_files

RECIPE = """
name = "beside"
[inputs]
a = "a.safetensors"
b = "more/b.safetensors"
[parameters]
alpha = 0.4
[[steps]]
verb = "merge"
models = ["a", "b"]
alpha = "$alpha"
"""


@pytest.fixture
def shared(hub, model, tuned) -> str:
    """A repository with a recipe and the models that it names."""
    files = {"r.toml": RECIPE.encode(), "a.safetensors": model, "more/b.safetensors": tuned}
    return hub.add("ann/shared", files)


def test_a_recipe_of_the_hub_is_built_from_the_files_beside_it(hub, sdops, tmp_path, shared, model):
    done = sdops("build", "hf://ann/shared/r.toml", "--set", "alpha=0.3", "-o", "made.safetensors", "--json")
    assert done.code == 0, done.err
    files = [one["file"] for one in done.json["inputs"].values()]
    assert files == [f"hf://ann/shared@{shared}/{name}" for name in ("a.safetensors", "more/b.safetensors")]
    (tmp_path / "local").mkdir()
    (tmp_path / "a.safetensors").write_bytes(b"not what the recipe means")
    again = sdops("recipe", "from", "made.safetensors", "--verify", "--json")
    assert again.json["verified"]["same_bytes"], again.err
    hub.add("ann/made", {"made.safetensors": (tmp_path / "made.safetensors").read_bytes()})
    remote = sdops("recipe", "from", "hf://ann/made", "--verify", "--json")
    assert remote.json["verified"]["same_bytes"], remote.err
    offline = sdops(
        "build", "hf://ann/shared/r.toml", "--set", "alpha=0.3", "-o", "two.safetensors", HF_HUB_OFFLINE="1"
    )
    assert offline.code == 0, offline.err
    assert (tmp_path / "two.safetensors").read_bytes() == (tmp_path / "made.safetensors").read_bytes()


def test_recipes_of_the_hub_are_shown_copied_checked_and_listed(hub, sdops, tmp_path, shared):
    assert sdops("recipe", "show", "hf://ann/shared/r.toml").out.strip() == RECIPE.strip()
    assert sdops("recipe", "check", "hf://ann/shared/r.toml", "-q").out == "beside\n"
    assert sdops("recipe", "cp", "hf://ann/shared/r.toml", "-o", "mine.toml").code == 0
    assert (tmp_path / "mine.toml").read_text() == RECIPE
    hub.add("ann/recipes", {"one.toml": RECIPE.encode(), "two.toml": RECIPE.replace("beside", "two").encode()})
    listed = sdops("recipe", "ls", "hf://ann/recipes", "-q")
    assert listed.lines[:2] == ["hf://ann/recipes/one.toml", "hf://ann/recipes/two.toml"]
    given = [word for name in ("a", "b") for word in (f"--{name}", "hf://ann/shared/a.safetensors")]
    planned = sdops("build", "hf://ann/recipes", *given, "--dry-run")
    assert planned.code == 0, planned.err
    assert "two.safetensors" in planned.out


@pytest.mark.parametrize("file", ["../one/a.safetensors", "/etc/passwd", "hf://ann/../x/y.safetensors"])
def test_a_recipe_of_the_hub_reads_nothing_outside(hub, sdops, shared, file):
    hub.add("ann/evil", {"r.toml": RECIPE.replace("a.safetensors", file).replace("more/b.safetensors", file).encode()})
    hub.forget()
    done = sdops("build", "hf://ann/evil/r.toml")
    assert done.code == 2
    assert "inputs.a.file" in done.err
    assert not hub.requests("safetensors")


def test_nothing_large_is_downloaded_to_be_refused_as_a_recipe(hub, sdops, home, shared):
    hub.add("ann/big", {"r.toml": b"#" * 3_000_000, "m.yaml": b"#" * 3_000_000})
    hub.forget()
    for command in (("build", "hf://ann/shared/a.safetensors"), ("build", "hf://ann/big/r.toml"),
                    ("recipe", "from", "hf://ann/big/m.yaml")):  # fmt: skip
        done = sdops(*command)
        assert done.code in (1, 2)
        assert "no recipe" in done.err or "too large" in done.err
    assert hub.sent() < 100_000
    assert not list(home.rglob("blobs/*"))


def test_personalisation_files_of_the_hub(hub, sdops, tmp_path):
    made = {
        "emb": embedding_files.a1111(tmp_path)[0],
        "hyp": hypernetwork_files.linear(tmp_path)[0],
        "cus": custom_files.adobe(tmp_path),
    }
    for name, path in made.items():
        hub.add(f"ann/{name}", {path.name: path.read_bytes()})
        path.unlink()
    for verb, name in (("embed", "emb"), ("hypernet", "hyp"), ("custom", "cus")):
        for command in ((verb, "inspect"), ("inspect",)):
            done = sdops(*command, f"hf://ann/{name}", "-q")
            assert done.code == 0, done.err
            assert done.out.startswith(f"hf://ann/{name}/{made[name].name}: ")
    assert sdops("hypernet", "convert", "hf://ann/hyp", "--to", "safetensors").code == 0
    assert sdops("hypernet", "merge", "hf://ann/hyp", "hf://ann/hyp", "-o", "two.pt").code == 0
    assert sdops("embed", "convert", "hf://ann/emb", "--to", "diffusers").code == 0
    assert sdops("embed", "make", f"'hf://ann/emb/{made['emb'].name}' * 0.5", "-o", "half.safetensors").code == 0
    assert sorted(path.name for path in Path(tmp_path).glob("*.*") if path.name[0] != ".") == [
        "half.safetensors", "inner.safetensors", "linear.safetensors", "two.pt",
    ]  # fmt: skip


def test_the_cache_is_where_huggingface_hub_has_it(monkeypatch):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/ann")
    monkeypatch.setenv("DISK", "/disk")
    assert hub_cache_directory() == Path("/ann/.cache/huggingface/hub")
    places = {
        "HF_HOME": ("$DISK/hf", "/disk/hf/hub"),
        "HUGGINGFACE_HUB_CACHE": ("~/old", "/ann/old"),
        "HF_HUB_CACHE": ("$DISK/cache", "/disk/cache"),
    }
    for name, (text, place) in places.items():
        monkeypatch.setenv(name, text)
        assert hub_cache_directory() == Path(place)

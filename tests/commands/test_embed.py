"""`sdops embed ...` on the command line."""

from __future__ import annotations

import torch

from tests.commands.test_imports import modules
from tests.embeddings import files


def test_inspect(sdops, tmp_path):
    path, _ = files.a1111(tmp_path)
    outcome = sdops("embed", "inspect", str(path))
    assert outcome.code == 0
    assert "sd1" in outcome.out
    assert "v1-5-pruned [81761151]" in outcome.out
    facts = sdops("embed", "inspect", str(path), "--json").json["files"][0]
    assert (facts["layout"], facts["embeddings"][0]["step"]) == ("a1111", 1234)


def test_convert_and_back(sdops, tmp_path):
    path, _ = files.a1111(tmp_path)
    outcome = sdops("embed", "convert", str(path), "--to", "diffusers", "-q")
    assert outcome.out.strip() == str(tmp_path / "inner.safetensors")
    assert sdops("embed", "convert", outcome.out.strip(), "--to", "a1111", "-o", "back.pt").code == 0
    before, after = (torch.load(name, weights_only=True)["string_to_param"]["*"] for name in (path, "back.pt"))
    assert torch.equal(before, after)


def test_dry_run_writes_nothing(sdops, tmp_path):
    path, _ = files.a1111(tmp_path)
    outcome = sdops("embed", "convert", str(path), "--to", "kohya", "-n")
    assert "would write" in outcome.out
    assert [item.name for item in tmp_path.iterdir() if item.is_file()] == [path.name]


def test_merge_and_make(sdops, tmp_path):
    path, _ = files.a1111(tmp_path)
    assert sdops("embed", "merge", str(path), "--rows", "2,0", "-o", "short.pt").code == 0
    assert sdops("embed", "make", "2*short.pt[0]", "-o", "twice.pt").code == 0
    before, after = (torch.load(name, weights_only=True)["string_to_param"]["*"] for name in (path, "twice.pt"))
    assert torch.equal(2 * before[2:3], after)


def test_wrong_usage_is_explained(sdops, tmp_path):
    path, _ = files.a1111(tmp_path)
    outcome = sdops("embed", "convert", str(path), "--to", "difusers")
    assert outcome.code == 2
    assert "did you mean `diffusers`?" in outcome.err
    assert sdops("embed", "merge", str(path)).code == 2
    assert sdops("embed", "merge", str(path), "--rows", "a", "-o", "x.pt").code == 2
    assert sdops("embed", "inspcet").code == 2


def test_torch_is_not_imported(tmp_path):
    path, _ = files.a1111(tmp_path)
    assert "torch" not in modules("embed", "inspect", str(path))
    assert not {"torch", "numpy"} & modules("embed", "--help")
    assert not {"torch", "numpy"} & modules("embed", "convert", "--help")

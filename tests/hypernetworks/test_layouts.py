"""Every layout of hypernetworks: found by structure, computing what torch computes, coming back bit for bit."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sdops
import sdops.hypernetworks as shelf
from sdops.errors import FormatError, MismatchError, SdopsError, UsageError
from sdops.verbs._hypernet_chain import check_evaluable, forward
from sdops.verbs._hypernet_open import open_network
from tests.hypernetworks import files

NAMES = sorted(path.stem for path in Path(shelf.__file__).parent.glob("[!_]*.py"))
WRITERS = pytest.mark.parametrize("writer", files.WRITERS, ids=lambda writer: writer.__name__)


def test_every_file_of_the_shelf_is_listed_and_offers_what_the_shelf_says():
    assert set(NAMES) == set(shelf.ORDER) == {*files.WRITERS.values(), "safetensors"}
    for name in NAMES:
        module = import_module(f"sdops.hypernetworks.{name}")
        assert module.__doc__
        assert all(callable(getattr(module, function)) for function in ("sniff", "read", "write"))
        assert module.CONTAINER in ("torch", "safetensors")
        assert module.ENDING.startswith(".")


@WRITERS
def test_computes_what_the_original_modules_compute(writer, tmp_path):
    path, made = writer(tmp_path)
    path = path.rename(tmp_path / "EasyNegative.v2.bin")  # a name proves nothing
    found = open_network(path)
    assert found.network.layout == files.WRITERS[writer]
    assert found.notes == []
    check_evaluable(found)
    assert list(found.network.pairs) == list(made)
    for width, pair in made.items():
        x = torch.randn(50, width, generator=torch.Generator().manual_seed(1))
        for which, module in zip("kv", pair, strict=True):
            with torch.no_grad():
                ours = forward(found.network, found.values(width, which))(x)
                torch.testing.assert_close(ours, module.linear(x), rtol=1e-5, atol=1e-6)


def same(a: Any, b: Any) -> bool:
    """Trees of torch files, tensors by their bits; tuples may have become lists."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@WRITERS
def test_comes_back_from_safetensors_as_it_was(writer, tmp_path):
    path, _ = writer(tmp_path)
    there = Path(sdops.hypernet.convert(path, output=tmp_path / "x.safetensors").result[0])
    assert all(key.startswith("hypernetwork.") for key in load_file(there))
    back = Path(sdops.hypernet.convert(there, output=tmp_path / "back.pt").result[0])
    assert same(torch.load(path, weights_only=True), torch.load(back, weights_only=True))


def test_novelai_and_the_web_ui_have_other_names_for_the_same(tmp_path):
    path, _ = files.novelai(tmp_path)
    sdops.hypernet.convert(path, to="a1111", output=tmp_path / "a.pt")
    first, second = (torch.load(p, weights_only=True)[32][0] for p in (path, tmp_path / "a.pt"))
    assert torch.equal(first["linear2.weight"], second["linear.1.weight"])
    sdops.hypernet.convert(tmp_path / "a.pt", to="novelai", output=tmp_path / "n.pt")
    assert same(torch.load(path, weights_only=True), torch.load(tmp_path / "n.pt", weights_only=True))


def test_what_a_layout_cannot_hold_is_refused(tmp_path):
    path, _ = files.relu(tmp_path)
    with pytest.raises(MismatchError, match="two linear layers"):
        sdops.hypernet.convert(path, to="novelai", output=tmp_path / "n.pt")
    with pytest.raises(UsageError, match="never"):
        sdops.hypernet.convert(path, to="a1111", output=tmp_path / "n.safetensors")
    with pytest.raises(UsageError, match="no layout"):
        sdops.hypernet.convert(path, to="a1112", output=tmp_path / "n.pt")


def broken(folder: Path, change: Any) -> Path:
    path, _ = files.relu(folder)
    tree = torch.load(path, weights_only=True)
    change(tree)
    torch.save(tree, path)
    return path


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda tree: tree[32][0].pop("linear.0.weight"), "has no weight"),
        (lambda tree: tree[32][1].update({"linear.2.weight": torch.zeros(32, 5)}), "where 64 numbers come in"),
        (lambda tree: [tree[32][1].pop(f"linear.2.{part}") for part in ("weight", "bias")], "64 numbers come out"),
        (lambda tree: tree[32][0].update({"linear.0.bias": torch.zeros(3)}), "does not fit together"),
    ],
)
def test_damage_is_named(change, error, tmp_path):
    with pytest.raises(FormatError, match=error):
        open_network(broken(tmp_path, change))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda tree: tree.update(activation_func="sine"), "`sine` is not known"),
        (lambda tree: tree.update(activation_func="linear"), "layers 0, 2, but the settings"),
        (lambda tree: tree.update(skip_connection=True), "not known here"),
        (lambda tree: tree[64][1]["linear.2.bias"].fill_(float("nan")), "NaN"),
    ],
)
def test_what_cannot_be_computed_is_said(change, error, tmp_path):
    with pytest.raises(SdopsError, match=error):
        sdops.hypernet.merge(broken(tmp_path, change), output=tmp_path / "out.pt")


def test_other_files_are_no_hypernetworks(tmp_path):
    torch.save({"string_to_param": {"*": torch.zeros(2, 768)}}, tmp_path / "a.pt")
    torch.save({768: [torch.zeros(3), torch.zeros(3)]}, tmp_path / "b.pt")
    save_file({"lora_unet_x.alpha": torch.ones(1)}, tmp_path / "c.safetensors")
    for name in ("a.pt", "b.pt", "c.safetensors"):
        with pytest.raises(FormatError, match="holds no hypernetwork"):
            open_network(tmp_path / name)


def test_what_lies_beside_the_network_is_told_and_left_out(tmp_path):
    path = broken(tmp_path, lambda tree: tree.update(optimizer_state_dict={"state": {0: torch.zeros(2)}}))
    report = sdops.hypernet.convert(path, output=tmp_path / "x.safetensors")
    assert "optimizer_state_dict" in report.warnings[0]


def test_inspect_tells_structure_and_norms(tmp_path):
    deep, made = files.everything(tmp_path)
    linear, _ = files.linear(tmp_path)
    report = sdops.hypernet.inspect(deep, linear)
    facts, other = report.data["files"]
    assert (facts["activation"], facts["layer_norm"], facts["linear"]) == ("swish", True, False)
    assert facts["chains"][0]["layers"] == [32, 48, 64, 48, 32]
    first = made[32][0].linear[0].weight
    assert facts["chains"][0]["weights"][0] == pytest.approx(float(first.detach().norm()), rel=1e-6)
    assert (other["linear"], other["settings"]["step"]) == (True, 5000)
    text = str(report)
    assert "v1-5-pruned [81761151]" in text
    assert "32-48-64-48-32" in text


def test_inspect_measures_what_the_chains_do(tmp_path):
    path, made = files.linear(tmp_path)
    chain = sdops.hypernet.inspect(path, effect=True).data["files"][0]["chains"][0]
    k = made[32][0].linear
    matrix = (k[1].weight @ k[0].weight).detach()
    assert chain["linear_share"] == 1
    assert chain["offset"] == pytest.approx(float((k[1].weight @ k[0].bias + k[1].bias).detach().norm()), rel=1e-5)
    x = torch.randn(20000, 32, generator=torch.Generator().manual_seed(0))
    assert chain["gain"] == pytest.approx(float(k(x).detach().norm() / x.norm()), rel=0.02)
    assert 1 < chain["directions"] <= float(torch.linalg.matrix_rank(matrix))


def test_inspect_says_how_linear_a_curved_network_is(tmp_path):
    path, _ = files.relu(tmp_path)
    share = sdops.hypernet.inspect(path, effect=True).data["files"][0]["chains"][0]["linear_share"]
    assert 0.3 < share < 0.99

"""Every training method on the tiny model, through the same loop; samples, masks, the class, logs and curves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sdops.trainers
from fixtures import tiny_sd
from sdops.core.source import read as read_tensor
from sdops.core.tree import Leaf, Saved
from sdops.custom_diffusion import find, layout
from sdops.errors import OutputError
from sdops.formats import open_source
from sdops.trainers import METHODS
from sdops.training.log import read
from sdops.verbs._adapters import open_adapter
from sdops.verbs._embed_open import open_embeddings
from sdops.verbs.dataset import check
from sdops.verbs.embed import inspect
from sdops.verbs.train import plot

WORDS = {"tokens": ("it:2",), "init": ("red square",), "caption": "template", "template": "a photo of a {}"}
QUICK = {"steps": 3, "batch": 1, "validate_every": 3, "validation": 1}
GIVEN = {
    "lora": {"rank": 2, "lr": 1e-2},
    "ti": {**WORDS, "lr": 2e-2},
    "pivotal": {**WORDS, "rank": 2, "lr": 1e-2, "words_until": 0.4},
    "dreamartist": {**WORDS, "lr": 2e-2},
    "custom-diffusion": {**WORDS, "lr": 1e-2, "to": "kohya"},
    "dreambooth": {"lr": 1e-4},
}


def losses(report):
    return [line["loss"] for line in read(Path(report.data["log"])) if "loss" in line]


def test_the_shelf_says_its_contract_and_has_a_file_for_every_method():
    assert (sdops.trainers.__doc__ or "").startswith("SHELF: ")
    files = {path.stem for path in Path(sdops.trainers.__file__).parent.glob("[!_]*.py")}
    tested = {*GIVEN, "hypernetwork", "null-text", "aesthetic"}  # these in `test_personal`
    assert files == {name.replace("-", "_") for name in METHODS} == {name.replace("-", "_") for name in tested}


@pytest.mark.parametrize("method", list(GIVEN))
def test_a_method_learns_and_saves_what_it_learnt(train, tmp_path, method):
    report = train(method, **QUICK, **GIVEN[method])
    before, after = report.data["losses"]["0"], report.data["losses"]["3"]
    assert after < before
    assert all(Path(name).is_file() for name in report.data["outputs"])
    if method in ("ti", "dreamartist"):
        names = [open_embeddings(Path(name)).embeddings[0].name for name in report.data["outputs"]]
        assert names == {"ti": ["it"], "dreamartist": ["it", "it-neg"]}[method]
    else:
        adapter = open_adapter(tmp_path / "out.safetensors")
        assert adapter.patches
        assert bool(adapter.extras) == ("tokens" in GIVEN[method])
        assert adapter.source.metadata["ss_steps"] == "3"


@pytest.mark.parametrize(
    "given",
    [
        {"ranks": "attention=4/2 resnet=2 text"},
        {"family": "loha", "dora": True},
        {"family": "lokr", "factor": 4, "ranks": "attention=2 feedforward=64 resnet=2"},
    ],
    ids=str,
)
def test_what_is_said_to_learn_is_what_learns(train, tmp_path, given):
    report = train("lora", steps=0, rank=2, **given)
    state = open_source(tmp_path / "out.state.safetensors")
    assert report.data["parameters"] == state.specs["flat"].numel
    state.close()


def test_of_a_moving_average_all_is_told_that_is_saved(train, tmp_path):
    """One that hardly moves has the first loss to the end; its words have the vocabulary's length all the same."""

    def lengths():
        (word,) = open_embeddings(tmp_path / "out.pt").embeddings
        (vectors,) = word.vectors.values()
        return np.linalg.norm(vectors.values, axis=1)

    still = train("ti", **QUICK, **GIVEN["ti"], ema=0.99999)
    assert still.data["losses"]["3"] == pytest.approx(still.data["losses"]["0"], rel=1e-4)
    usual = lengths()
    moved = train("ti", **QUICK, **{**GIVEN["ti"], "lr": 1.0}, ema=0.5)
    assert moved.data["losses"]["3"] != pytest.approx(still.data["losses"]["0"], rel=1e-2)
    np.testing.assert_allclose(lengths(), usual, rtol=1e-5)


def test_an_adapter_of_peft_is_a_folder_and_everything_else_lies_beside_it(train, tmp_path):
    """Also what is saved between, so that every file has its own configuration."""
    given = {
        **QUICK,
        **GIVEN["lora"],
        "lora_alpha": 8.0,
        "to": "peft",
        "output": str(tmp_path / "a.b"),
        "save_every": 2,
    }
    train("lora", **given)
    train("lora", **{**given, "steps": 4}, resume=True)
    folders = [tmp_path / "a.b", tmp_path / "a.b-step000002"]
    assert sorted(tmp_path.iterdir()) == sorted([*folders, tmp_path / "a.b.jsonl", tmp_path / "a.b.state.safetensors"])
    for folder in folders:
        assert {each.name for each in folder.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
        adapter = open_adapter(folder)
        assert {patch.settings["lora_alpha"] for patch in adapter.patches} == {8.0}
        assert adapter.source.metadata["ss_output_name"] == "a.b"
    with pytest.raises(OutputError, match="adapter_model"):
        train("lora", **given, force=False)


@pytest.mark.parametrize(
    ("to", "names"),
    [
        ("a1111", ["out-it.pt", "out-that.pt"]),
        ("diffusers", ["out-it.bin", "out-that.bin"]),  # its own loader refuses a file of two
        ("rinongal", ["out.pt"]),
    ],
)
def test_several_words_are_read_back(train, tmp_path, to, names):
    output = tmp_path / f"out{Path(names[0]).suffix}"
    words = {"tokens": ("it:2", "that"), "init": ("red", "circle"), "template": "an {}", "caption": "template"}
    report = train("ti", **QUICK, **words, to=to, output=str(output))
    assert [Path(name).name for name in report.data["outputs"]] == names
    files = [inspect(name).data["files"][0] for name in report.data["outputs"]]
    assert {file["layout"] for file in files} == {to}
    found = {one["name"]: one["vectors"] for file in files for one in file["embeddings"]}
    assert found == {"it": 2, "that": 1}


def test_custom_diffusion_is_saved_as_its_web_ui_does(train, tmp_path):
    report = train("custom-diffusion", **QUICK, **{**GIVEN["custom-diffusion"], "to": "webui"})
    assert [Path(name).name for name in report.data["outputs"]] == ["out.safetensors", "out.pt"]
    source = open_source(tmp_path / "out.safetensors")
    saved = Saved({key: Leaf(key, spec) for key, spec in source.specs.items()}, source.metadata, "out")
    source.close()
    assert find(saved) == "webui"
    edits = layout("webui").read(saved).edits
    assert {edit.kind for edit in edits} == {"delta"}
    assert {edit.layer.rpartition(".")[2] for edit in edits} == {"to_k", "to_v"}
    assert open_embeddings(tmp_path / "out.pt").embeddings[0].name == "it"


def test_every_file_that_exists_is_refused_before_training(train, tmp_path):
    words = {**WORDS, "tokens": ("it", "that"), "template": "an {}", "force": False}
    (tmp_path / "out-that.pt").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"out-that\.pt"):
        train("ti", **words, steps=1)
    (tmp_path / "out-neg.pt").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"out-neg\.pt"):
        train("dreamartist", **{**words, "tokens": ("it",)}, steps=1)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_words_stand_still_once_they_have_learnt(train, tmp_path, share):
    """Words of pivotal tuning are after four steps what they were after two, or as they began."""
    given = {**QUICK, **GIVEN["pivotal"], "words_until": share, "steps": 4, "save_every": 1, "save_dtype": "fp32"}
    train("pivotal", **given)
    found = [words_in(tmp_path / f"out{step}.safetensors") for step in ("-step000001", "-step000002", "")]
    assert np.allclose(found[1], found[2], rtol=0, atol=1e-7)
    assert np.allclose(found[0], found[1], rtol=0, atol=1e-7) == (share == 0)


def words_in(path):
    source = open_source(path)
    key = next(key for key in source.specs if key.startswith("bundle_emb"))
    data = bytes(read_tensor(source, key))
    source.close()
    return np.frombuffer(data, np.float32)


def test_pictures_of_the_class_are_half_of_the_loss(train, tmp_path):
    """With weight 0 they do not count; with weight 1 the loss is the sum of both means."""
    others = tiny_sd.images(tmp_path / "others", "red square", 3)
    given = {"steps": 1, "rank": 2, "batch": 2, "validate_every": 0}
    alone = losses(train("lora", **given))
    prior = {"class_images": str(others), "class_prompt": "a photo of a red square"}
    assert losses(train("lora", **given, **prior, prior_weight=0.0)) == pytest.approx(alone, rel=1e-5)
    whole = losses(train("lora", **given, **prior))[0]
    double = losses(train("lora", **given, **prior, prior_weight=2.0))[0]
    assert double - whole == pytest.approx(whole - alone[0], rel=1e-4)


def test_masks_mirrors_tags_and_samples(train, tmp_path, circles):
    masks = tmp_path / "masks"
    masks.mkdir()
    for path in circles.glob("*.png"):
        pixels = np.zeros((32, 32), np.uint8)
        pixels[:16] = 255
        Image.fromarray(pixels).save(masks / path.name)
    given = {"steps": 2, "rank": 2, "batch": 1, "validate_every": 0, "flip": True, "shuffle_tags": True}
    paints = {"sample_every": 2, "sample_prompts": ("a photo of a red circle",), "sample_steps": 3}
    report = train("lora", **given, **paints, masks=str(masks))
    assert losses(report) != losses(train("lora", **given))
    painted = tmp_path / "out-samples" / "step000002-0.png"
    assert str(painted) in report.data["outputs"]
    with Image.open(painted) as image:
        assert image.size == (32, 32)


def test_the_log_becomes_curves(train, tmp_path):
    report = train("lora", **QUICK, rank=2)
    page = tmp_path / "curves.html"
    found = plot([report.data["log"]][0], output=page)
    assert found.data["runs"]["out"]["loss"][0][0] == 1
    assert "Loss with fixed noise" in str(found)
    text = page.read_text(encoding="utf-8")
    assert "<polyline" in text
    assert "<script" not in text
    assert "http" not in text.replace("http-equiv", "")
    plot(report.data["log"], output=tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").read_text(encoding="utf-8").startswith("<svg")


def test_a_folder_is_checked(tmp_path, circles):
    assert not check(circles, resolution=32, bucket_step=8).failed
    folder = tmp_path / "mixed"
    tiny_sd.images(folder, count=2)
    (folder / "copy.png").write_bytes((folder / "yellow_circle_0.png").read_bytes())
    (folder / "alone.txt").write_text("a, b")
    (folder / "cut.png").write_bytes((folder / "yellow_circle_0.png").read_bytes()[:50])
    found = check(folder, resolution=64)
    assert found.failed
    assert [Path(name).name for name in found.data["broken"]] == ["cut.png"]
    assert [Path(name).name for name in found.data["without_caption"]] == ["copy.png"]
    assert [[Path(name).name for name in group] for group in found.data["duplicates"]] == [
        ["copy.png", "yellow_circle_0.png"]
    ]
    assert len(found.data["small"]) == 3


def test_the_benchmark_runs_dry():
    script = Path(__file__).parents[2] / "tools" / "bench_train.py"
    command = [sys.executable, str(script), "--device", "cpu", "--tiny", "--json", "--steps", "1"]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"}
    )
    rows = json.loads(done.stdout)["tiny"]
    assert rows[0]["side"] == "sdops"
    assert rows[0]["milliseconds"] > 0

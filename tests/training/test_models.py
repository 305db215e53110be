"""Every family, out of a single file and out of a folder: the same model, and files that belong to it."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from sdops.formats import open_source
from sdops.training.log import read
from sdops.verbs._adapters import open_adapter
from sdops.verbs._embed_open import open_embeddings
from sdops.verbs.apply import apply
from sdops.verbs.convert import convert
from tests.training import narrow


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def family(request, tmp_path_factory):
    """A family, its model as a folder, and the same as a single file."""
    place = tmp_path_factory.mktemp(request.param)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = narrow.folder(request.param, place / "folder", "v" if request.param == "sd2" else "epsilon")
    single = place / "model.safetensors"
    convert(folder, to="original", output=single)
    return request.param, folder, single


def losses(report):
    return [line["loss"] for line in read(Path(report.data["log"])) if "loss" in line]


@pytest.mark.parametrize("family", ["sd2", "sdxl"], indirect=True)
def test_a_single_file_trains_as_its_folder_does(family, train, tmp_path):
    name, folder, single = family
    given = {
        "steps": 2,
        "rank": 2,
        "batch": 1,
        "text_encoder": True,
        "validate_every": 0,
        "resolution": 128,
        "lr": 1e-3,
    }
    given |= {"prediction": "v"} if name == "sd2" else {}  # random weights do not tell it
    one = train("lora", model=str(folder), output=str(tmp_path / "a.safetensors"), **given)
    two = train("lora", model=str(single), output=str(tmp_path / "b.safetensors"), **given)
    assert losses(one) == losses(two)
    assert one.data["family"] == name
    adapter = open_adapter(tmp_path / "b.safetensors")
    assert (adapter.architecture, adapter.dialect, adapter.unknown) == (name, "kohya", ())
    components = {patch.target.component for patch in adapter.patches}
    assert components == {"unet"} | {"sd1": {"clip_l"}, "sd2": {"clip_h"}, "sdxl": {"clip_l", "clip_g"}}[name]
    source = open_source(single)
    known = {key for key in source.specs if key.endswith(".weight")}
    source.close()
    targets = {
        f"model.diffusion_model.{p.target.module}.weight" for p in adapter.patches if p.target.component == "unet"
    }
    assert targets <= known


@pytest.mark.parametrize("family", ["sdxl"], indirect=True)
def test_words_have_vectors_for_every_encoder(family, train, tmp_path):
    _, folder, _ = family
    words = {"tokens": ("it:2", "that"), "init": ("red", "2*circle - red"), "template": "an {}", "caption": "template"}
    output = tmp_path / "w.safetensors"
    given = {"steps": 1, "batch": 2, "validate_every": 0, "resolution": 64, **words}
    train("ti", model=str(folder), output=str(output), **given)
    found = open_embeddings(tmp_path / "w-it.safetensors").embeddings[0]
    shapes = {encoder: rows.values.shape for encoder, rows in found.vectors.items()}
    assert shapes == {"clip_l": (2, 32), "clip_g": (2, 64)}
    assert all(np.isfinite(rows.values).all() for rows in found.vectors.values())


@pytest.mark.parametrize("family", ["sd1"], indirect=True)
@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("lora", {"text_encoder": True, "dora": True, "ranks": "attention=4/2 resnet=2 time=2", "lr": 2e-2}),
        ("lora", {"family": "loha", "rslora": True, "lr": 2e-2, "ranks": "feedforward=4 sampler=2"}),
        ("dreambooth", {"lr": 1e-3}),
    ],
    ids=["dora", "loha", "dreambooth"],
)
def test_a_model_with_the_result_applied_is_the_trained_model(family, train, tmp_path, method, given):
    """The loss with fixed noise after training is the loss at the start of a training of the model with it applied."""
    _, _, single = family
    wide = tmp_path / "wide.safetensors"
    convert(single, to="safetensors", dtype="fp32", output=wide)
    settings = {"batch": 2, "resolution": 64, "validation": 2}
    trained = train(method, model=str(wide), steps=3, validate_every=3, save_dtype="fp32", **settings, **given)
    apply(wide, lora=[tmp_path / "out.safetensors"], output=tmp_path / "applied.safetensors")
    again = train("lora", model=str(tmp_path / "applied.safetensors"), steps=0, **settings)
    before, after = trained.data["losses"]["0"], trained.data["losses"]["3"]
    assert abs(after - before) > 1e-3 * before
    assert again.data["losses"]["0"] == pytest.approx(after, rel=1e-5)

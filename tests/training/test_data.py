"""Pictures and captions on their way into a step: sources, orders, mirrors, masks, and latents that are kept."""

from __future__ import annotations

import random
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fixtures import tiny_sd
from sdops.training import latents
from sdops.training.batches import Sample, varied
from sdops.training.config import read as read_settings
from sdops.training.latent_store import LatentStore
from sdops.training.pictures import look
from sdops.verbs._train_origin import open_origin
from sdops.verbs._train_plan import check


def picture(path, width=32, height=32, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(values).save(path)
    return values


def test_captions_come_from_txt_then_caption_then_the_template(tmp_path):
    for name in ("a", "b", "c_d"):
        picture(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("from\n txt", encoding="utf-8")
    (tmp_path / "a.caption").write_text("from caption")
    (tmp_path / "b.caption").write_text("from caption")

    def captions(**way):
        return [(each.caption, each.origin) for each in look(tmp_path, **way).pictures]

    assert captions(template="x {}") == [("from txt", "txt"), ("from caption", "caption"), ("x {}", "template")]
    assert captions(caption="caption")[0] == ("from caption", "caption")
    assert captions(caption="filename")[2] == ("c d", "filename")
    assert captions(caption="template", template="x")[0] == ("x", "template")
    assert captions()[2] == (None, "")


def course(tiny, folder, **given):
    method = given.pop("method", "lora")
    wanted = {"model": str(tiny), "images": str(folder), "bucket_step": 8, "output": str(folder / "o.safetensors")}
    config = read_settings(method, None, {**wanted, **given})
    return check(method, config, open_origin(config))


def test_repeats_and_mirrors_are_samples_of_an_epoch(tiny, tmp_path):
    tiny_sd.images(tmp_path, count=3)
    picture(tmp_path / "wide.png", 64, 16)
    (tmp_path / "wide.txt").write_text("wide {}")
    found = course(tiny, tmp_path, repeats=2, flip=True, batch=2)
    counted = Counter(found.plan.samples)
    assert set(counted.values()) == {2}
    assert len(counted) == 8
    assert sum(sample.mirrored for sample in counted) == 4
    assert {sample.box for sample in counted} == {(32, 32), (64, 16)}
    assert found.plan.batches == 6 + 2
    words = course(tiny, tmp_path, method="ti", tokens=("it:2", "that"), output=str(tmp_path / "o.pt"))
    assert words.captions[-1] == "wide it that" or "wide it that" in words.captions


def test_a_mirrored_picture_is_the_mirror_image_of_its_crop(tmp_path):
    picture(tmp_path / "p.png", 40, 24)
    plain = latents.pixels_of(tmp_path / "p.png", (32, 24))
    assert plain.shape == (3, 24, 32)
    assert torch.equal(latents.pixels_of(tmp_path / "p.png", (32, 24), mirrored=True), plain.flip(-1))
    assert torch.allclose(latents.pixels_of(tmp_path / "p.png", (40, 24)).amax(), torch.tensor(1.0))


def test_a_mask_follows_its_picture(tmp_path):
    values = np.zeros((24, 40), np.uint8)
    values[:, :20] = 255
    Image.fromarray(values).save(tmp_path / "m.png")
    found = latents.mask_of(tmp_path / "m.png", (32, 24), 8, alpha=False, mirrored=False)
    assert torch.equal(found, torch.tensor([1.0, 1, 0, 0]).expand(1, 3, 4))
    turned = latents.mask_of(tmp_path / "m.png", (32, 24), 8, alpha=False, mirrored=True)
    assert torch.equal(turned, found.flip(-1))


@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=6, unique=True), st.integers(0, 7), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_shuffled_tags_are_the_same_tags_and_the_first_stay(tags, keep, seed):
    found = varied(", ".join(tags), random.Random(seed), dropout=0.0, shuffle=True, keep=keep).split(", ")
    assert sorted(found) == sorted(tags)
    assert found[:keep] == tags[:keep]


def test_captions_are_left_out_as_often_as_said():
    chance = random.Random(0)
    left_out = sum(varied("a", chance, dropout=0.3, shuffle=False, keep=0) == "" for _ in range(2000))
    assert 500 < left_out < 700  # 600; 5 deviations are 102


@pytest.fixture(scope="module")
def model(tiny):
    from sdops.verbs._train_model import build

    config = read_settings("lora", None, {"model": str(tiny)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build(open_origin(config), config)


def test_kept_latents_are_those_that_were_made(model, circles, tmp_path, monkeypatch):
    pictures = look(circles).pictures
    samples = [Sample(0, (32, 32)), Sample(1, (32, 32), True), Sample(1, (24, 40))]
    plain = latents.make(model, pictures, samples)
    first = latents.make(model, pictures, samples, LatentStore(tmp_path, model))
    calls = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda pixels: calls.append(1) or encode(pixels))
    again = latents.make(model, pictures, samples, LatentStore(tmp_path, model))
    assert not calls
    for sample in samples:
        for each in (first, again):
            assert torch.equal(each[sample].mean, plain[sample].mean)
            assert torch.equal(each[sample].deviation, plain[sample].deviation)
            assert each[sample].sizes == plain[sample].sizes
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "other"])
def test_damaged_latents_are_made_again(model, circles, tmp_path, damage):
    pictures, sample = look(circles).pictures, Sample(0, (32, 32))
    store = LatentStore(tmp_path, model)
    wanted = latents.make(model, pictures, [sample], store)[sample]
    (path,) = tmp_path.rglob("*.safetensors")
    whole = path.read_bytes()
    other = tiny_sd.FILE.read_bytes()
    damaged = {"cut": whole[:-5], "flipped": whole[:-1] + bytes([whole[-1] ^ 1]), "emptied": b"", "other": other}
    path.write_bytes(damaged[damage])
    assert torch.equal(latents.make(model, pictures, [sample], store)[sample].mean, wanted.mean)
    assert path.read_bytes() == whole


def test_latents_of_another_vae_are_not_taken(model, circles, tmp_path):
    pictures, sample = look(circles).pictures, Sample(0, (32, 32))
    latents.make(model, pictures, [sample], LatentStore(tmp_path, model))
    with torch.no_grad():
        model.vae.quant_conv.bias[0] += 1
    try:
        assert LatentStore(tmp_path, model).load(pictures[0].digest, sample) is None
    finally:
        with torch.no_grad():
            model.vae.quant_conv.bias[0] -= 1

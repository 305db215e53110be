"""Hypernetworks, null texts and aesthetic gradients: each learns what it should, and its file means what it says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdops.core.source import read
from sdops.formats import open_source, open_tree
from sdops.training.config import read as settings
from sdops.training.product import Product
from sdops.verbs._embed_open import open_embeddings
from sdops.verbs._hypernet_chain import check_evaluable, forward
from sdops.verbs._hypernet_open import open_network


def tensor_in(path, key):
    source = open_source(path)
    try:
        return torch.frombuffer(bytearray(read(source, key)), dtype=torch.float32).reshape(source.specs[key].shape)
    finally:
        source.close()


def test_a_hypernetwork_lowers_the_loss_with_fixed_noise(train, tmp_path):
    """By 6 % within 20 steps; measured: 9.3 %."""
    report = train("hypernetwork", steps=20, batch=2, lr=3e-3, validation=4)
    before, after = report.data["losses"]["0"], report.data["losses"]["20"]
    assert after < 0.94 * before
    found = open_network(tmp_path / "out.pt")
    assert found.network.layout == "a1111"
    assert list(found.network.pairs) == [32, 64]
    assert found.network.settings["step"] == 20
    assert found.network.settings["sd_checkpoint_name"] == "model"
    found.source.close()


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_the_file_of_a_hypernetwork_computes_what_was_trained(tiny, train, tmp_path, monkeypatch, ending):
    from sdops.trainers import hypernetwork

    seen: list[tuple[hypernetwork.Method, Product]] = []
    plain = hypernetwork.Method.product

    def product(self, values):
        seen.append((self, plain(self, values)))
        return seen[-1][1]

    monkeypatch.setattr(hypernetwork.Method, "product", product)
    built = {"layer_structure": "1, 1.5, 2, 1", "activation": "swish", "layer_norm": True, "dropout": 0.2}
    path = tmp_path / f"own{ending}"
    train("hypernetwork", steps=1, validate_every=0, lr=1e-2, widths="32", **built, weight_init="KaimingUniform",
          output=str(path))  # fmt: skip
    file = open_network(path)
    check_evaluable(file)
    method, made = seen[0]
    x = torch.randn(5, 32)
    for which, parts in zip("kv", made.network.pairs[32], strict=True):
        with torch.no_grad():
            wanted = method._chain(parts, x)
        assert torch.allclose(forward(file.network, file.values(32, which))(x), wanted, atol=1e-6)
    file.source.close()


@pytest.fixture(scope="module")
def one(circles, tmp_path_factory):
    """A folder with one picture and its prompt."""
    folder = tmp_path_factory.mktemp("one")
    for ending in (".png", ".txt"):
        shutil.copy(circles / f"yellow_circle_0{ending}", folder)
    return folder


def test_null_texts_lead_back_to_the_picture(train, tiny, one, tmp_path):
    """Their error is less than a fifth of that of plain guidance (measured: 13 %), and diffusers' DDIM has the same."""
    report = train("null-text", images=str(one), steps=100, inner_steps=10)
    before, after = report.data["losses"]["0"], report.data["losses"]["100"]
    assert after < 0.2 * before
    assert report.data["psnr"] > report.data["psnr_without_texts"] + 3
    path = tmp_path / "out.safetensors"
    found = open_embeddings(path)
    assert found.embeddings[0].kind == "null-text"
    source = open_source(path)
    facts = dict(source.metadata)
    source.close()
    assert (facts["prompt"], facts["guidance"]) == ("a photo of a yellow circle", "7.5")
    texts, noise = tensor_in(path, "null_text"), tensor_in(path, "x_T")
    error = float((sampled(tiny, facts, texts, noise) - picture_in(tiny, one)).square().mean())
    assert error == pytest.approx(after, rel=1e-3)


def model_of(tiny):
    from sdops.verbs._train_model import build
    from sdops.verbs._train_origin import open_origin

    config = settings("lora", None, {"model": str(tiny)})
    return build(open_origin(config), config)


def picture_in(tiny, one):
    with Image.open(next(one.glob("*.png"))) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1
    return model_of(tiny).encode(pixels[None])[0]


@torch.no_grad()
def sampled(tiny, facts, texts, noise):
    """By diffusers' scheduler, with the settings of the paper's program."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
    )
    scheduler.set_timesteps(len(texts))
    assert ",".join(str(int(step)) for step in scheduler.timesteps) == facts["timesteps"]
    model = model_of(tiny)
    from sdops.training.tokens import VOCABULARY, Tokens

    prompt, _ = model.text({"clip_l": torch.tensor(Tokens({}, VOCABULARY).rows([facts["prompt"]], 49407))})
    x = noise
    for step, text in zip(scheduler.timesteps, texts, strict=True):
        both = model.unet(torch.cat([x, x]), step, encoder_hidden_states=torch.cat([text[None], prompt])).sample
        guided = both[:1] + float(facts["guidance"]) * (both[1:] - both[:1])
        x = scheduler.step(guided, step, x).prev_sample
    return x


def test_null_text_inversion_goes_on_where_it_stopped(train, one, tmp_path):
    given = {"images": str(one), "steps": 8, "inner_steps": 2, "validate_every": 0}
    train("null-text", **given, output=str(tmp_path / "whole.safetensors"))
    train("null-text", **given, until=3)
    train("null-text", **given, resume=True)
    whole, joined = (tensor_in(tmp_path / f"{name}.safetensors", "null_text") for name in ("whole", "out"))
    assert torch.equal(whole, joined)
    train("null-text", **given, output=str(tmp_path / "list.pt"))
    tree, source = open_tree(tmp_path / "list.pt")  # as google/prompt-to-prompt keeps it
    source.close()
    assert [leaf.spec.shape for leaf in tree] == [(1, 77, 32)] * 4


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP with random weights whose text encoder is built as the tiny model's."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    both = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "projection_dim": 16}
    text = {**both, "num_hidden_layers": 3, "eos_token_id": 49407}
    vision = {**both, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    return folder


def test_texts_come_nearer_to_the_pictures(train, circles, clip, tmp_path):
    """The cosine rises by more than 0.1 in 5 steps; the vector is transformers' own mean of the pictures."""
    given = {"steps": 5, "batch": 2, "lr": 1e-3, "validate_every": 5, "validation": 2, "image_encoder": str(clip)}
    report = train("aesthetic", **given, output=str(tmp_path / "look.pt"))
    before, after = report.data["losses"]["0"], report.data["losses"]["5"]
    assert after < before - 0.1
    assert [Path(name).name for name in report.data["outputs"]] == ["look.pt", "look-text.safetensors"]
    assert np.allclose(torch.load(tmp_path / "look.pt").numpy().reshape(-1), mean_of(circles, clip), atol=1e-5)
    alone = train("aesthetic", **{**given, "steps": 0}, output=str(tmp_path / "alone.safetensors"))
    assert [Path(name).name for name in alone.data["outputs"]] == ["alone.safetensors"]
    assert open_embeddings(tmp_path / "alone.safetensors").embeddings[0].kind == "clip-image"


def mean_of(circles, clip):
    from transformers import CLIPModel
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    mean, deviation = torch.tensor(OPENAI_CLIP_MEAN), torch.tensor(OPENAI_CLIP_STD)
    pictures = [np.array(Image.open(path)) for path in sorted(circles.glob("*.png"))]
    pixels = (torch.from_numpy(np.stack(pictures)).float() / 255 - mean) / deviation
    model = CLIPModel.from_pretrained(clip).eval()
    with torch.no_grad():
        seen = model.visual_projection(model.vision_model(pixels.permute(0, 3, 1, 2)).pooler_output)
    return seen.mean(0).numpy()


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("null-text", {}, "is for one picture"),
        ("hypernetwork", {"widths": "768"}, "no attention of the model has a context of 768"),
        ("hypernetwork", {"layer_structure": "1, 2"}, "`layer_structure` is `1, 2`"),
        ("hypernetwork", {"to": "kohya"}, "no layout `kohya` of hypernetworks"),
        ("aesthetic", {}, "the CLIP that looks at the pictures is not named"),
        ("aesthetic", {"image_encoder": "nowhere"}, "`nowhere` has no `config.json`"),
    ],
)
def test_what_a_method_cannot_use_is_refused_before_training(train, method, given, message):
    from sdops.errors import UsageError

    with pytest.raises(UsageError, match=message):
        train(method, **given, dry_run=True)


def test_another_clip_is_refused(train, clip, tmp_path):
    from sdops.errors import MismatchError

    shutil.copytree(clip, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 2
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(MismatchError, match=r"has 2 \(num_hidden_layers\), the model's 3"):
        train("aesthetic", steps=1, image_encoder=str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("ti", {"tokens": ("it",), "template": "an {}", "caption": "template", "to": "clip_image"}, "no CLIP image"),
        ("hypernetwork", {"activation": "relu", "to": "novelai"}, "hold two linear layers"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused_before_the_first_step(train, tmp_path, method, given, message):
    from sdops.errors import MismatchError

    ending = ".pt" if method == "hypernetwork" else ".safetensors"
    with pytest.raises(MismatchError, match=message):
        train(method, **given, output=str(tmp_path / f"out{ending}"))
    assert not (tmp_path / "out.jsonl").exists()

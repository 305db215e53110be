"""The closed-form merge of custom diffusion, against its own text encoder and concepts' own models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sdops
from sdops.errors import MismatchError, UsageError
from sdops.formats import open_source
from sdops.verbs._captions import captions
from sdops.verbs._clip_text import encoders, features, text_of
from sdops.verbs._custom_open import open_concepts
from sdops.verbs._inputs import open_model
from tests import examples, tiny
from tests.custom_diffusion import files

custom = sdops.custom
WIDTH, LAYERS, INNER = 768, 12, 8
RANK = 16  # of the concepts' changes: more than there are tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """An SD1 with the layers that the files change and a whole, though shallow, text encoder."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, spread: float = 0.05) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * spread).half()

    state = {key: torch.zeros(shape).half() for key, shape in tiny.shapes(clip=False, vae=False).items()}
    state |= {f"{tiny.UNET}{layer}.weight": weight for layer, weight in files.weights().items()}
    clip = tiny.CLIP
    state[f"{clip}embeddings.token_embedding.weight"] = random(49408, WIDTH, spread=0.0137)
    state[f"{clip}embeddings.position_embedding.weight"] = random(77, WIDTH, spread=0.005)
    for number in range(LAYERS):
        layer = f"{clip}encoder.layers.{number}."
        for part in ("q", "k", "v", "out"):
            state[f"{layer}self_attn.{part}_proj.weight"] = random(WIDTH, WIDTH)
            state[f"{layer}self_attn.{part}_proj.bias"] = random(WIDTH)
        for norm in ("layer_norm1", "layer_norm2"):
            state |= {f"{layer}{norm}.weight": torch.ones(WIDTH).half(), f"{layer}{norm}.bias": random(WIDTH)}
        state |= {f"{layer}mlp.fc1.weight": random(INNER, WIDTH), f"{layer}mlp.fc1.bias": random(INNER)}
        state |= {f"{layer}mlp.fc2.weight": random(WIDTH, INNER), f"{layer}mlp.fc2.bias": random(WIDTH)}
    state |= {f"{clip}final_layer_norm.weight": torch.ones(WIDTH).half(), f"{clip}final_layer_norm.bias": random(WIDTH)}
    path = tmp_path_factory.mktemp("model") / "sd1.safetensors"
    save_file(state, path)
    return path


@pytest.fixture(scope="module")
def merged(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge")
    (folder / "b").mkdir()
    cat, chair = files.adobe(folder, rank=RANK), files.compressed(folder / "b", seed=2, rank=RANK)
    (folder / "captions.txt").write_text("\n".join(captions(60)))
    options = {"model": model, "classes": ["cat", "chair"], "captions_file": folder / "captions.txt"}
    report = custom.merge(cat, chair, **options, output=folder / "both.safetensors")
    return report, (cat, chair), folder / "both.safetensors"


def layer_changes(path: Path) -> dict[str, torch.Tensor]:
    state = load_file(path)
    found = {}
    for layer in files.LAYERS:
        stem = next(s for s in ("lora_unet_" + files.diffusers(layer).replace(".", "_"),) if f"{s}.alpha" in state)
        up, down = (state[f"{stem}.lora_{side}.weight"].double() for side in ("up", "down"))
        found[layer] = up @ down * float(state[f"{stem}.alpha"]) / len(down)
    return found


def test_words_work_as_in_their_own_models(merged, model):
    report, (cat, chair), path = merged
    assert report.data["words"] == ["<new1>", "<new2>"]
    assert "`<new2>` now" in report.warnings[0]
    known = {}
    for word, file in (("<new1>", cat), ("<new2>", chair)):
        rows = open_concepts(file).words["<new1>"]["clip_l"].values
        known[word] = [{"clip_l": torch.from_numpy(row)} for row in rows]
    texts = [("<new1> cat", 1, files.deltas(1, RANK)), ("photo of a <new2> chair", 4, files.deltas(2, RANK))]
    encoder = encoders(open_model(model))
    made = layer_changes(path)
    for caption, start, deltas in texts:
        rows = features(encoder, [text_of(caption, known)])[0][start:].double()
        assert len(rows) == 3  # word, class, end
        for layer in files.LAYERS:
            wanted = rows @ deltas[layer].double().T
            assert torch.linalg.norm(rows @ made[layer].T - wanted) <= 1e-4 * torch.linalg.norm(wanted)


def test_the_rank_is_the_number_of_target_tokens(merged):
    report, _, path = merged
    assert report.data["rank"] == 12  # two words, two texts each, three tokens
    for change in layer_changes(path).values():
        values = torch.linalg.svdvals(change)
        assert int((values > 1e-6 * values[0]).sum()) == 12
    assert report.data["missed"] < 1e-9


def test_other_texts_move_little(merged, model):
    report, _, path = merged
    own = [text_of(caption, {}) for caption in ("a photo of a red car at night", "oil painting of a river")]
    rows = torch.cat([row[1:] for row in features(encoders(open_model(model)), own)]).double()
    weights, made = files.weights(), layer_changes(path)
    moved = sum(float((rows @ made[layer].T).square().sum()) for layer in files.LAYERS)
    whole = sum(float((rows @ weights[layer].double().T).square().sum()) for layer in files.LAYERS)
    joined = sum(
        float((rows @ (files.deltas(1, RANK)[layer] + files.deltas(2, RANK)[layer]).double().T).square().sum())
        for layer in files.LAYERS
    )
    assert moved < 0.5 * joined  # less than with both changes added up
    assert report.data["moved"] == pytest.approx((moved / whole) ** 0.5, rel=3)


def test_words_lie_in_the_file(merged):
    _, _, path = merged
    found = {one.name for one in sdops.embed.inspect(path).data["files"][0]["embeddings"] and _embeddings(path)}
    assert found == {"<new1>", "<new2>"}


def _embeddings(path):
    from sdops.verbs._embed_open import open_embeddings

    return open_embeddings(path).embeddings


def test_the_web_uis_form_holds_the_same(merged, model, tmp_path):
    _, paths, path = merged
    (tmp_path / "captions.txt").write_text("\n".join(captions(60)))
    options = {"model": model, "classes": ["cat", "chair"], "captions_file": tmp_path / "captions.txt"}
    custom.merge(*paths, **options, output=tmp_path / "w.delta.safetensors", to="webui")
    found = open_concepts(tmp_path / "w.delta.safetensors")
    assert found.layout == "webui"
    made = layer_changes(path)
    for edit in found.concepts.edits:
        u, v = found.values(edit)
        expected = made[found.target(edit).module].numpy()
        assert np.linalg.norm(u @ v - expected) <= 1e-5 * np.linalg.norm(expected)


def test_what_cannot_be_merged_is_refused(model, tmp_path):
    path = files.adobe(tmp_path)
    with pytest.raises(UsageError, match="3 classes"):
        custom.merge(path, model=model, classes=["a", "b", "c"], output=tmp_path / "x.safetensors")
    (tmp_path / "d").mkdir()
    without = files.diffusers_safetensors(tmp_path / "d")
    (tmp_path / "d" / "<new1>.safetensors").unlink()
    with pytest.raises(MismatchError, match="has no words"):
        custom.merge(without, model=model, output=tmp_path / "x.safetensors")
    state = {key: value for key, value in load_file(model).items() if key.startswith(tiny.UNET)}
    save_file(state, tmp_path / "unet.safetensors")
    with pytest.raises(MismatchError, match="no text encoder"):
        custom.merge(path, model=tmp_path / "unet.safetensors", output=tmp_path / "x.safetensors")
    assert open_source(path)


def test_words_of_another_width_than_the_models_are_refused(model, tmp_path):
    """As when its text encoder is another model's."""
    path = files.adobe(tmp_path)
    state = load_file(model)
    table = f"{tiny.CLIP}embeddings.token_embedding.weight"
    narrow = state | {table: state[table][:, :24].contiguous()}
    save_file(narrow, tmp_path / "narrow.safetensors")
    with pytest.raises(MismatchError, match="are 24 numbers wide, not 768"):
        custom.merge(path, model=tmp_path / "narrow.safetensors", output=tmp_path / "x.safetensors")
    torch.save({"<new1>": torch.zeros(1024)}, tmp_path / "word.bin")
    with pytest.raises(MismatchError, match=r"`<new1>` of .* no vectors for clip_l"):
        custom.merge(path, model=model, words=[tmp_path / "word.bin"], output=tmp_path / "x.safetensors")
    delta = torch.load(path, weights_only=True)
    torch.save(delta | {"modifier_token": {"<new1>": torch.zeros(24)}}, path)
    with pytest.raises(MismatchError, match=r"`<new1>` of .* has 24 numbers for clip_l, the words of the model 768"):
        custom.merge(path, model=model, output=tmp_path / "x.safetensors")


def test_the_examples_of_the_documentation_run(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sdops.verbs._custom_merge.CAPTIONS", 30)
    files.adobe(tmp_path)
    (tmp_path / "sd15.safetensors").symlink_to(model)
    assert examples.run(custom)[-1].data["rank"] == 6

"""Inspecting, making, explaining and merging embeddings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sdops
from sdops.embeddings._types import Embedding, Vectors
from sdops.errors import MismatchError, SdopsError, UsageError
from sdops.pipelines.clip_words import clip_words
from sdops.verbs._embed_facts import checksum
from sdops.verbs._embed_open import open_embeddings
from sdops.verbs._embed_vocabulary import Table, Vocabulary
from tests import examples
from tests.embeddings import files

embed = sdops.embed
ROWS = 6000  # of the vocabulary: enough for common words
KEY = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"


@pytest.fixture(scope="module")
def table():
    return torch.randn(ROWS, 768, generator=torch.Generator().manual_seed(1)) * 0.0141


@pytest.fixture(scope="module")
def model(table, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_file({KEY: table}, path)
    return path


def word(table: torch.Tensor, text: str) -> np.ndarray:
    return table[clip_words().numbers(text)].double().numpy()


def made(formula: str, folder, model=None, name: str = "made.pt") -> np.ndarray:
    embed.make(formula, output=folder / name, model=model, force=True)
    return open_embeddings(folder / name).embeddings[0].vectors["clip_l"].values


def test_make_refuses_vectors_of_different_widths(model, tmp_path):
    made("cat", tmp_path, model, "cat.pt")
    save_file({"clip_l": torch.zeros(1, 24), "clip_g": torch.zeros(1, 1280)}, tmp_path / "narrow.safetensors")
    file, narrow = (f"'{tmp_path / name}'" for name in ("cat.pt", "narrow.safetensors"))
    for formula, base, other in (
        (f"{narrow} + cat", model, "model.safetensors"),
        (f"{narrow} + {file}", None, "cat.pt"),
    ):
        with pytest.raises(MismatchError, match=rf"24 in `.*narrow.safetensors`, 768 in `.*{other}`"):
            embed.make(formula, output=tmp_path / "x.pt", model=base)
    assert not (tmp_path / "x.pt").exists()


def test_make_adds_words(model, table, tmp_path):
    found = made("0.7*painting + 0.3*ink - photo", tmp_path, model)
    expected = 0.7 * word(table, "painting") + 0.3 * word(table, "ink") - word(table, "photo")
    np.testing.assert_allclose(found, expected.astype(np.float32), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("formula", "plain"),
    [
        ("(cat + dog) / 2", "mean(cat, dog)"),
        ("concat(cat, dog)", "'cat dog'"),
        ("'cat dog'[1]", "dog"),
        ("'cat dog'[1,0]", "'dog cat'"),
        ("'cat dog photo'[0:2]", "'cat dog'"),
        ("'cat dog'[-1]", "dog"),
        ("sum('cat dog')", "cat + dog"),
        ("- -cat", "cat"),
        ("2*3*cat", "6 * cat"),
        ("#2368", "cat"),
        ("slerp(cat, dog, 0)", "cat"),
        ("slerp(cat, dog, 1)", "dog"),
        ("pad(cat, 2)[0]", "cat"),
        ("repeat(cat, 2)", "'cat cat'"),
        ("prune('cat dog cat')", "'cat dog'"),
        ("norm(cat, 2)", "norm(5*cat, 2)"),
    ],
)
def test_formulas_mean_the_same(formula, plain, model, tmp_path):
    np.testing.assert_allclose(made(formula, tmp_path, model), made(plain, tmp_path, model), rtol=1e-5, atol=1e-8)


def test_functions_do_what_they_say(model, table, tmp_path):
    assert np.linalg.norm(made("norm(cat, 0.5)", tmp_path, model)) == pytest.approx(0.5)
    away = made("ortho(cat, dog)", tmp_path, model)
    assert abs(float(away[0] @ word(table, "dog")[0])) < 1e-7
    assert not made("pad(cat, 3)", tmp_path, model)[1:].any()


def test_formulas_of_files_need_no_model(tmp_path):
    path, values = files.a1111(tmp_path)
    found = made(f"0.5 * '{path}'[0:2]", tmp_path)
    np.testing.assert_allclose(found, 0.5 * values["inner"]["clip_l"][:2], rtol=1e-6)


@pytest.mark.parametrize(
    ("formula", "error"),
    [
        ("painting +", "does not make sense"),
        ("painting & ink", "means nothing"),
        ("cat * dog", "cannot be multiplied"),
        ("0.7", "neither words nor files"),
        ("cat + 1", "where vectors are needed"),
        ("cat / 0", "divides by 0"),
        ("cat[5]", "to choose from"),
        ("slrep(cat, dog, 1)", "there is no function"),
        ("slerp(cat, dog)", "takes 3 values"),
        ("#99999", "the model has no word"),
        ("'cat dog' + cat", "cannot be added one by one"),
        ("(" * 100 + "cat" + ")" * 100, "nested too deeply"),
        ("__import__('os')", "no function"),
    ],
)
def test_bad_formulas_are_explained(formula, error, model, tmp_path):
    with pytest.raises(SdopsError, match=error):
        embed.make(formula, output=tmp_path / "x.pt", model=model)
    assert not (tmp_path / "x.pt").exists()


def test_words_need_a_model(tmp_path):
    with pytest.raises(UsageError, match="whose vectors a model gives"):
        embed.make("cat", output=tmp_path / "x.pt")


EIGHT = "0.9*painting - photo + 0.7*house - 0.6*river + 0.5*cat - 0.4*dog + 0.3*ink + 0.2*music"


@pytest.mark.parametrize("formula", ["0.7*painting + 0.3*ink - photo", "cat", "concat(0.5*cat - dog, music)", EIGHT])
def test_explain_undoes_make(formula, model, tmp_path):
    before = made(formula, tmp_path, model)
    explained = embed.explain(tmp_path / "made.pt", model=model).data["embeddings"][0]["encoders"]["clip_l"]
    assert all(row["exact"] for row in explained["vectors"])
    again = made(explained["formula"], tmp_path, model, "again.pt")
    np.testing.assert_allclose(again, before, rtol=0, atol=1e-6)


def test_words_of_another_width_are_refused():
    narrow = Vocabulary("narrow.safetensors", {"clip_l": Table(np.zeros((10, 64), np.float32), None)})
    with pytest.raises(MismatchError, match=r"clip_l have 64 numbers in `narrow.safetensors`, 768 in the embedding"):
        narrow.table("clip_l", 768)


def test_explain_says_nothing_of_noise(model, tmp_path):
    torch.save({"emb_params": files.rows(2, 768, 9)}, tmp_path / "noise.pt")
    found = embed.explain(tmp_path / "noise.pt", model=model).data["embeddings"][0]["encoders"]["clip_l"]
    assert found["formula"] == ""
    assert [row["terms"] for row in found["vectors"]] == [[], []]


def test_explain_finds_what_an_embedding_was_merged_from(model, tmp_path):
    first, second = (files.rows(2, 768, seed) for seed in (3, 4))
    for name, rows in (("first", first), ("second", second)):
        torch.save({"emb_params": rows}, tmp_path / f"{name}.pt")
    (tmp_path / "notes.pt").write_text("no embedding")
    mixed = (0.6 * first[1] - 0.3 * second[0])[None]
    torch.save({"emb_params": mixed}, tmp_path / "mixed.pt")
    report = embed.explain(tmp_path / "mixed.pt", model=model, atoms_from=[tmp_path])
    (row,) = report.data["embeddings"][0]["encoders"]["clip_l"]["vectors"]
    assert row["exact"]
    assert [term["word"] for term in row["terms"]] == [f"'{tmp_path}/first.pt'[1]", f"'{tmp_path}/second.pt'[0]"]
    assert [term["coefficient"] for term in row["terms"]] == pytest.approx([0.6, -0.3], abs=1e-5)
    np.testing.assert_allclose(made(row["formula"], tmp_path, model, "again.pt"), mixed.numpy(), rtol=0, atol=1e-6)


def test_inspect_names_the_nearest_words(model, tmp_path):
    made("0.9*painting", tmp_path, model)
    facts = embed.inspect(tmp_path / "made.pt", model=model, near=2).data["files"][0]["embeddings"][0]
    (row,) = facts["rows"]["clip_l"]["each"]
    assert row["cosine"][0]["word"] == row["distance"][0]["word"] == "painting"
    assert row["cosine"][0]["cosine"] == pytest.approx(1, abs=1e-5)
    assert row["distance"][0]["distance"] == pytest.approx(row["norm"] / 9, rel=1e-2)


def test_inspect_tells_what_is_odd(tmp_path):
    base = files.rows(1, 768)
    odd = torch.cat([base, base * 1.01, -base, torch.zeros(1, 768), base.flip(1) * 30])
    torch.save({"emb_params": odd}, tmp_path / "odd.pt")
    (facts,) = embed.inspect(tmp_path / "odd.pt").data["files"][0]["embeddings"]
    text = "\n".join(facts["health"])
    assert "vector 3 is empty" in text
    assert "vectors 0 and 1 are nearly the same" in text
    assert "0 and 2; 1 and 2 are each other's negative" in text
    assert "vector 4 is 2" in text
    assert "as long as a word's vector" in text


@pytest.mark.parametrize(
    ("writer", "family"),
    [(files.a1111, "sd1"), (files.a1111_legacy, "sd2"), (files.sdxl, "sdxl"), (files.hcp, "sdxl"), (files.sd3, "sd3"),
     (files.flux, "flux1"), (files.bare_t5, "T5"), (files.clip_image, "CLIP ViT-L/14")],
)  # fmt: skip
def test_inspect_names_the_family_however_a_file_is_ordered(writer, family, tmp_path):
    facts = embed.inspect(writer(tmp_path)[0]).data["files"][0]
    assert {one["family"] for one in facts["embeddings"]} == {family}


def test_null_texts_are_shown_as_large_as_they_are(tmp_path):
    assert "clip_l 3 x 77 x 768 F32" in str(embed.inspect(files.null_text_list(tmp_path)[0]))


def test_inspect_finds_relations(tmp_path):
    base = files.rows(3, 768)
    for name, tensor in {"a": base, "b": -base, "c": files.rows(3, 768, 7)}.items():
        torch.save({"emb_params": tensor}, tmp_path / f"{name}.pt")
    report = embed.inspect(*(tmp_path / f"{name}.pt" for name in "abc"))
    assert report.data["relations"] == ["`b.pt` is the negative of `a.pt`"]
    cosines = {(a, b): value for a, b, value in report.data["similarity"]}
    assert cosines["a.pt", "b.pt"] == pytest.approx(-1)
    assert abs(cosines["a.pt", "c.pt"]) < 0.2


def test_numbers_that_are_none_are_told(tmp_path):
    torch.save({"emb_params": torch.full((1, 768), float("nan"))}, tmp_path / "n.pt")
    (facts,) = embed.inspect(tmp_path / "n.pt").data["files"][0]["embeddings"]
    assert "768 numbers are NaN or infinite" in facts["health"][0]
    assert facts["checksum"] is None


def test_the_checksum_is_that_of_the_web_ui():
    def reference(tensor: torch.Tensor) -> str:
        result = 0
        for value in tensor.reshape(-1) * 100:
            result = ((result * 281) ^ (int(value) * 997)) & 0xFFFFFFFF
        return f"{result & 0xFFFF:04x}"

    rows = files.rows(4, 768) * 20
    assert checksum(Embedding("x", {"clip_l": Vectors(rows.numpy())})) == reference(rows)


def test_merge_joins_averages_and_prunes(tmp_path):
    a, b = files.rows(2, 768, 1), files.rows(2, 768, 2)
    torch.save({"emb_params": a}, tmp_path / "a.pt")
    torch.save({"emb_params": b}, tmp_path / "b.pt")

    def merged(*names: str, **options) -> np.ndarray:
        embed.merge(*(tmp_path / f"{name}.pt" for name in names), output=tmp_path / "m.pt", force=True, **options)
        return open_embeddings(tmp_path / "m.pt").embeddings[0].vectors["clip_l"].values

    np.testing.assert_array_equal(merged("a", "b"), torch.cat([a, b]).numpy())
    np.testing.assert_array_equal(merged("a", "b", rows=[3, 0]), torch.stack([b[1], a[0]]).numpy())
    np.testing.assert_array_equal(merged("a", "b", "a", prune=0.95), torch.cat([a, b]).numpy())
    np.testing.assert_allclose(
        merged("a", "b", mode="average", weights=[3, 1]), (0.75 * a + 0.25 * b).numpy(), rtol=1e-5, atol=1e-8
    )
    np.testing.assert_allclose(merged("a", "b", mode="sum"), (a + b).numpy(), rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(merged("a", "b", mode="slerp", weights=[0.0]), a.numpy(), rtol=1e-5, atol=1e-8)


def test_merge_collects_embeddings_in_one_file(tmp_path):
    a, _ = files.a1111(tmp_path)
    b, _ = files.kohya_pt(tmp_path)
    for layout in ("diffusers", "bundle"):
        path = tmp_path / f"{layout}.safetensors"
        embed.merge(a, b, output=path, mode="collect", to=layout)
        assert [one.name for one in open_embeddings(path).embeddings] == ["inner", "last"]


def test_merge_refuses_other_families(tmp_path):
    with pytest.raises(MismatchError, match="is for"):
        embed.merge(files.a1111(tmp_path)[0], files.sdxl(tmp_path)[0], output=tmp_path / "m.pt")


def test_outputs_are_not_overwritten(tmp_path):
    path, _ = files.a1111(tmp_path)
    with pytest.raises(SdopsError, match="is the input"):
        embed.merge(path, output=path, force=True)
    with pytest.raises(SdopsError, match="exists already"):
        embed.merge(path, output=files.kohya_pt(tmp_path)[0])


def test_an_embedding_goes_into_a_lora(tmp_path):
    lora, values = files.bundle(tmp_path)
    path, mine = files.a1111(tmp_path)
    embed.convert(path, to="bundle", lora=lora, output=tmp_path / "both.safetensors")
    found = open_embeddings(tmp_path / "both.safetensors").embeddings
    assert {one.name for one in found} == {*values, "inner"}
    both, before = load_file(tmp_path / "both.safetensors"), load_file(lora)
    assert all(torch.equal(both[key], tensor) for key, tensor in before.items())
    assert np.array_equal(both["bundle_emb.inner.clip_l"].numpy(), mine["inner"]["clip_l"])
    with pytest.raises(MismatchError, match="is no LoRA"):
        embed.convert(path, to="bundle", lora=files.sdxl(tmp_path)[0], output=tmp_path / "no.safetensors")


def test_the_examples_of_the_documentation_run(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files.a1111(tmp_path)
    torch.save({"emb_params": files.rows(2, 768, 5)}, "other.pt")
    (tmp_path / "sd15.safetensors").symlink_to(model)
    found = examples.run(sdops.embed)
    assert "painting" in str(found[3])
    assert open_embeddings("both.pt").embeddings[0].rows == 4


def test_converting_several_words_tells_what_diffusers_loads(tmp_path):
    save_file({"<a>": torch.randn(768), "<b>": torch.randn(768)}, tmp_path / "two.safetensors")
    both = embed.convert(tmp_path / "two.safetensors", to="diffusers", output=tmp_path / "both.bin")
    assert any("--only NAME" in hint for hint in both.hints)
    one = embed.convert(tmp_path / "two.safetensors", to="diffusers", output=tmp_path / "a.bin", only="<a>")
    assert not one.hints

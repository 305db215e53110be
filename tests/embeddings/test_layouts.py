"""Every layout of embeddings: found by structure, read to the bit, written so that its own program reads it."""

from __future__ import annotations

import os
import pickle
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import sdops.embeddings as shelf
from sdops.embeddings._types import AMBIGUOUS, CLIP_IMAGE, Embedding
from sdops.errors import FormatError, MismatchError, SdopsError, UsageError
from sdops.verbs._embed_open import open_embeddings
from sdops.verbs.embed import convert
from tests.embeddings import files

NAMES = sorted(path.stem for path in Path(shelf.__file__).parent.glob("[!_]*.py"))
REAL = Path(__file__).parents[3] / "shared" / "data"


def test_every_file_of_the_shelf_is_listed_and_documented():
    assert set(NAMES) == {*shelf.ORDER, *shelf.WRITABLE}
    for name in NAMES:
        module = import_module(f"sdops.embeddings.{name}")
        assert module.__doc__
        assert callable(module.sniff)
        assert callable(module.read)
        assert hasattr(module, "write") == (name in shelf.WRITABLE)
        if name in shelf.WRITABLE:
            assert set(module.ENDING) == set(module.CONTAINERS)


def test_every_layout_that_is_read_has_a_file():
    assert set(files.WRITERS.values()) == set(shelf.ORDER)


def check(path: Path, values: files.Values) -> list[Embedding]:
    found = open_embeddings(path).embeddings
    assert {one.name for one in found} == set(values)
    for one in found:
        assert set(one.vectors) == set(values[one.name])
        for encoder, expected in values[one.name].items():
            np.testing.assert_array_equal(one.vectors[encoder].values, expected)
    return found


@pytest.mark.parametrize(("writer", "layout"), files.WRITERS.items(), ids=lambda item: getattr(item, "__name__", item))
def test_reads_what_the_original_programs_write(writer, layout, tmp_path):
    path, values = writer(tmp_path)
    check(path, values)
    assert open_embeddings(path).layout == layout


@pytest.mark.parametrize("writer", files.WRITERS, ids=lambda writer: writer.__name__)
def test_the_name_of_a_file_proves_nothing(writer, tmp_path):
    path, values = writer(tmp_path)
    if writer is files.diffusers_sdxl:
        pytest.skip("a pair is found by its names")
    other = path.with_name("Lora.v2.bin")
    path.rename(other)
    found = open_embeddings(other).embeddings
    arrays = [part.values for one in found for part in one.vectors.values()]
    expected = [part for parts in values.values() for part in parts.values()]
    assert sorted(array.tobytes() for array in arrays) == sorted(array.tobytes() for array in expected)


FOR_ONE = ("a1111", "rinongal", "diffusers", "kohya", "encoders", "onetrainer", "bundle", "bare", "png")
FOR_BOTH = ("hcp", "diffusers_sdxl", "encoders", "cog", "bundle", "png")


def values_of(one: Embedding) -> dict[str, np.ndarray]:
    return {name: part.values for name, part in one.vectors.items()}


@pytest.mark.parametrize("target", FOR_ONE)
@pytest.mark.parametrize("start", FOR_ONE)
def test_any_way_round_for_one_encoder(start, target, tmp_path):
    round_trip(files.a1111(tmp_path)[0], (start, target), tmp_path)


@pytest.mark.parametrize("target", FOR_BOTH)
@pytest.mark.parametrize("start", FOR_BOTH)
def test_any_way_round_for_both_encoders_of_sdxl(start, target, tmp_path):
    round_trip(files.sdxl(tmp_path)[0], (start, target), tmp_path)


def round_trip(path: Path, layouts: tuple[str, ...], folder: Path) -> None:
    expected = values_of(open_embeddings(path).embeddings[0])
    for number, layout in enumerate(layouts):
        (folder / str(number)).mkdir()
        report = convert(path, to=layout, output=folder / str(number), name="again")
        path = Path(report.data["outputs"][0])
        found = open_embeddings(path)
        assert found.layout == layout
        (one,) = found.embeddings
        assert set(one.vectors) == set(expected)
        for encoder, array in expected.items():
            assert one.vectors[encoder].values.tobytes() == array.tobytes()


@pytest.mark.parametrize(
    ("writer", "layout"),
    [
        (files.history_dict, "history"),
        (files.cloneofsimo, "cloneofsimo"),
        (files.bundle, "bundle"),
        (files.rinongal, "rinongal"),
        (files.diffusers_safetensors, "diffusers"),
        (files.diffusers_sdxl, "diffusers_sdxl"),
        (files.onetrainer, "onetrainer"),
        (files.sd3, "encoders"),
        (files.kohya_pt, "kohya"),
        (files.bare_t5, "bare"),
        (files.clip_image, "clip_image"),
        (files.null_text_list, "null_text_list"),
        (files.null_text_stack, "null_text"),
        (files.png_chunk, "png"),
    ],
    ids=lambda item: getattr(item, "__name__", item),
)
def test_each_layout_comes_back_from_itself(writer, layout, tmp_path):
    path, values = writer(tmp_path)
    (tmp_path / "out").mkdir()
    written = convert(path, to=layout, output=tmp_path / "out").data["outputs"]
    found = open_embeddings(written[0]).embeddings
    assert sorted(part.values.tobytes() for one in found for part in one.vectors.values()) == sorted(
        np.ascontiguousarray(part).tobytes() for parts in values.values() for part in parts.values()
    )


def test_null_texts_are_written_as_the_first_program_keeps_them(tmp_path):
    path, _ = files.null_text_list(tmp_path)
    output = convert(path, to="null-text", output=tmp_path / "n.safetensors").data["outputs"][0]
    back = convert(output, to="null-text-list", output=tmp_path / "back.pt").data["outputs"][0]
    first, second = (torch.load(each, weights_only=True) for each in (path, back))
    assert len(first) == len(second)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_an_embedding_for_sdxl_goes_into_the_pixels(tmp_path):
    pytest.importorskip("PIL.Image")
    path, values = files.sdxl(tmp_path)
    convert(path, to="png-pixels", output=tmp_path / "xl.png")
    check(tmp_path / "xl.png", values)


def test_many_words_become_one_token_each(tmp_path):
    path, _ = files.a1111(tmp_path)
    found = open_embeddings(convert(path, to="cloneofsimo", output=tmp_path / "c.safetensors").data["outputs"][0])
    assert [one.name for one in found.embeddings] == ["inner_0", "inner_1", "inner_2"]


def test_step_and_checkpoint_survive(tmp_path):
    path, _ = files.a1111(tmp_path)
    convert(path, to="png", output=tmp_path / "p.png")
    convert(tmp_path / "p.png", to="a1111", output=tmp_path / "q.pt")
    found = torch.load(tmp_path / "q.pt", weights_only=True)
    assert (found["step"], found["sd_checkpoint"], found["name"]) == (1234, "81761151", "inner")
    assert found["string_to_token"] == {"*": 265}
    assert torch.equal(found["string_to_param"]["*"], torch.load(path, weights_only=True)["string_to_param"]["*"])


@pytest.mark.parametrize("layout", ["a1111", "rinongal", "diffusers", "kohya", "bare"])
def test_torch_reads_what_is_written(layout, tmp_path):
    path, values = files.a1111(tmp_path)
    output = tmp_path / ("out.bin" if layout == "diffusers" else "out.pt")
    convert(path, to=layout, output=output)
    found = torch.load(output, weights_only=True)
    tensor = found if layout == "bare" else next(iter(found.get("string_to_param", found).values()))
    np.testing.assert_array_equal(tensor.numpy(), values["inner"]["clip_l"])


def test_dtypes_are_kept_or_rounded(tmp_path):
    path, values = files.kohya_safetensors(tmp_path)
    convert(path, to="kohya", output=tmp_path / "same.safetensors")
    assert load_file(tmp_path / "same.safetensors")["emb_params"].dtype == torch.bfloat16
    convert(path, to="kohya", output=tmp_path / "wide.safetensors", dtype="fp32")
    wide = load_file(tmp_path / "wide.safetensors")["emb_params"]
    np.testing.assert_array_equal(wide.numpy(), values["last"]["clip_l"])


def test_a_row_of_768_is_ambiguous_until_it_is_told(tmp_path):
    torch.save(files.rows(1, 768), tmp_path / "a.pt")
    assert open_embeddings(tmp_path / "a.pt").embeddings[0].kind == AMBIGUOUS
    with pytest.raises(MismatchError, match="the file does not say which"):
        convert(tmp_path / "a.pt", to="a1111")
    convert(tmp_path / "a.pt", to="a1111", kind="tokens", output=tmp_path / "b.pt")
    with pytest.raises(MismatchError, match="does not stand for words"):
        convert(tmp_path / "a.pt", to="a1111", kind="clip-image", output=tmp_path / "c.pt")
    convert(tmp_path / "a.pt", to="clip-image", kind="clip-image", output=tmp_path / "c.safetensors")
    assert open_embeddings(tmp_path / "c.safetensors").embeddings[0].kind == CLIP_IMAGE


def test_the_halves_of_a_pair_name_each_other(tmp_path):
    for name in ("X", "X-neg"):
        torch.save(files.a1111_dict(files.rows(3, 768), "X"), tmp_path / f"{name}.pt")
    assert "positive half of a pair with `X-neg.pt`" in open_embeddings(tmp_path / "X.pt").notes[0]
    assert "negative half of a pair with `X.pt`" in open_embeddings(tmp_path / "X-neg.pt").notes[0]


def test_the_halves_of_a_pair_are_converted_together(tmp_path):
    for number, name in enumerate(("X", "X-neg")):  # both are called X inside, as in real files
        torch.save(files.a1111_dict(files.rows(3, 768, number), "X"), tmp_path / f"{name}.pt")
    (tmp_path / "out").mkdir()
    for start in ("X.pt", "X-neg.pt"):
        written = convert(tmp_path / start, to="kohya", output=tmp_path / "out", force=True).data["outputs"]
        assert {Path(each).name for each in written} == {"X.safetensors", "X-neg.safetensors"}
    (one,) = open_embeddings(tmp_path / "out" / "X-neg.safetensors").embeddings
    np.testing.assert_array_equal(one.vectors["clip_l"].values, files.rows(3, 768, 1).numpy())
    convert(tmp_path / "X.pt", to="diffusers", output=tmp_path / "both.safetensors")
    assert {one.name for one in open_embeddings(tmp_path / "both.safetensors").embeddings} == {"X", "X-neg"}
    with pytest.raises(UsageError, match="half of a pair"):
        convert(tmp_path / "X.pt", to="kohya", output=tmp_path / "y.safetensors")
    convert(tmp_path / "X.pt", to="kohya", output=tmp_path / "y.safetensors", alone=True)


def test_added_words_are_called_as_the_tokenizer_beside_them_calls_them(tmp_path):
    (tmp_path / "text_encoder").mkdir()
    path, values = files.checkpoint(tmp_path / "text_encoder")
    assert {one.name for one in open_embeddings(path).embeddings} == set(values)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "added_tokens.json").write_text('{"<dog>": 49408, "<|endoftext|>": 49407}')
    assert [one.name for one in open_embeddings(path).embeddings] == ["<dog>", "added1"]
    (tmp_path / "tokenizer" / "tokenizer.json").write_text('{"added_tokens": [{"id": 49409, "content": "<cat>"}]}')
    assert [one.label for one in open_embeddings(path).embeddings] == ["<dog>", "<cat>"]


def test_the_word_may_stand_in_a_small_file_beside_the_vectors(tmp_path):
    path, _ = files.cog(tmp_path)
    (tmp_path / "special_params.json").write_text('{"TOK": "<s0><s1>"}')
    assert open_embeddings(path).embeddings[0].label == "TOK"
    (tmp_path / "concept").mkdir()
    path, _ = files.kohya_pt(tmp_path / "concept")
    (tmp_path / "concept" / "token_identifier.txt").write_text("<cat-toy>\n")
    assert open_embeddings(path).embeddings[0].label == "<cat-toy>"


def test_a_layout_refuses_what_it_cannot_hold(tmp_path):
    path, _ = files.sdxl(tmp_path)
    for layout in ("a1111", "kohya", "diffusers", "bare"):
        with pytest.raises(MismatchError):
            convert(path, to=layout, name=layout)


class Bomb:
    def __reduce__(self):
        return os.system, ("echo pwned > pwned",)


def test_nothing_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"string_to_param": {"*": files.rows(1, 768)}, "name": Bomb()}, tmp_path / "bad.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb()))
    for name in ("bad.pt", "plain.pt"):
        with pytest.raises(FormatError):
            open_embeddings(tmp_path / name)
    assert not (tmp_path / "pwned").exists()


def test_what_is_no_embedding_is_refused(tmp_path):
    torch.save({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4, 3, 3)}, tmp_path / "m.pt")
    torch.save([{"a": 1}], tmp_path / "n.pt")
    (tmp_path / "p.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for name in ("m.pt", "n.pt", "absent.pt"):
        with pytest.raises(SdopsError):
            open_embeddings(tmp_path / name)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real files are not here")
def test_real_files():
    (one,) = open_embeddings(REAL / "embeddings" / "fastai_learned_embeds.bin").embeddings
    assert (one.name, one.rows) == ("<birb-style>", 1)
    found = open_embeddings(REAL / "loras" / "cloneofsimo_lora_disney.safetensors")
    assert [one.name for one in found.embeddings] == ["<s1>", "<s2>"]
    assert open_embeddings(REAL / "loras" / "cloneofsimo_lora_kiriko2.ti.pt").embeddings[0].name == "<krk>"
    for path in (REAL / "aesthetic").glob("*.pt"):
        assert open_embeddings(path).embeddings[0].kind == AMBIGUOUS


def test_an_embedding_in_the_pixels(tmp_path):
    image = pytest.importorskip("PIL.Image")
    path, values = files.a1111(tmp_path)
    convert(path, to="png-pixels", output=tmp_path / "p.png")
    check(tmp_path / "p.png", values)
    with image.open(tmp_path / "p.png") as picture:
        framed = image.new("RGB", (picture.width + 7, picture.height + 9))  # a black border
        framed.paste(picture, (3, 4))
        framed.save(tmp_path / "q.webp", lossless=True, quality=0)
        image.new("RGB", (64, 64), (128, 128, 128)).save(tmp_path / "empty.png")
    check(tmp_path / "q.webp", values)
    with pytest.raises(FormatError):
        open_embeddings(tmp_path / "empty.png")


def test_without_pillow_the_message_says_how_to_get_it(tmp_path, monkeypatch):
    path, _ = files.a1111(tmp_path)
    convert(path, to="png-pixels", output=tmp_path / "p.png")
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(SdopsError, match="takes Pillow") as caught:
        open_embeddings(tmp_path / "p.png")
    assert caught.value.hint == "`pip install 'sdops[images]'`"
    check(*files.png_chunk(tmp_path))  # a text chunk needs none

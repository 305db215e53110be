"""Every layout of custom diffusion: found by structure, applied and turned into a LoRA with the same result."""

from __future__ import annotations

import json
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sdops
import sdops.custom_diffusion as shelf
from sdops.core.source import read
from sdops.errors import FormatError, MismatchError, OutputError, UsageError
from sdops.verbs._custom_open import open_concepts
from sdops.verbs._embed_open import open_embeddings
from tests import tiny
from tests.custom_diffusion import files

custom = sdops.custom
WRITERS = pytest.mark.parametrize("writer", files.WRITERS, ids=lambda writer: writer.__name__)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Enough of an SD1 to be recognised, with the layers that the files change."""
    found = tiny.checkpoint(dtype="F32", clip=False, vae=False)
    for layer, weight in files.weights().items():
        found[f"{tiny.UNET}{layer}.weight"] = ("F32", weight.numpy())
    for block in files.BLOCKS:
        found[f"{tiny.UNET}{block}.to_out.0.bias"] = ("F32", torch.zeros(320).numpy())
    return tiny.write(tmp_path_factory.mktemp("model") / "sd1.safetensors", found)


def test_every_file_of_the_shelf_is_listed_and_has_a_file():
    names = {path.stem for path in Path(shelf.__file__).parent.glob("[!_]*.py")}
    assert names == set(shelf.ORDER) == {layout for layout, _ in files.WRITERS.values()}
    for name in names:
        module = import_module(f"sdops.custom_diffusion.{name}")
        assert module.__doc__
        assert callable(module.sniff)
        assert callable(module.read)
        assert callable(module.write)
        assert module.LAYERS in ("canonical", "diffusers")


@WRITERS
def test_reads_what_the_original_programs_write(writer, tmp_path):
    found = open_concepts(writer(tmp_path))
    layout, kind = files.WRITERS[writer]
    assert (found.layout, found.family) == (layout, "sd1")
    assert {edit.kind for edit in found.concepts.edits if edit.parameter == "weight"} == {kind}
    assert found.concepts.unknown == ()
    for edit in found.concepts.edits:
        if edit.parameter == "weight":
            layer = found.target(edit).module
            expected = {"whole": files.tuned(), "delta": files.deltas(), "factors": files.deltas()}[kind][layer]
            values = found.values(edit)
            made = torch.from_numpy(values[0] @ values[1] if kind == "factors" else values[0])
            torch.testing.assert_close(made.float(), expected, rtol=1e-5, atol=1e-6)
    assert found.words
    for parts in found.words.values():
        assert parts["clip_l"].values.shape == (1, 768)


@WRITERS
def test_the_name_of_a_file_proves_nothing(writer, tmp_path):
    path = writer(tmp_path)
    (tmp_path / "other").mkdir()
    moved = path.rename(tmp_path / "other" / "EasyNegative.bin")
    assert open_concepts(moved).layout == files.WRITERS[writer][0]


@pytest.mark.parametrize("writer", [files.adobe, files.compvis])
def test_words_are_embeddings_too(writer, tmp_path):
    found = open_embeddings(writer(tmp_path))
    assert found.layout == "custom_diffusion"
    assert found.embeddings[0].label == "<new1>"


TARGETS = {"whole": ("adobe", "compvis", "diffusers"), "factors": ("compressed", "webui"), "delta": ("webui",)}


def bits(path: Path) -> tuple[dict[tuple[str, str], list[bytes]], list[bytes]]:
    """Layer and parameter -> its tensors, and the words in order, to the bit."""
    found = open_concepts(path)
    edits = {
        (found.target(edit).module, edit.parameter): [read(found.source, leaf.key) for leaf in edit.tensors]
        for edit in found.concepts.edits
    }
    return edits, [parts["clip_l"].values.tobytes() for parts in found.words.values()]


@WRITERS
def test_every_layout_is_converted_to_all_that_hold_it_and_back(writer, tmp_path):
    own, kind = files.WRITERS[writer]
    path = writer(tmp_path)
    before = bits(path)
    for target in TARGETS[kind]:
        (tmp_path / target).mkdir()
        made = custom.convert(path, to=target, output=tmp_path / target).data["outputs"]
        assert open_concepts(made[0]).layout == target
        options = {}
        if target == "webui" and len(before[1]) > 1:  # one file for each word, which no name ties to the weights
            options["words"] = made[1:]
        found = open_concepts(made[0], **options)
        assert [parts["clip_l"].values.tobytes() for parts in found.words.values()] == before[1]
        assert bits(Path(made[0]))[0] == before[0]
        (tmp_path / target / "back").mkdir()
        back = custom.convert(made[0], to=own, output=tmp_path / target / "back", **options).data["outputs"][0]
        assert bits(Path(back))[0] == before[0]


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_diffusers_layout_is_what_its_script_writes(ending, tmp_path):
    writer = files.diffusers_bin if ending == ".bin" else files.diffusers_safetensors
    original = writer(tmp_path)
    (tmp_path / "again").mkdir()
    again = tmp_path / "again" / original.name
    custom.convert(original, to="diffusers", output=again)
    load = load_file if ending == ".safetensors" else partial(torch.load, weights_only=True)
    first, second = load(original), load(again)
    assert set(first) == set(second)
    assert all(value == second[key] if value == {} else torch.equal(value, second[key]) for key, value in first.items())


def test_what_a_layout_cannot_hold_is_refused_with_those_that_can(tmp_path):
    with pytest.raises(MismatchError, match="holds factors, which `adobe` files cannot hold") as caught:
        custom.convert(files.compressed(tmp_path), to="adobe", output=tmp_path / "x.bin")
    assert "`--to webui` or `--to compressed`" in (caught.value.hint or "")
    with pytest.raises(UsageError, match="there is no layout `adobee`"):
        custom.convert(files.adobe(tmp_path), to="adobee")
    with pytest.raises(UsageError, match=r"are never `\.pt` files"):
        custom.convert(files.adobe(tmp_path), to="compvis", output=tmp_path / "x.pt")
    with pytest.raises(OutputError, match="exists already"):
        custom.convert(files.compvis(tmp_path), to="adobe", output=files.adobe(tmp_path))
    report = custom.convert(files.adobe(tmp_path), to="diffusers", output=tmp_path / "x.bin", dry_run=True)
    assert [Path(each).name for each in report.data["outputs"]] == ["x.bin", "<new1>.safetensors"]


def test_words_that_are_given_take_the_place_of_its_own(tmp_path):
    torch.save({"<mine>": torch.ones(768)}, tmp_path / "mine.bin")
    assert list(open_concepts(files.adobe(tmp_path), [tmp_path / "mine.bin"]).words) == ["<mine>"]


@WRITERS
def test_applied_it_is_the_model_that_was_trained(writer, model, tmp_path):
    report = custom.apply(model, writer(tmp_path), output=tmp_path / "out.safetensors")
    found, before = load_file(tmp_path / "out.safetensors"), load_file(model)
    for key, value in before.items():
        layer = key.removeprefix(tiny.UNET).removesuffix(".weight")
        expected = files.tuned().get(layer, value)
        if writer is files.diffusers_bin and key.endswith("attn2.to_out.0.bias"):
            expected = torch.full((320,), 0.5)
        torch.testing.assert_close(found[key], expected, rtol=1e-6, atol=1e-7)
    assert report.data["words"]
    assert "no weights of a checkpoint" in "\n".join(report.warnings)


def test_strengths_scale_the_change(model, tmp_path):
    custom.apply(model, (files.adobe(tmp_path), 0.5), output=tmp_path / "out.safetensors")
    key = f"{tiny.UNET}{files.LAYERS[0]}.weight"
    expected = files.weights()[files.LAYERS[0]] + 0.5 * files.deltas()[files.LAYERS[0]]
    torch.testing.assert_close(load_file(tmp_path / "out.safetensors")[key], expected, rtol=1e-6, atol=1e-6)


def lora(path: Path) -> dict[str, torch.Tensor]:
    """Layer -> up @ down alpha / r, of a file with kohya's names."""
    state = load_file(path)
    stems = {key.removesuffix(".lora_up.weight") for key in state if key.endswith(".lora_up.weight")}
    found = {}
    for stem in stems:
        up, down = state[f"{stem}.lora_up.weight"].double(), state[f"{stem}.lora_down.weight"].double()
        found[stem] = up @ down * float(state.get(f"{stem}.alpha", torch.tensor(len(down)))) / len(down)
    return found


def stem_of(layer: str) -> str:
    return "lora_unet_" + files.diffusers(layer).replace(".", "_")


@pytest.mark.parametrize("writer", [files.compressed, files.compressed_compvis, files.webui_factors])
def test_factors_become_a_lora_bit_by_bit_without_the_model(writer, tmp_path):
    custom.to_lora(writer(tmp_path), output=tmp_path / "lora.safetensors")
    state, made = load_file(tmp_path / "lora.safetensors"), lora(tmp_path / "lora.safetensors")
    assert len(made) == len(files.LAYERS)
    for layer, (u, v) in files.factors().items():
        assert torch.equal(state[f"{stem_of(layer)}.lora_up.weight"], u)
        assert torch.equal(state[f"{stem_of(layer)}.lora_down.weight"], v)
        delta = u.double() @ v.double()
        assert torch.linalg.norm(made[stem_of(layer)] - delta) <= 1e-6 * torch.linalg.norm(delta)
    assert any(key.startswith("bundle_emb.") for key in state)


@pytest.mark.parametrize("writer", [files.adobe, files.compvis, files.webui, files.diffusers_bin])
def test_the_rest_becomes_the_best_lora_of_a_rank(writer, model, tmp_path):
    report = custom.to_lora(writer(tmp_path), model=model, rank=8, dtype="fp32", output=tmp_path / "l.safetensors")
    made = lora(tmp_path / "l.safetensors")
    for layer, delta in files.deltas().items():
        assert torch.linalg.norm(made[stem_of(layer)] - delta) <= 1e-4 * torch.linalg.norm(delta)
    assert report.data["words"]
    sdops.apply(model, lora=[tmp_path / "l.safetensors"], output=tmp_path / "applied.safetensors")
    key = f"{tiny.UNET}{files.LAYERS[1]}.weight"
    found = load_file(tmp_path / "applied.safetensors")
    torch.testing.assert_close(found[key], files.tuned()[files.LAYERS[1]], rtol=1e-4, atol=1e-5)
    if writer is files.diffusers_bin:
        key = f"{tiny.UNET}{next(iter(files.BLOCKS))}.to_out.0.bias"
        torch.testing.assert_close(found[key], torch.full((320,), 0.5))


def test_whole_weights_need_the_model_that_they_were_trained_on(model, tmp_path):
    path = files.adobe(tmp_path)
    with pytest.raises(MismatchError, match="not known without the model"):
        custom.to_lora(path, output=tmp_path / "l.safetensors")
    other = {"conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.bias": torch.zeros(3)}
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(MismatchError, match="is for sd1"):
        custom.to_lora(path, model=tmp_path / "other.safetensors", output=tmp_path / "l.safetensors")


def test_inspect_measures_the_changes(model, tmp_path):
    facts = custom.inspect(files.adobe(tmp_path), model=model).data["files"][0]
    assert facts["kinds"] == {"whole": 4}
    assert facts["words"][0]["name"] == "<new1>"
    layer = facts["layers"][0]
    delta, weight = files.deltas()[files.LAYERS[0]], files.weights()[files.LAYERS[0]]
    assert layer["norm"] == pytest.approx(float(delta.norm()), rel=1e-4)
    assert layer["relative"] == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-4)
    alone = custom.inspect(files.adobe(tmp_path), files.compressed(tmp_path))
    assert alone.data["files"][0]["layers"][0]["norm"] is None
    assert alone.data["files"][1]["layers"][0]["rank"] == files.RANK
    assert "what whole weights change shows beside their model" in str(alone)


@WRITERS
def test_a_model_whose_layers_have_other_shapes_is_refused(writer, model, tmp_path):
    path, key = writer(tmp_path), f"{tiny.UNET}{files.LAYERS[0]}.weight"
    state = load_file(model)
    save_file(state | {key: state[key][:10, :24].contiguous()}, tmp_path / "small.safetensors")
    small, made = tmp_path / "small.safetensors", tmp_path / "made.safetensors"
    for call in (
        lambda: custom.inspect(path, model=small),
        lambda: custom.apply(small, path, output=made),
        lambda: custom.merge(path, model=small, output=made, words=[files.adobe(tmp_path)]),
        lambda: custom.to_lora(path, model=small, output=made),
    ):
        with pytest.raises(MismatchError, match=r"has shape \[320, 768\] in .*, \[10, 24\] in `small.safetensors`"):
            call()
    assert not made.exists()


@pytest.mark.parametrize(
    ("shapes", "told"),
    [
        (((320, 4), (3, 768)), r"\[320, 4\] and \[3, 768\]"),
        (((320, 4, 1), (4, 768)), r"\[320, 4, 1\]"),
        (((),), r"\[\]"),
    ],
)
def test_shapes_that_are_no_weight_are_refused(shapes, told, tmp_path):
    name = f"{files.LDM}{files.LAYERS[0]}.weight"
    keys, kind = ((name,), "delta") if len(shapes) == 1 else ((f"{name}.US", f"{name}.Vh"), "delta_factors")
    state = {key: torch.zeros(shape) for key, shape in zip(keys, shapes, strict=True)}
    save_file(state, tmp_path / "d.safetensors", metadata={"json": json.dumps({"entries": {name: kind}})})
    with pytest.raises(FormatError, match=told):
        open_concepts(tmp_path / "d.safetensors")


def test_damage_and_other_files_are_named(tmp_path):
    path = files.webui_factors(tmp_path)
    state = load_file(path)
    state.pop(f"{files.LDM}{files.LAYERS[0]}.weight.Vh")
    entries = {f"{files.LDM}{layer}.weight": "delta_factors" for layer in files.LAYERS}
    save_file(state, path, metadata={"json": json.dumps({"entries": entries})})
    with pytest.raises(FormatError, match="there is no"):
        open_concepts(path)
    torch.save({"string_to_param": {"*": torch.zeros(2, 768)}}, tmp_path / "a.pt")
    with pytest.raises(FormatError, match="holds no custom diffusion"):
        open_concepts(tmp_path / "a.pt")
    torch.save({"unet": {"down_blocks.9.attn2.to_k.weight": torch.zeros(4, 768)}}, tmp_path / "b.bin")
    with pytest.raises(FormatError, match="sd1 does not have"):
        open_concepts(tmp_path / "b.bin")
    torch.save({"unet": {"down_blocks.0.attn2.to_k.weight": torch.zeros(4, 7)}}, tmp_path / "c.bin")
    with pytest.raises(FormatError, match="no known model has"):
        open_concepts(tmp_path / "c.bin")

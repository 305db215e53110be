"""What else lies in adapter files: PEFT's (IA)^3 and tables of embeddings, LyCORIS' sparse rest, OFT with DoRA."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import sdops
from fixtures import loras
from sdops import adapters
from sdops.core.patch import Adapter
from sdops.errors import FormatError, MismatchError
from sdops.verbs._adapters import open_adapter, read_parts, spelled
from tests.dialects.helpers import assert_same_deltas, bytes_of, deltas, save

BLOCK = "base_model.model.down_blocks.0.attentions.0"
TO_K = f"{BLOCK}.transformer_blocks.0.attn2.to_k"  # without a bias
FF = f"{BLOCK}.transformer_blocks.0.ff.net.2"
CONV = "base_model.model.down_blocks.0.resnets.0.conv1"
KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def folder_of(path: Path, arrays: dict[str, np.ndarray], config: dict[str, object] | None) -> Path:
    path.mkdir()
    loras.save(path / "adapter_model.safetensors", arrays)
    if config is not None:
        (path / "adapter_config.json").write_text(json.dumps(config))
        return path
    return path / "adapter_model.safetensors"


def ia3(folder: Path) -> Path:
    """(IA)^3 of the outputs of to_k and the inputs of ff.net.2."""
    arrays = {f"{stem}.ia3_l": 1 + random(*shape) / 8 for stem, shape in ((TO_K, (320, 1)), (FF, (1, 1280)))}
    return folder_of(folder / "ia3", arrays, {"peft_type": "IA3", "feedforward_modules": ["ff.net.2"]})


def change(adapter: Adapter, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Layer -> its change, given weights for every layer."""
    return {
        str(patch.target): adapters.family(patch.family).delta(
            read_parts(adapter, patch), tuple(weight.shape), weight, **patch.settings
        )
        for patch in adapter.patches
        for weight in [weights[str(patch.target)]]
    }


# ------------------------------------------------------------------------------------------------------------- (IA)^3


def test_ia3_of_peft_is_read_with_its_axes(tmp_path: Path) -> None:
    adapter = open_adapter(ia3(tmp_path))
    assert [(patch.family, patch.settings) for patch in adapter.patches] == [
        ("ia3", {"on_input": False}),
        ("ia3", {"on_input": True}),
    ]


def test_ia3_goes_to_kohya_and_back(tmp_path: Path) -> None:
    adapter = open_adapter(ia3(tmp_path))
    weights = {str(p.target): torch.from_numpy(random(320, 1280)) for p in adapter.patches}
    there = open_adapter(save(spelled(adapter, "kohya"), tmp_path / "kohya"))
    back = open_adapter(save(spelled(there, "peft"), tmp_path / "peft").parent)
    wanted = change(adapter, weights)
    for other in (there, back):
        for name, delta in change(other, weights).items():
            assert torch.linalg.norm(delta - wanted[name]) <= 1e-6 * torch.linalg.norm(wanted[name])
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["peft_type"] == "IA3"
    assert config["feedforward_modules"] == [FF.removeprefix("base_model.model.")]
    assert sorted(config["target_modules"]) == sorted(s.removeprefix("base_model.model.") for s in (TO_K, FF))


def test_ia3_stays_in_peft_bit_by_bit(tmp_path: Path) -> None:
    adapter = open_adapter(ia3(tmp_path))
    again = open_adapter(save(spelled(adapter, "peft"), tmp_path / "again").parent)
    assert bytes_of(again) == bytes_of(adapter)
    assert {str(p.target): p.settings for p in again.patches} == {str(p.target): p.settings for p in adapter.patches}


def test_ia3_of_a_layer_with_a_bias_stays_where_the_bias_is_multiplied_too(tmp_path: Path) -> None:
    config = {"peft_type": "IA3", "feedforward_modules": []}
    adapter = open_adapter(folder_of(tmp_path / "x", {f"{FF}.ia3_l": 1 + random(320, 1)}, config))
    with pytest.raises(MismatchError, match="has a bias"):
        spelled(adapter, "kohya")
    own = {f"{KOHYA.replace('attn2_to_k', 'ff_net_2')}.{part}": value for part, value in (
        ("weight", random(320)), ("on_input", np.array(0.0, np.float32)))}  # fmt: skip
    with pytest.raises(MismatchError, match="has a bias"):
        spelled(open_adapter(loras.save(tmp_path / "own.safetensors", own)), "peft")


def test_ia3_of_a_convolution_needs_its_configuration(tmp_path: Path) -> None:
    arrays = {f"{CONV}.ia3_l": 1 + random(1, 320, 1, 1)}
    with pytest.raises(FormatError, match=r"adapter_config\.json"):
        open_adapter(folder_of(tmp_path / "a", arrays, None))
    config = {"peft_type": "IA3", "feedforward_modules": r".*\.conv1"}
    (patch,) = open_adapter(folder_of(tmp_path / "b", arrays, config)).patches
    assert patch.settings == {"on_input": True}


def test_ia3_and_lora_do_not_share_a_folder(tmp_path: Path) -> None:
    arrays = {
        f"{KOHYA}.weight": random(320),
        f"{KOHYA}.on_input": np.array(0.0, np.float32),
        f"{KOHYA.replace('to_k', 'to_v')}.lora_up.weight": random(320, 2),
        f"{KOHYA.replace('to_k', 'to_v')}.lora_down.weight": random(2, 768),
    }
    with pytest.raises(MismatchError, match="one kind of adapter"):
        spelled(open_adapter(loras.save(tmp_path / "x.safetensors", arrays)), "peft")


# --------------------------------------------------------------------------------------------- tables of embeddings

TEXT = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "base_model_name_or_path": "runwayml/stable-diffusion-v1-5"}
TABLE, PROJECTION = "embeddings.token_embedding", "encoder.layers.0.self_attn.q_proj"


def text_encoder(folder: Path, prefix: str) -> Path:
    stem = f"base_model.model.{prefix}"
    arrays = {
        f"{stem}{TABLE}.lora_embedding_A": random(2, 49408),
        f"{stem}{TABLE}.lora_embedding_B": random(768, 2),
        f"{stem}{PROJECTION}.lora_A.weight": random(2, 768),
        f"{stem}{PROJECTION}.lora_B.weight": random(768, 2),
    }
    return folder_of(folder / "text", arrays, TEXT)


@pytest.mark.parametrize("prefix", ["text_model.", ""], ids=["before", "transformers 5"])
def test_lora_on_embeddings_is_read_and_stays_the_same(tmp_path: Path, prefix: str) -> None:
    adapter = open_adapter(text_encoder(tmp_path, prefix))
    assert {str(patch.target): patch.family for patch in adapter.patches} == {
        f"clip_l:text_model.{TABLE}": "lora_embedding",
        f"clip_l:text_model.{PROJECTION}": "lora",
    }
    again = open_adapter(save(spelled(adapter, "peft"), tmp_path / "again").parent)
    assert_same_deltas(adapter, again)
    up, down = random(2, 49408).T, random(768, 2).T
    found = deltas(adapter)[f"clip_l:text_model.{TABLE}"]
    assert np.allclose(found[:50], 1.5 * up[:50] @ down, rtol=1e-5, atol=1e-6)


def test_lora_on_embeddings_becomes_plain_lora_for_other_programs(tmp_path: Path) -> None:
    folder = text_encoder(tmp_path, "text_model.")
    with pytest.raises(MismatchError, match="lora_embedding"):
        sdops.convert(folder, to="kohya", output=tmp_path / "x.safetensors")
    sdops.convert(folder, to="kohya", family="lora", dtype="fp32", output=tmp_path / "x.safetensors")
    other = open_adapter(tmp_path / "x.safetensors")
    assert {patch.family for patch in other.patches} == {"lora"}
    assert_same_deltas(open_adapter(folder), other, tolerance=1e-5)


# --------------------------------------------------------------------------------------------- LyCORIS' sparse rest


def sparse(folder: Path, columns: int = 768) -> Path:
    arrays = {
        f"{KOHYA}.lora_up.weight": random(320, 2),
        f"{KOHYA}.lora_down.weight": random(2, 768),
        f"{KOHYA}.alpha": np.array(2.0, np.float32),
        f"{KOHYA}.bias_indices": np.array([[0, 319], [767, 1]], np.int64),
        f"{KOHYA}.bias_values": np.array([0.5, -0.25], np.float32),
        f"{KOHYA}.bias_size": np.array([320, columns], np.int64),
    }
    return loras.save(folder / "sparse.safetensors", arrays)


def test_the_sparse_rest_is_added_and_kept(tmp_path: Path) -> None:
    adapter = open_adapter(sparse(tmp_path))
    (found,) = deltas(adapter).values()
    found = found - torch.from_numpy(random(320, 2) @ random(2, 768))
    assert found[0, 767] == pytest.approx(0.5, abs=1e-5)
    assert found[319, 1] == pytest.approx(-0.25, abs=1e-5)
    assert float(found.norm()) == pytest.approx((0.5**2 + 0.25**2) ** 0.5, rel=1e-4)
    assert bytes_of(open_adapter(save(spelled(adapter, "kohya"), tmp_path / "again"))) == bytes_of(adapter)
    assert_same_deltas(adapter, open_adapter(save(spelled(adapter, "lycoris"), tmp_path / "lycoris")))


@pytest.mark.parametrize("to", ["comfy", "diffusers", "peft"])
def test_programs_that_would_drop_the_sparse_rest_do_not_get_it(tmp_path: Path, to: str) -> None:
    with pytest.raises(MismatchError, match="sparse_indices"):
        spelled(open_adapter(sparse(tmp_path)), to)
    sdops.convert(sparse(tmp_path), to=to, family="lora", dtype="fp32", rank=4, output=tmp_path / "plain")
    assert_same_deltas(open_adapter(sparse(tmp_path)), open_adapter(tmp_path / "plain"), tolerance=1e-5)


def test_a_sparse_rest_of_another_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="sparse_size"):
        deltas(open_adapter(sparse(tmp_path, columns=640)))


# ------------------------------------------------------------------------------------------------------ OFT with DoRA


@pytest.mark.parametrize("part", [{"oft_R.weight": (40, 28)}, {"oft_blocks": (40, 8, 8)}], ids=lambda p: next(iter(p)))
def test_oft_with_dora_is_refused_by_name(tmp_path: Path, part: dict[str, tuple[int, ...]]) -> None:
    arrays = {f"{KOHYA}.{name}": random(*shape) for name, shape in part.items()}
    file = loras.save(tmp_path / "x.safetensors", arrays | {f"{KOHYA}.dora_scale": random(320, 1)})
    with pytest.raises(FormatError, match="OFT with DoRA"):
        open_adapter(file, allow_unknown=True)


# --------------------------------------------------------------------------------------------------------------- LoKr


def lokr(folder: Path) -> Path:
    """Two whole matrices, which PEFT scales by alpha / r all the same, and one of which one is factored."""
    whole = {".lokr_w1": random(4, 8), ".lokr_w2": random(80, 96)}
    factored = {".lokr_w1": random(4, 8), ".lokr_w2_a": random(80, 2), ".lokr_w2_b": random(2, 96)}
    to_v = TO_K.replace("to_k", "to_v")
    arrays = {TO_K + end: part for end, part in whole.items()} | {to_v + end: part for end, part in factored.items()}
    return folder_of(folder / "lokr", arrays, {"peft_type": "LOKR", "r": 2, "alpha": 1})


def test_lokr_of_peft_keeps_its_scale_in_other_dialects(tmp_path: Path) -> None:
    adapter = open_adapter(lokr(tmp_path))
    halves = np.kron(random(4, 8), random(80, 96)) / 2
    assert np.allclose(deltas(adapter)["unet:input_blocks.1.1.transformer_blocks.0.attn2.to_k"], halves, atol=1e-6)
    for dialect in ("kohya", "comfy"):
        assert_same_deltas(adapter, open_adapter(save(spelled(adapter, dialect), tmp_path / dialect)))


def test_lokr_of_peft_becomes_a_lora_and_is_resized(tmp_path: Path) -> None:
    folder, output = lokr(tmp_path), tmp_path / "lora.safetensors"
    sdops.convert(folder, family="lora", to="kohya", output=output)
    assert_same_deltas(open_adapter(folder), open_adapter(output), tolerance=1e-5)
    report = sdops.resize(folder, rank=3, to="kohya", output=tmp_path / "small.safetensors")
    assert [layer["rank"] for layer in report.data["layers"]] == [3, 3]

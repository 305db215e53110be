"""Opening adapter files: PEFT's configuration, alphas, damage; and writing them through the sink."""

from __future__ import annotations

import json
from math import sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures import loras
from sdops.core.patch import Adapter, Patch, Target
from sdops.core.spec import Spec
from sdops.errors import FormatError, MismatchError, SdopsError
from sdops.verbs._adapter_source import AdapterSource, Lazy
from sdops.verbs._adapters import holders, open_adapter, read_parts, spelled
from tests.dialects.helpers import assert_same_deltas, deltas, fixture, save

STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
UP, DOWN, ALPHA = f"{STEM}.lora_up.weight", f"{STEM}.lora_down.weight", f"{STEM}.alpha"


def half(*shape: int) -> loras.Array:
    return np.ones(shape, np.float16)


GOOD = {UP: half(320, 2), DOWN: half(2, 768)}


def opened(tmp_path, arrays, metadata=None, **options):
    return open_adapter(loras.save(tmp_path / "a.safetensors", arrays, metadata), **options)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({UP: half(320, 2)}, "is incomplete"),
        ({DOWN: half(2, 768)}, "is incomplete"),
        ({UP: half(320, 3), DOWN: half(2, 768)}, STEM),
        ({UP: half(320, 0), DOWN: half(0, 768)}, STEM),
        ({**GOOD, ALPHA: np.array(np.nan, np.float32)}, "alpha` of `a.safetensors` is nan"),
        ({**GOOD, ALPHA: np.array(0.0, np.float32)}, "alpha` of `a.safetensors` is 0"),
        ({**GOOD, "something.else": half(2)}, "`something.else`"),
        ({**GOOD, "lora_unet_nowhere.lora_up.weight": half(2, 2)}, "`lora_unet_nowhere.lora_up.weight`"),
        ({**GOOD, f"{STEM}.lora_A.weight": half(2, 768)}, "the same part of one layer"),
        (
            {
                **GOOD,
                UP.replace("unet_", "unet_unet_"): half(320, 2),
                DOWN.replace("unet_", "unet_unet_"): half(2, 768),
            },
            "are the same layer",
        ),
        ({"lora_controlnet": half(0), **GOOD}, "Control-LoRA"),
        ({"a.b": half(2)}, "is no adapter file"),
    ],
)
def test_damage_is_named(tmp_path, arrays, words):
    with pytest.raises(FormatError, match=words) as caught:
        opened(tmp_path, arrays)
    assert caught.value.hint


def test_unknown_tensors_can_be_left_out(tmp_path):
    adapter = opened(tmp_path, {**GOOD, "something.else": half(2)}, allow_unknown=True)
    assert adapter.unknown == ("something.else",)
    assert len(adapter.patches) == 1


def test_glued_suffixes_are_repaired_with_a_note(tmp_path):
    glued = {key.replace(".lora_", "_lora_").replace("lora_unet_", "lora_unet_unet_"): v for key, v in GOOD.items()}
    adapter = opened(tmp_path, glued)
    assert [str(patch.target) for patch in adapter.patches] == ["unet:input_blocks.1.1.transformer_blocks.0.attn2.to_k"]
    assert "broken converter" in adapter.notes[0]


def test_nan_in_a_factor_is_named_when_read(tmp_path):
    adapter = opened(tmp_path, {**GOOD, UP: np.full((320, 2), np.nan, np.float16)})
    with pytest.raises(FormatError, match="NaN"):
        read_parts(adapter, adapter.patches[0])


@pytest.mark.parametrize(
    "alpha",
    [np.array(1, np.int64), np.array([1.0], np.float16), np.array(1.0, np.float32), np.array([[1.0]], np.float64)],
)
def test_an_alpha_may_have_any_dtype_and_shape(tmp_path, alpha):
    adapter = opened(tmp_path, {**GOOD, ALPHA: alpha})
    assert float(deltas(adapter).popitem()[1][0, 0]) == 1.0  # two ranks of ones, times 1/2


def test_bundled_embeddings_travel(tmp_path):
    adapter = opened(tmp_path, {**GOOD, "bundle_emb.<s1>.clip_l": half(1, 768)})
    assert adapter.extras == {"bundle_emb.<s1>.clip_l": "embedding clip_l <s1>"}
    assert "bundle_emb.<s1>.clip_l" in spelled(adapter, "comfy").source.specs
    assert spelled(adapter, "diffusers").left_out == ("bundle_emb.<s1>.clip_l",)


def test_metadata_of_the_old_spelling_is_left_behind(tmp_path):
    adapter = opened(tmp_path, GOOD, {"ss_tag_frequency": "{}", "unet:0:rank": "4", "lora_adapter_metadata": "{}"})
    assert spelled(adapter, "comfy").source.metadata == {"ss_tag_frequency": "{}"}


# ---------------------------------------------------------------------------------------------------------------- PEFT


def peft(tmp_path, **config):
    layers = loras.SPELLINGS["peft", "flux1"]
    loras.save(tmp_path / "adapter_model.safetensors", loras.tensors("peft", layers))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4, **config}))
    return tmp_path


def test_a_folder_and_the_file_in_it_are_the_same(tmp_path):
    folder = peft(tmp_path)
    assert [p.settings for p in open_adapter(folder).patches] == [{"lora_alpha": 4}] * 3
    assert open_adapter(folder / "adapter_model.safetensors").patches == open_adapter(folder).patches


def test_patterns_and_rslora_reach_the_patches(tmp_path):
    adapter = open_adapter(peft(tmp_path, alpha_pattern={"attn.to_q": 8, r".*\.proj_out": 16}, use_rslora=True))
    found = {
        patch.target.module.rpartition(".")[2] + str(patch.target.share): patch.settings for patch in adapter.patches
    }
    assert found == {
        "qkv(0, 1, 3)": {"lora_alpha": 8, "use_rslora": True},
        "qkv(1, 2, 3)": {"lora_alpha": 4, "use_rslora": True},
        "linear2None": {"lora_alpha": 16, "use_rslora": True},
    }
    for to in holders(adapter):
        assert_same_deltas(adapter, open_adapter(save(spelled(adapter, to), tmp_path / to)))


def test_rslora_becomes_a_plain_alpha(tmp_path):
    adapter = open_adapter(peft(tmp_path, use_rslora=True))
    kohya = open_adapter(save(spelled(adapter, "kohya"), tmp_path / "kohya"))
    (linear2,) = [patch for patch in kohya.patches if patch.target.module.endswith("linear2")]
    assert float(read_parts(kohya, linear2)["lora_alpha"]) == pytest.approx(4 * sqrt(2), rel=1e-7)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "loftq", "corda"])
def test_adapters_that_changed_their_base_are_refused(tmp_path, start):
    with pytest.raises(FormatError, match=start):
        open_adapter(peft(tmp_path, init_lora_weights=start))


def test_a_written_configuration_says_ranks_and_alphas(tmp_path):
    adapter = fixture(tmp_path, "lycoris", "flux1", "lora_alpha")
    config = json.loads(spelled(adapter, "peft").companions["adapter_config.json"])
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (2, 0.75, "LORA")
    assert config["target_modules"] == ["single_transformer_blocks.3.proj_out", "transformer_blocks.0.attn.to_v"]


def test_a_folder_without_weights_says_so(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(SdopsError, match=r"none of `adapter_model\.safetensors`"):
        open_adapter(tmp_path)


def test_the_header_of_diffusers_tells_the_alpha(tmp_path):
    layers = loras.SPELLINGS["diffusers", "sd1"]
    entry = {"unet.r": 2, "unet.lora_alpha": 6, "text_encoder.lora_alpha": 1}
    adapter = opened(tmp_path, loras.tensors("diffusers", layers), {"lora_adapter_metadata": json.dumps(entry)})
    assert [patch.settings["lora_alpha"] for patch in adapter.patches] == [6, 6, 1]


# ---------------------------------------------------------------------------------------------------- fused and split


class Arrays(AdapterSource):
    """Arrays in memory."""

    def __init__(self, arrays: dict[str, loras.Array]) -> None:
        names = {"float32": "F32", "float16": "F16"}
        super().__init__(
            "arrays", {k: Lazy(Spec(names[v.dtype.name], v.shape), v.tobytes) for k, v in arrays.items()}, {}
        )


@settings(deadline=None, max_examples=12)
@given(
    present=st.lists(st.sampled_from([0, 1, 2]), min_size=1, unique=True),
    ranks=st.tuples(*[st.integers(1, 3)] * 3),
    alphas=st.tuples(*[st.sampled_from([None, 1.0, 3.0])] * 3),
    shared=st.booleans(),
)
def test_split_patches_join_and_part_again(tmp_path_factory, present, ranks, alphas, shared):
    folder = tmp_path_factory.mktemp("split")
    rng = np.random.default_rng(sum(ranks))
    down = rng.standard_normal((ranks[0], 6)).astype(np.float32)
    arrays = {"anchor.up": down[:1].T.copy(), "anchor.down": down[:1]}  # a layer that only Flux has
    anchor = Patch(Target("transformer", "single_blocks.0.linear2"), "lora", {"up": "anchor.up", "down": "anchor.down"})
    patches = [anchor]
    for index in present:
        rank, alpha = (ranks[0], alphas[0]) if shared else (ranks[index], alphas[index])
        arrays[f"{index}.up"] = rng.standard_normal((4, rank)).astype(np.float32)
        arrays[f"{index}.down"] = down if shared else rng.standard_normal((rank, 6)).astype(np.float32)
        parts = {"up": f"{index}.up", "down": f"{index}.down"}
        if alpha is not None:
            arrays[f"{index}.alpha"] = np.array(alpha, np.float32)
            parts["lora_alpha"] = f"{index}.alpha"
        target = Target("transformer", "double_blocks.0.img_attn.qkv", (index, index + 1, 3))
        patches.append(Patch(target, "lora", parts))
    adapter = Adapter(Arrays(arrays), "diffusers", "flux1", tuple(patches))
    fused = open_adapter(save(spelled(adapter, "kohya"), folder / "fused"))
    assert_same_deltas(adapter, fused, 1e-6)
    (patch,) = [patch for patch in fused.patches if patch.target != anchor.target]
    rank = fused.source.specs[patch.parts["down"]].shape[0]
    assert rank == (ranks[0] if shared else sum(ranks[index] for index in present))
    split = open_adapter(save(spelled(fused, "onetrainer"), folder / "split"))
    assert_same_deltas(adapter, split, 1e-6)
    by_target = {patch.target: patch for patch in split.patches}
    for patch in adapter.patches:
        again = by_target[patch.target]
        scales = {1.0 if alphas[index] is None else alphas[index] / ranks[index] for index in present}
        if shared or len(scales) == 1 or patch.target == anchor.target:
            assert torch.equal(read_parts(split, again)["down"], read_parts(adapter, patch)["down"])
            assert torch.equal(read_parts(split, again)["up"], read_parts(adapter, patch)["up"])


def test_a_kronecker_factor_that_does_not_divide_is_refused(tmp_path):
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    arrays = {f"{stem}.lokr_w1": half(2, 2), f"{stem}.lokr_w2": half(12, 4)}
    with pytest.raises(MismatchError, match="do not divide"):
        spelled(opened(tmp_path, arrays), "onetrainer")


def test_dora_of_inputs_cannot_be_split(tmp_path):
    adapter = fixture(tmp_path, "comfy", "flux1", "dora_inputs")
    with pytest.raises(MismatchError, match="`dora_scale` does not allow it"):
        spelled(adapter, "onetrainer")


def test_a_missing_dora_vector_is_no_zero(tmp_path):
    adapter = fixture(tmp_path, "onetrainer", "flux1", "dora")
    with pytest.raises(MismatchError, match="rows between them are missing"):
        spelled(adapter, "kohya")


def test_half_precision_factors_are_widened_before_an_alpha_is_folded(tmp_path):
    adapter = opened(tmp_path, {**GOOD, ALPHA: np.array(0.75, np.float32)})
    source = spelled(adapter, "diffusers").source
    assert {key: spec.dtype for key, spec in source.specs.items() if "lora_B" in key}.popitem()[1] == "F32"
    assert {key: spec.dtype for key, spec in source.specs.items() if "lora_A" in key}.popitem()[1] == "F16"

"""`apply` from file to file: values of every family, both layouts, strengths, refusals, provenance, merges."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sdops
from fixtures import loras
from sdops import adapters
from sdops.core.source import read
from sdops.errors import FormatError, MismatchError, OutputError, SdopsError, UsageError
from sdops.layouts.tables import made_of
from sdops.verbs._adapters import open_adapter, read_parts
from sdops.verbs._apply_loras import split_options
from sdops.verbs._file_strength import split_file
from sdops.verbs.apply import Apply, apply
from tests import tiny

Arrays = dict[str, Any]
UNET = "model.diffusion_model."
TO_K = "input_blocks.4.1.transformer_blocks.0.attn2.to_k"
FF = "output_blocks.0.1.transformer_blocks.3.ff.net.0.proj"
CONV = "input_blocks.1.0.in_layers.2"
PROJ = "middle_block.1.proj_in"
Q_PROJ = "text_model.encoder.layers.0.self_attn.q_proj"
TE = "text_encoders.clip_l.transformer."
DIFFUSION = "diffusion_model."
SAYS_SDXL = {"ss_base_model_version": "sdxl_base_v1-0"}  # what shapes do not tell of so few layers


# The layers that are changed, and whatever else an SDXL is known by.
CLIP_L, CLIP_G = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
SHAPES = {
    f"{UNET}{TO_K}.weight": (640, 2048),
    f"{UNET}{FF}.weight": (24, 10),
    f"{UNET}{FF}.bias": (24,),
    f"{UNET}{CONV}.weight": (16, 6, 3, 3),
    f"{UNET}{CONV}.bias": (16,),
    f"{UNET}{PROJ}.weight": (12, 12),
    f"{CLIP_L}{Q_PROJ}.weight": (16, 768),
    f"{CLIP_G}transformer.resblocks.3.attn.in_proj_weight": (24, 8),
    f"{CLIP_G}text_projection": (8, 8),
    f"{CLIP_G}ln_final.weight": (8,),
}
BESIDE = {
    f"{UNET}input_blocks.0.0.weight": (320, 4, 3, 3),
    f"{UNET}label_emb.0.0.weight": (1280, 2816),
    f"{UNET}output_blocks.3.1.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
    f"{CLIP_L}text_model.embeddings.token_embedding.weight": (3, 768),
    f"{CLIP_L}text_model.encoder.layers.11.layer_norm1.weight": (768,),
    f"{CLIP_G}token_embedding.weight": (3, 1280),
    f"{CLIP_G}transformer.resblocks.0.ln_1.weight": (1280,),
}


def checkpoint(path: Path, dtype: str = "F32", tuned: int = 0) -> Path:
    """A few layers of an SDXL; a fine-tune differs from the base in every one of them."""
    model: tiny.Model = {key: ("F16", np.zeros(shape, np.float16)) for key, shape in BESIDE.items()}
    for index, (key, shape) in enumerate(SHAPES.items()):
        base = np.random.default_rng(index).standard_normal(shape) * 0.05
        change = np.random.default_rng([tuned, index]).standard_normal(shape) * 0.001
        model[key] = tiny.encoded(base + (change if tuned else 0), dtype)
    return tiny.write(path, model)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("models") / "sdxl.safetensors")


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("models") / "half.safetensors", "F16")


def arrays(path: Path) -> Arrays:
    return {key: tiny.numbers(t) if t[0][0] in "BF" and t[0] != "BOOL" else t[1] for key, t in tiny.load(path).items()}


def lora_file(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    family: str = "lora_alpha",
    metadata: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Path:
    """An adapter with one patch of a family for each stem; the values are as small as in trained ones."""
    found: Arrays = {}
    rng = np.random.default_rng(seed)
    for stem, shape in shapes.items():
        found |= {stem + suffix: values for suffix, values in loras.FAMILIES[family](shape, 2, rng).items()}
    return loras.save(path, found, metadata)


def saved(path: Path, **options: Any) -> Arrays:
    report = apply(output=path, force=True, **options)
    assert not isinstance(report, Apply)
    return arrays(path)


def shape_of(path: Path, key: str) -> tuple[int, ...]:
    return tiny.load(path)[key][1].shape


# --------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("strength", [1.0, 0.8, -0.5, 2.5])
def test_a_lora_is_scale_times_up_times_down(sdxl, tmp_path, strength):
    before = arrays(sdxl)
    stems = {DIFFUSION + m: before[f"{UNET}{m}.weight"].shape for m in (TO_K, FF, CONV, PROJ)}
    file = lora_file(tmp_path / "x.safetensors", stems)
    parts = arrays(file)
    after = saved(tmp_path / "out.safetensors", model=sdxl, lora=[f"{file}:{strength}"])
    for stem, shape in stems.items():
        up, down = parts[f"{stem}.lora_up.weight"], parts[f"{stem}.lora_down.weight"]
        delta = (
            (up.reshape(shape[0], -1) @ down.reshape(len(down), -1)).reshape(shape) * float(parts[f"{stem}.alpha"]) / 2
        )
        key = f"{UNET}{stem.removeprefix(DIFFUSION)}.weight"
        assert np.allclose(after[key], before[key] + strength * delta, rtol=1e-6, atol=1e-7)
    touched = {f"{UNET}{stem.removeprefix(DIFFUSION)}.weight" for stem in stems}
    assert all(np.array_equal(after[key], values) for key, values in before.items() if key not in touched)
    assert list(after) == list(before)


@pytest.mark.parametrize("family", loras.FAMILIES)
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_every_family_adds_what_its_shelf_says(sdxl, tmp_path, family, strength):
    before = arrays(sdxl)
    modules = {"lokr": [TO_K, FF, PROJ], "glora": [TO_K, FF, PROJ], "full": [FF, CONV]}.get(family, [TO_K, FF, CONV])
    modules = [TO_K, CONV] if family == "boft" else modules
    stems = {DIFFUSION + m: SHAPES[f"{UNET}{m}.weight"] for m in modules}
    file = lora_file(tmp_path / "x.safetensors", stems, family, SAYS_SDXL)
    after = saved(tmp_path / "out.safetensors", model=sdxl, lora=[(file, strength)])
    adapter = open_adapter(file)
    assert len(adapter.patches) == len(stems)
    for patch in adapter.patches:
        key = f"{UNET}{patch.target.module}.weight"
        weight = torch.from_numpy(before[key]).float()
        how = adapters.family(patch.family)
        delta = how.delta(read_parts(adapter, patch), tuple(weight.shape), weight, **patch.settings).double().numpy()
        assert np.linalg.norm(delta) > 0
        assert np.allclose(after[key], before[key] + strength * delta, rtol=1e-5, atol=1e-6)
        if family == "full" and f"{UNET}{patch.target.module}.bias" in before:
            bias = how.bias_delta(read_parts(adapter, patch), ()).double().numpy()
            name = f"{UNET}{patch.target.module}.bias"
            assert np.allclose(after[name], before[name] + strength * bias, atol=1e-6)


def test_peft_scales_what_goes_into_the_norm(sdxl, tmp_path):
    before = arrays(sdxl)
    key = f"{UNET}{FF}.weight"
    file = lora_file(tmp_path / "x.safetensors", {DIFFUSION + FF: before[key].shape}, "dora")
    parts = arrays(file)
    up, down = (parts[f"{DIFFUSION}{FF}.lora_{name}.weight"] for name in ("up", "down"))
    direction = before[key] + 0.5 * up @ down * 0.75 / 2
    wanted = parts[f"{DIFFUSION}{FF}.dora_scale"] * direction / np.linalg.norm(direction, axis=1, keepdims=True)
    out = tmp_path / "out.safetensors"
    assert np.allclose(saved(out, model=sdxl, lora=[(file, 0.5)], dora_strength="peft")[key], wanted, atol=1e-6)
    assert not np.allclose(saved(out, model=sdxl, lora=[(file, 0.5)])[key], wanted, atol=1e-3)


def test_several_loras_of_several_families_are_summed(sdxl, tmp_path):
    before = arrays(sdxl)
    key = f"{UNET}{FF}.weight"
    files = [
        lora_file(tmp_path / f"{family}.safetensors", {DIFFUSION + FF: before[key].shape}, family, seed=i)
        for i, family in enumerate(("lora_alpha", "dora", "loha", "ia3"))
    ]
    out, wishes = tmp_path / "out.safetensors", list(zip(files, (0.5, 1.0, -0.3, 0.7), strict=True))
    one_by_one = sum(saved(out, model=sdxl, lora=[wish])[key] - before[key] for wish in wishes)
    together = saved(out, model=sdxl, lora=wishes)[key]
    assert np.allclose(together, before[key] + one_by_one, atol=2e-6)
    assert np.allclose(saved(out, model=sdxl, lora=wishes[::-1])[key], together, atol=1e-6)
    # in sequence the second scaling sees the first: W (1 + a) (1 + b), not W (1 + a + b)
    twice = [(files[3], 1.0), (files[3], 1.0)]
    vector = arrays(files[3])[f"{DIFFUSION}{FF}.weight"][:, None]
    assert np.allclose(saved(out, model=sdxl, lora=twice)[key], before[key] * (1 + 2 * vector), atol=1e-6)
    found = saved(out, model=sdxl, lora=twice, sequential=True)[key]
    assert np.allclose(found, before[key] * (1 + vector) ** 2, atol=1e-6)


def test_applied_and_taken_away_is_the_model(sdxl, tmp_path):
    shape = shape_of(sdxl, f"{UNET}{TO_K}.weight")
    file = lora_file(tmp_path / "x.safetensors", {DIFFUSION + TO_K: shape})
    saved(tmp_path / "there.safetensors", model=sdxl, lora=[(file, 0.8)])
    back = saved(tmp_path / "back.safetensors", model=tmp_path / "there.safetensors", lora=[(file, -0.8)])
    assert all(np.allclose(back[key], values, atol=1e-6) for key, values in arrays(sdxl).items())


def test_norms_and_replaced_tensors(small_checkpoint, tmp_path):
    model = small_checkpoint("flux1-dev", dtype="F32")
    before = arrays(model)
    norm = "double_blocks.0.img_attn.norm.key_norm"
    scale = np.linspace(0.5, 1.5, before[f"{norm}.scale"].size, dtype=np.float32)
    up, down = np.ones((len(before["img_in.weight"]), 1), np.float32), np.ones((1, 128), np.float32)
    file = loras.save(
        tmp_path / "control.safetensors",
        {
            f"{norm}.scale": scale,
            "single_blocks.0.norm.key_norm.scale": scale,
            "img_in.lora_A.weight": down,
            "img_in.lora_B.weight": up,
            "img_in.lora_B.bias": np.full(len(up), 2, np.float32),
        },
    )
    after = saved(tmp_path / "out.safetensors", model=model, lora=[file])
    assert np.allclose(after[f"{norm}.scale"], scale, atol=1e-7)
    width = before["img_in.weight"].shape[1]
    assert after["img_in.weight"].shape == (len(up), 128)  # filled up with zeros first
    assert np.allclose(after["img_in.weight"][:, :width], before["img_in.weight"] + 1, atol=1e-6)
    assert np.all(after["img_in.weight"][:, width:] == 1)
    assert np.allclose(after["img_in.bias"], before["img_in.bias"] + 2, atol=1e-6)
    other = lora_file(tmp_path / "other.safetensors", {"diffusion_model.img_in": before["img_in.weight"].shape})
    with pytest.raises(MismatchError, match=r"makes `img_in\.weight`"):
        apply(model, lora=[file, other])


# --------------------------------------------------------------------------------------------------------- layouts


def relaid(model: Mapping[str, Any], made: Mapping[str, Any]) -> Arrays:
    """Tensors of one layout made of those of another, in the plainest way."""
    found: Arrays = {}
    for key, parts in made.items():
        pieces = []
        for part in parts:
            values = model[part.key]
            if part.share:
                start, stop, total = part.share
                values = values[len(values) * start // total : len(values) * stop // total]
            if part.operation == "swap":
                values = np.concatenate([values[len(values) // 2 :], values[: len(values) // 2]])
            pieces.append(
                {
                    "transpose": lambda v: v.T,
                    "linear": lambda v: v.reshape(v.shape[:2]),
                    "conv": lambda v: v[..., None, None],
                }.get(part.operation, lambda v: v)(values)
            )
        found[key] = np.ascontiguousarray(np.concatenate(pieces))
    return found


def write(path: Path, model: Mapping[str, Any]) -> Path:
    return tiny.write(path, {key: ("F32", np.asarray(values, np.float32)) for key, values in model.items()})


MODULES = {
    ("flux1-dev", "flux1", "transformer", "bfl", ""): (
        "double_blocks.0.img_attn.qkv",
        "single_blocks.3.linear1",
        "single_blocks.3.linear2",
        "final_layer.adaLN_modulation.1",
        "double_blocks.1.txt_mlp.0",
    ),
    ("sd3-medium", "sd3", "transformer", "sai", UNET): (
        "joint_blocks.0.x_block.attn.qkv",
        "joint_blocks.23.context_block.adaLN_modulation.1",
        "joint_blocks.2.context_block.mlp.fc1",
    ),
    ("sdxl", "sdxl", "unet", "sgm", UNET): (TO_K, FF, CONV, PROJ),
}


@pytest.mark.parametrize("family", ["lora_alpha", "dora", "loha"])
@pytest.mark.parametrize("case", MODULES, ids=lambda case: case[0])
def test_both_layouts_of_a_model_become_the_same(small_checkpoint, tmp_path, case, family):
    name, family_of_model, component, layout, prefix = case
    file = checkpoint(tmp_path / "m.safetensors") if name == "sdxl" else small_checkpoint(name, dtype="F32")
    model = {k.removeprefix(prefix): v for k, v in arrays(file).items() if prefix in k}
    stems = {DIFFUSION + module: model[f"{module}.weight"].shape for module in MODULES[case]}
    file = lora_file(tmp_path / "x.safetensors", stems, family)
    made = made_of(family_of_model, component, layout, "diffusers", model)
    twin = write(tmp_path / "twin.safetensors", relaid(model, made))
    own = write(tmp_path / "own.safetensors", model)
    wanted = relaid(saved(tmp_path / "a.safetensors", model=own, lora=[(file, 0.7)]), made)
    found = saved(tmp_path / "b.safetensors", model=twin, lora=[(file, 0.7)])
    assert found.keys() == wanted.keys()
    before = relaid(model, made)
    changed = [key for key in wanted if not np.array_equal(wanted[key], before[key])]
    assert len(changed) >= len(stems)
    for key in wanted:
        assert np.allclose(found[key], wanted[key], rtol=1e-5, atol=1e-6), key


@pytest.mark.parametrize("family", ["lora_alpha", "dora", "oft"])
def test_adapters_in_the_other_spelling_change_rows(small_checkpoint, tmp_path, family):
    """Stems of diffusers' layout on a model of Black Forest Labs': q, k and v are rows, halves are swapped."""
    model = arrays(small_checkpoint("flux1-dev", dtype="F32"))
    made = made_of("flux1", "transformer", "bfl", "diffusers", model)
    twin = relaid(model, made)
    names = ["transformer_blocks.0.attn.to_k", "single_transformer_blocks.3.proj_mlp", "norm_out.linear"]
    stems = {f"transformer.{name}": twin[f"{name}.weight"].shape for name in names}
    file = lora_file(tmp_path / "x.safetensors", stems, family)
    own, other = write(tmp_path / "own.safetensors", model), write(tmp_path / "twin.safetensors", twin)
    wanted = saved(tmp_path / "b.safetensors", model=other, lora=[file])
    found = relaid(saved(tmp_path / "a.safetensors", model=own, lora=[file]), made)
    assert sorted(key for key in twin if not np.array_equal(wanted[key], twin[key])) == sorted(
        f"{name}.weight" for name in names
    )
    assert all(np.allclose(found[key], wanted[key], rtol=1e-5, atol=1e-6) for key in twin)


def test_openclip_has_q_k_v_in_one_and_its_projection_transposed(sdxl, tmp_path):
    before = arrays(sdxl)
    prefix, width = CLIP_G, 8
    q, projection = "text_model.encoder.layers.3.self_attn.q_proj", "text_projection"
    stems = {f"lora_te2_{name.replace('.', '_')}": (width, width) for name in (q, projection)}
    file = lora_file(tmp_path / "x.safetensors", stems)
    parts = arrays(file)
    deltas = [parts[f"{s}.lora_up.weight"] @ parts[f"{s}.lora_down.weight"] * 0.75 / 2 for s in stems]
    after = saved(tmp_path / "out.safetensors", model=sdxl, lora=[file])
    fused, plain = f"{prefix}transformer.resblocks.3.attn.in_proj_weight", f"{prefix}text_projection"
    assert np.allclose(after[fused][:width], before[fused][:width] + deltas[0], atol=1e-6)
    assert np.array_equal(after[fused][width:], before[fused][width:])
    assert np.allclose(after[plain], before[plain] + deltas[1].T, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- strengths


@pytest.fixture
def two(sdxl: Path, tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A LoRA for the U-Net's IN04, OUT00 and the text encoder; name -> tensor."""
    keys = {
        "in": f"{UNET}{TO_K}.weight",
        "out": f"{UNET}{FF}.weight",
        "te": f"conditioner.embedders.0.transformer.{Q_PROJ}.weight",
    }
    stems = dict(zip(keys, (DIFFUSION + TO_K, DIFFUSION + FF, TE + Q_PROJ), strict=True))
    before = arrays(sdxl)
    return lora_file(tmp_path / "x.safetensors", {stems[n]: before[k].shape for n, k in keys.items()}), keys


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", (1, 1, 1)),
        ("0.5", (0.5, 0.5, 0.5)),
        ("-1.5", (-1.5, -1.5, -1.5)),
        ("0.5:te=0.25", (0.5, 0.5, 0.25)),
        ("te=0:unet=2", (2, 2, 0)),
        ("0.5, OUT00-OUT08=0.1", (0.5, 0.1, 0.5)),
        ("1, *attn2*=0", (0, 1, 1)),
        ("0.5:lbw=0,1,0,0,0,0,0.5,0,0,0,0,0", (0.5, 0.25, 0)),
        ("2:lbw=NONE", (0, 0, 0)),
        ("1:te=3:lbw=0.5, OUT00=0.25", (0.5, 0.25, 1.5)),
        ("1:lbw=1, OUT00:ff:0.5", (1, 0.5, 1)),
    ],
)
def test_strengths(sdxl, tmp_path, two, text, wanted):
    file, keys = two
    before, out = arrays(sdxl), tmp_path / "out.safetensors"
    full = saved(out, model=sdxl, lora=[file])
    found = saved(out, model=sdxl, lora=[f"{file}:{text}" if text else str(file)])
    for key, strength in zip(keys.values(), wanted, strict=True):
        assert np.allclose(found[key], before[key] + strength * (full[key] - before[key]), atol=1e-6)


def test_strengths_from_python(sdxl, tmp_path, two):
    file, keys = two
    before, out = arrays(sdxl), tmp_path / "out.safetensors"
    full, found = saved(out, model=sdxl, lora=[file]), saved(out, model=sdxl, lora=[(file, {"": 0.5, "OUT00": 0.0})])
    assert np.array_equal(found[keys["out"]], before[keys["out"]])
    key = keys["in"]
    assert np.allclose(found[key], (before[key] + full[key]) / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("strong", "neither a number nor a rule"),
        ("0.5:te=high", "neither a number nor a rule"),
        ("0.5:te=0.1:te=0.2", "given twice"),
        ("0.5, IN77=1", "is no block or component"),
        ("0.5:lbw=1,2,3", "3 block weights do not fit"),
        ("0.5, *nothing*=1", "matches none of"),
        ("0.5:te=0.1, IN04=2", "`te of x.safetensors`"),
    ],
)
def test_strengths_that_make_no_sense(sdxl, two, text, message):
    with pytest.raises(UsageError, match=message):
        apply(sdxl, lora=[f"{two[0]}:{text}"])


def test_files_and_options_are_told_apart(tmp_path):
    (tmp_path / "a:0.5").touch()
    assert split_file(f"{tmp_path}/a:0.5") == (f"{tmp_path}/a:0.5", "")
    assert split_file(f"{tmp_path}/a:0.5:0.7:te=1") == (f"{tmp_path}/a:0.5", "0.7:te=1")
    assert split_file("absent.safetensors:0.7") == ("absent.safetensors", "0.7")
    assert split_file("absent.safetensors") == ("absent.safetensors", "")
    assert split_options("") == ("1", {})
    assert split_options("te=0.3") == ("1", {"te": "0.3"})
    assert split_options("0.5:lbw=OUT03-OUT05:attn:0.5:unet=2") == ("0.5", {"lbw": "OUT03-OUT05:attn:0.5", "unet": "2"})


# -------------------------------------------------------------------------------------------------------- refusals


def small_lora(path: Path, changes: Mapping[str, Any] = {}, drop: str = "") -> Path:
    found = dict(loras.FAMILIES["lora_alpha"]((4, 4), 2, np.random.default_rng(0)))
    stem = f"{DIFFUSION}{TO_K}"
    return loras.save(path, {stem + k: v for k, v in (found | dict(changes)).items() if k != drop}, SAYS_SDXL)


def refuse(error: type[SdopsError], message: str, tmp_path: Path, model: Path, *files: Path, **options: Any) -> None:
    """Nothing is written, whatever stands in the way."""
    out = tmp_path / "out" / "out.safetensors"
    out.parent.mkdir()
    with pytest.raises(error, match=message) as caught:
        apply(model, lora=list(files), output=out, **options)
    assert caught.value.hint
    assert list(out.parent.iterdir()) == []


def test_a_lora_for_another_architecture(small_checkpoint, sdxl, tmp_path, two):
    refuse(
        MismatchError,
        "is for Stable Diffusion XL, .* is Stable Diffusion 1",
        tmp_path,
        small_checkpoint("sd15"),
        two[0],
    )


def test_layers_that_the_model_lacks_are_named(sdxl, tmp_path, two):
    file, keys = two
    model = {key: t for key, t in tiny.load(sdxl).items() if key.startswith(UNET) and key != keys["out"]}
    unet = tiny.write(tmp_path / "unet.safetensors", model)
    refuse(MismatchError, f"changes 2 layers .* does not have: `unet:{FF}`, `clip_l:{Q_PROJ}`", tmp_path, unet, file)
    out = tmp_path / "out.safetensors"
    report = apply(unet, lora=[file], output=out, allow_unmatched=True)
    assert report.data["loras"][0]["unmatched"] == [f"unet:{FF}", f"clip_l:{Q_PROJ}"]
    assert "2 layers" in report.warnings[0]
    # what has no strength is not missed
    with pytest.raises(MismatchError, match="changes 1 layer "):
        apply(unet, lora=[f"{file}:te=0"], output=out, force=True)


def test_half_a_pair(sdxl, tmp_path):
    file = small_lora(tmp_path / "x.safetensors", drop=".lora_down.weight")
    refuse(FormatError, "is incomplete", tmp_path, sdxl, file)


def test_wrong_shapes_are_named(sdxl, tmp_path):
    file = small_lora(tmp_path / "x.safetensors")
    message = rf"`{DIFFUSION}{TO_K}.lora_up.weight` of `x.safetensors`, for `unet:{TO_K}`: .*\[4, 2\] does not fit"
    refuse(MismatchError, message, tmp_path, sdxl, file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {".lora_up.weight": np.zeros((4, 0), np.float16), ".lora_down.weight": np.zeros((0, 4), np.float16)},
            "is empty",
        ),
        ({".alpha": np.array(0, np.float32)}, "alpha` .* is 0"),
        ({".alpha": np.array(np.nan, np.float32)}, "alpha` .* is nan"),
        ({".lora_up.weight": np.zeros((4, 3), np.float16)}, "the other parts ask for"),
        ({".lora_sideways.weight": np.zeros((4, 3), np.float16)}, "nothing here understands"),
    ],
)
def test_damaged_loras(sdxl, tmp_path, changes, message):
    refuse(FormatError, message, tmp_path, sdxl, small_lora(tmp_path / "x.safetensors", changes))


@pytest.mark.parametrize("dry", [False, True])
def test_nan_in_a_lora_is_found_before_anything_is_written(sdxl, tmp_path, two, dry):
    found = {key: t[1] for key, t in tiny.load(two[0]).items()}
    name = f"{DIFFUSION}{TO_K}.lora_down.weight"
    found[name] = found[name].copy()
    found[name][0, 1] = np.inf
    file = loras.save(tmp_path / "nan.safetensors", found)
    if dry:
        with pytest.raises(FormatError, match=name):
            apply(sdxl, lora=[file]).dry_run(tmp_path / "out.safetensors")
    else:
        refuse(FormatError, f"`{name}` of `nan.safetensors` holds 1 number", tmp_path, sdxl, file)


def test_a_file_cut_short(sdxl, tmp_path, two):
    data = two[0].read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
    refuse(FormatError, "cut", tmp_path, sdxl, tmp_path / "cut.safetensors")


def test_words_and_roles(sdxl, tmp_path, two):
    with pytest.raises(UsageError, match="no LoRA"):
        apply(sdxl, lora=[])
    with pytest.raises(UsageError, match="`rounding` cannot be `up`"):
        apply(sdxl, lora=[two[0]], rounding="up")
    with pytest.raises(UsageError, match="is an adapter itself"):
        apply(two[0], lora=[two[0]])
    with pytest.raises(FormatError, match="no adapter"):
        apply(sdxl, lora=[sdxl])
    with pytest.raises(SdopsError, match="absent"):
        apply(sdxl, lora=[f"{tmp_path}/absent.safetensors:0.4"])
    with pytest.raises(OutputError, match="input"):
        apply(sdxl, lora=[two[0]], output=two[0], force=True)


# ------------------------------------------------------------------------------------------- dtypes, rounding, fp8


def test_what_a_half_swallows_is_told_with_a_cure(tmp_path, two):
    model, out = checkpoint(tmp_path / "bf16.safetensors", "BF16"), tmp_path / "out.safetensors"
    report = apply(model, lora=[(two[0], 0.003)], output=out)
    assert 0 <= report.data["kept_overall"] < 0.9
    assert sorted(report.data["kept"]) == sorted(two[1].values())
    assert any("rounding to BF16 kept only" in text and "--rounding stochastic" in text for text in report.warnings)
    for cure in ({"touched_dtype": "fp32"}, {"dtype": "fp32"}):
        report = apply(model, lora=[(two[0], 0.003)], output=out, force=True, **cure)
        assert report.data["kept_overall"] == pytest.approx(1, abs=0.001)
        assert report.warnings == []
    rounded = apply(model, lora=[(two[0], 0.003)], output=out, force=True, rounding="stochastic", seed=1)
    assert rounded.data["kept_overall"] == pytest.approx(1, abs=0.3)
    assert rounded.data["recipe"]["seed"] == 1


def test_dtypes_of_the_result(half, tmp_path, two):
    out = tmp_path / "out.safetensors"
    before = {key: t[0] for key, t in tiny.load(half).items()}
    saved(out, model=half, lora=[two[0]], touched_dtype="fp32")
    after = {key: t[0] for key, t in tiny.load(out).items()}
    assert after == before | dict.fromkeys(two[1].values(), "F32")
    saved(out, model=half, lora=[two[0]], dtype="bf16")
    assert {key: "BF16" if dtype == "F16" else dtype for key, dtype in before.items()} == {
        key: t[0] for key, t in tiny.load(out).items()
    }


@pytest.mark.parametrize("scaled", [True, False])
def test_fp8_weights_stay_fp8(half, tmp_path, two, scaled):
    model = {}
    for key, (dtype, array) in tiny.load(half).items():
        if key.startswith(UNET) and array.ndim == 2:
            scale = (float(np.abs(array.astype(np.float32)).max()) / 448 or 1.0) if scaled else 1.0
            codes = torch.from_numpy(array.astype(np.float32) / scale).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
            model[key] = ("F8_E4M3", codes)
            if scaled:
                model[key.removesuffix("weight") + "scale_weight"] = ("F32", np.array(scale, np.float32))
        else:
            model[key] = (dtype, array)
    file, out = tiny.write(tmp_path / "fp8.safetensors", model), tmp_path / "out.safetensors"

    def weight(found: Mapping[str, Any], key: str) -> Any:
        dtype, array = found[key]
        if dtype != "F8_E4M3":
            return tiny.numbers((dtype, array))
        values = torch.from_numpy(np.array(array)).view(torch.float8_e4m3fn).double().numpy()
        return values * (found[key.removesuffix("weight") + "scale_weight"][1] if scaled else 1.0)

    exact = apply(file, lora=[(two[0], 1.0)], dtype="fp32", output=out)
    assert exact.data["kept_overall"] == pytest.approx(1, abs=1e-4)
    wanted = arrays(out)
    apply(file, lora=[(two[0], 1.0)], output=out, force=True)
    found = tiny.load(out)
    assert {k: (t[0], np.shape(t[1])) for k, t in found.items()} == {
        k: (t[0], np.shape(t[1])) for k, t in model.items()
    }
    for key in (two[1]["in"], two[1]["out"]):
        floor = abs(wanted[key]).max() / 448 * 2**-9 if scaled else 2**-10
        assert np.all(abs(weight(found, key) - wanted[key]) <= abs(wanted[key]) * 2**-4 + floor)
    apply(file, lora=[(two[0], 1.0)], output=out, force=True, touched_dtype="bf16")
    found = tiny.load(out)
    assert found[two[1]["in"]][0] == "BF16"
    assert two[1]["in"].removesuffix("weight") + "scale_weight" not in found
    assert np.allclose(weight(found, two[1]["in"]), wanted[two[1]["in"]], rtol=2**-8)


# -------------------------------------------------------------------------------------- files, recipes, workers


def test_the_file_tells_how_it_was_made(sdxl, tmp_path, two):
    out = tmp_path / "out.safetensors"
    report = apply(sdxl, lora=[f"{two[0]}:0.8:te=0.5"], output=out)
    text = tiny.metadata_of(out)
    made = json.loads(text["sdops"])
    assert made["verb"] == "apply"
    assert [item["role"] for item in made["inputs"]] == ["model", "lora1"]
    for item, path in zip(made["inputs"], (sdxl, two[0]), strict=True):
        assert item["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert item["file"] == path.name
    assert made["inputs"][1]["strength"] == {"strength": 0.8, "te": 0.5}
    assert str(tmp_path) not in "".join(text.values())
    assert report.data["recipe"] == made
    assert report.result == [str(out)]
    assert apply(sdxl, lora=[f"{two[0]}:0.8"]).name == f"{sdxl.stem}+x0.8.safetensors"
    plain = apply(sdxl, lora=[two[0]], output=out, force=True, hash_inputs=False)
    assert "sha256" not in json.dumps(plain.data["recipe"])


@pytest.mark.parametrize("family", ["lora_alpha", "dora"])
def test_any_number_of_workers_gives_the_same_bytes(half, tmp_path, family):
    modules = [TO_K, FF, CONV, PROJ]
    stems = {DIFFUSION + m: shape_of(half, f"{UNET}{m}.weight") for m in modules}
    file = lora_file(tmp_path / "x.safetensors", stems, family)
    outs = [tmp_path / f"{jobs}.safetensors" for jobs in (1, 2, 5)]
    for jobs, out in zip((1, 2, 5), outs, strict=True):
        apply(half, lora=[file], output=out, jobs=jobs, rounding="stochastic")
    assert len({out.read_bytes() for out in outs}) == 1


def test_processes_give_the_same_bytes_as_threads(half, tmp_path, two):
    out, forked = tmp_path / "out.safetensors", tmp_path / "forked.safetensors"
    apply(half, lora=[two[0]], output=out, jobs=1, rounding="stochastic")
    code = (
        "import sys, sdops, sdops.core.run as run; run.FORK_BYTES = 0\n"
        "report = sdops.apply(sys.argv[1], lora=[sys.argv[2]], output=sys.argv[3], jobs=3, rounding='stochastic')\n"
        "print(len(report.data['kept']), 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(half), str(two[0]), str(forked)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["3", "False"]  # plain LoRAs need no torch
    assert forked.read_bytes() == out.read_bytes()


def test_a_dry_run_tells_what_would_change(sdxl, tmp_path, two):
    made = apply(sdxl, lora=[f"{two[0]}:0.8"])
    report = made.dry_run(tmp_path / "out.safetensors")
    facts = report.data["loras"][0]
    assert facts["modules"] == {"unet": 2, "clip_l": 1}
    assert facts["families"] == {"lora": 3}
    assert facts["ranks"] == {"2": 3}
    assert facts["dialect"] == "comfy"
    assert report.data["tensors"]["changed"] == 3
    assert report.data["dry_run"]
    assert not (tmp_path / "out.safetensors").exists()
    assert "2 of unet, 1 of clip_l" in str(report)


def test_another_base_is_told(sdxl, tmp_path):
    stem = {DIFFUSION + TO_K: shape_of(sdxl, f"{UNET}{TO_K}.weight")}
    own = hashlib.sha256(sdxl.read_bytes()[0x100000:0x110000]).hexdigest()[:8]
    for number, wrong in ((own, False), ("00000000", True)):
        said = {"ss_sd_model_hash": number, "ss_sd_model_name": "somebase.safetensors"}
        file = lora_file(tmp_path / f"{number}.safetensors", stem, metadata=said)
        assert any("somebase" in text for text in apply(sdxl, lora=[file]).warnings) == wrong


def test_nothing_to_do_is_told(sdxl, tmp_path, two):
    out = tmp_path / "out.safetensors"
    report = apply(sdxl, lora=[(two[0], 0.0)], output=out)
    assert any("nothing changes" in text for text in report.warnings)
    assert all(np.array_equal(values, arrays(out)[key]) for key, values in arrays(sdxl).items())


# ---------------------------------------------------------------------------------------------------- with a merge


def test_a_merge_with_loras_is_rounded_once(half, tmp_path, two):
    other, out = checkpoint(tmp_path / "b.safetensors", "F16", tuned=1), tmp_path / "out.safetensors"
    report = sdops.merge(half, other, alpha=0.3, lora=[f"{two[0]}:0.8"], output=out)
    assert report.verb == "merge"
    a, b = arrays(half), arrays(other)
    sdops.merge(half, other, alpha=0.3, dtype="fp32", output=tmp_path / "wide.safetensors")
    wide = saved(tmp_path / "exact.safetensors", model=tmp_path / "wide.safetensors", lora=[f"{two[0]}:0.8"])
    found = tiny.load(out)
    for key in two[1].values():
        assert found[key][0] == "F16"
        assert np.mean(tiny.numbers(found[key]) == tiny.numbers(tiny.encoded(wide[key], "F16"))) > 0.999
    rest = {key for key in a if key not in two[1].values() and found[key][0] == "F16"}
    plain = tmp_path / "plain.safetensors"
    sdops.merge(half, other, alpha=0.3, output=plain)
    merged = tiny.load(plain)
    assert all(tiny.same(found[key], merged[key]) for key in rest)
    assert b.keys() == a.keys()
    made = json.loads(tiny.metadata_of(out)["sdops"])
    assert made["inputs"][0]["recipe"]["inputs"][1]["sha256"] == hashlib.sha256(other.read_bytes()).hexdigest()


def test_merges_that_need_torch_take_loras_too(half, tmp_path, two):
    other, out = checkpoint(tmp_path / "b.safetensors", "F16", tuned=1), tmp_path / "out.safetensors"
    for method in ("slerp", "nuslerp"):
        sdops.merge(half, other, method=method, lora=[two[0]], output=out, force=True)
        sdops.merge(half, other, method=method, dtype="fp32", output=tmp_path / "wide.safetensors", force=True)
        wanted = saved(tmp_path / "exact.safetensors", model=tmp_path / "wide.safetensors", lora=[two[0]])
        for key in two[1].values():
            assert np.allclose(arrays(out)[key], wanted[key], rtol=2**-10, atol=1e-6)


def test_the_result_is_a_source(half, tmp_path, two):
    lazy = apply(half, lora=[two[0]])
    saved(tmp_path / "out.safetensors", model=half, lora=[two[0]])
    written = tiny.load(tmp_path / "out.safetensors")
    for key in two[1].values():
        assert bytes(read(lazy, key)) == np.ascontiguousarray(written[key][1]).tobytes()
    both = tmp_path / "both.safetensors"
    sdops.merge(lazy, half, alpha=0.5, output=both)
    made = json.loads(tiny.metadata_of(both)["sdops"])
    assert made["inputs"][0]["recipe"]["verb"] == "apply"
    assert prod(tiny.load(both)[two[1]["in"]][1].shape) > 0

"""Scaled fp8 in both spellings: scales, markers, values; read back by the opposite view; any number of workers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sdops.archs.delicate import is_coarse
from sdops.archs.quantised import quantised
from sdops.core import run as module
from sdops.core.quantised_views import Quantised
from sdops.core.run import run
from sdops.core.sink import SafetensorsSink
from sdops.core.source import read
from sdops.core.spec import Spec
from sdops.core.views import Dequantised
from sdops.errors import FormatError
from sdops.formats import open_source
from tests.archs import lists
from tests.tiny import Memory, Model

RNG = np.random.default_rng(0)
MODEL: Model = {
    "p.a.weight": ("F32", (RNG.standard_normal((300, 1001)) * 0.02).astype("f4")),
    "p.b.weight": ("F16", (RNG.standard_normal((7, 64)) * 3).astype("f2")),
    "p.zero.weight": ("F16", np.zeros((4, 4), "f2")),
    "p.a.bias": ("F32", np.ones(300, "f4")),
    "ids": ("I64", np.arange(4)),
}
WEIGHTS = dict.fromkeys(["p.a.weight", "p.b.weight", "p.zero.weight"], "F8_E4M3")


def fp8(key: str, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[bytes, np.float32]:
    """The definition: round(W / (max |W| / largest))."""
    weight = MODEL[key][1].astype("f4")
    scale = np.float32(np.abs(weight).max() / np.float32(torch.finfo(dtype).max)) or np.float32(1)
    return torch.from_numpy(weight / scale).to(dtype).view(torch.uint8).numpy().tobytes(), scale


@pytest.mark.parametrize("spelling", ["old", "new"])
@pytest.mark.parametrize(("name", "dtype"), [("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2)])
def test_values_scales_and_markers(spelling, name, dtype):
    view = Quantised(Memory(MODEL), dict.fromkeys(WEIGHTS, name), spelling=spelling, prefixes=["p.", "q."])
    scale_name = "scale_weight" if spelling == "old" else "weight_scale"
    for key in WEIGHTS:
        values, scale = fp8(key, dtype)
        assert view.specs[key] == Spec(name, MODEL[key][1].shape)
        assert read(view, key) == values
        place = key.replace("weight", scale_name)
        assert view.specs[place] == Spec("F32", ())
        assert np.frombuffer(read(view, place), "f4") == scale
    rest = set(view.specs) - set(MODEL) - {key.replace("weight", scale_name) for key in WEIGHTS}
    if spelling == "old":
        assert rest == {"p.scaled_fp8"}
        assert view.specs["p.scaled_fp8"] == Spec(name, (2,))
    else:
        assert rest == {key.replace("weight", "comfy_quant") for key in WEIGHTS}
        marker = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}[name]
        assert all(json.loads(bytes(read(view, key))) == {"format": marker} for key in rest)
    assert read(view, "ids") == read(Memory(MODEL), "ids")


@pytest.mark.parametrize("spelling", ["old", "new"])
def test_dequantising_gives_the_weights_back_to_half_a_step(spelling):
    back = Dequantised(Quantised(Memory(MODEL), WEIGHTS, spelling=spelling))
    assert list(back.specs) == list(MODEL)
    for key in WEIGHTS:
        before, after = MODEL[key][1].astype("f4").reshape(-1), np.frombuffer(read(back, key), "f4")
        scale = fp8(key)[1]
        step = np.maximum(2.0 ** np.floor(np.log2(np.maximum(np.abs(before / scale), 2.0**-6))), 2.0**-6) * 2.0**-3
        assert (np.abs(after - before) <= scale * step / 2 * (1 + 2.0**-20)).all()


def test_a_written_file_is_recognised(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(module, "FORK_BYTES", 0)
    written = []
    for jobs, forks in ((1, False), (3, False), (2, True)):
        monkeypatch.setattr(module, "can_fork", lambda forks=forks: forks)
        view = Quantised(Memory(MODEL), WEIGHTS, seed=1)
        with SafetensorsSink(tmp_path / "out.safetensors", view.specs, {}, force=True) as sink:
            run(view, sink, jobs=jobs)
            written.append(sink.commit().read_bytes())
    assert written[0] == written[1] == written[2]
    source = open_source(tmp_path / "out.safetensors")
    kinds = quantised(source.specs)
    assert {key: entry.kind for key, entry in kinds.items()} == dict.fromkeys(WEIGHTS, "fp8-scaled")
    source.close()


def test_any_part_may_be_read_and_each_weight_is_read_twice():
    source = Memory(MODEL)
    view = Quantised(source, WEIGHTS)
    read(view, "p.a.weight_scale")
    whole = read(view, "p.a.weight")
    assert source.reads["p.a.weight"] == 2 * source.specs["p.a.weight"].nbytes
    for start, count in ((0, 1), (77, 5000), (len(whole) - 3, 3)):
        part = bytearray(count)
        view.read_into("p.a.weight", start, memoryview(part))
        assert part == whole[start : start + count]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused(value):
    array = np.ones((3, 3), "f4")
    array[1, 1] = value
    with pytest.raises(FormatError, match=r"x\.weight"):
        read(Quantised(Memory({"x.weight": ("F32", array)}), {"x.weight": "F8_E4M3"}), "x.weight_scale")


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("flux1-dev-bfl-transformer", 0.99),
        ("flux1-schnell-diffusers-transformer", 0.99),
        ("t5xxl-hf", 0.96),
        ("sd35-large-sai", 0.96),
    ],
)
def test_what_is_coarse_is_most_of_a_model_and_none_of_its_ends(name, share):
    specs = lists.load(name)
    chosen = [key for key, spec in specs.items() if is_coarse(key.removeprefix("model.diffusion_model."), spec)]
    assert sum(specs[key].nbytes for key in chosen) >= share * sum(spec.nbytes for spec in specs.values())
    assert all(len(specs[key].shape) == 2 for key in chosen)
    ends = (
        "img_in",
        "final_layer",
        "x_embedder",
        "shared",
        "time_in",
        "t_embedder",
        "context_embedder",
        "proj_out.weight",
    )
    assert not [key for key in chosen if key.startswith(ends)]


@pytest.mark.parametrize(
    ("original", "diffusers", "prefixes"),
    [
        ("flux1-dev-bfl-transformer", "flux1-dev-diffusers", ("", "transformer/")),
        ("chroma-bfl-transformer", "chroma-diffusers-transformer", ("", "")),
        ("flux2-klein4b-bfl-transformer", "flux2-klein4b-diffusers-transformer", ("", "")),
        ("z-image-comfy-transformer", "z-image-diffusers-transformer", ("", "")),
        ("wan21-t2v-1.3b-native-transformer", "wan21-t2v-1.3b-diffusers-transformer", ("", "")),
        ("sd35-medium-sai", "sd35-medium-diffusers", ("model.diffusion_model.", "transformer/")),
        ("sdxl-base-sgm", "sdxl-base-diffusers", ("model.diffusion_model.", "unet/")),
        ("sd15-ldm", "sd15-diffusers", ("cond_stage_model.transformer.", "text_encoder/")),
        ("sd21-ldm", "sd21-diffusers", ("model.diffusion_model.", "unet/")),
    ],
)
def test_layouts_agree_on_what_is_coarse(original, diffusers, prefixes):
    """Numbers of elements, since names and cuts differ."""
    count = []
    for name, prefix in zip((original, diffusers), prefixes, strict=True):
        named = {key.removeprefix(prefix): spec for key, spec in lists.load(name).items() if key.startswith(prefix)}
        count.append(sum(spec.numel for key, spec in named.items() if is_coarse(key, spec)))
    assert count[0] == count[1] > 0

"""Whole models with real keys and shapes (their values are holes in the file), and oddities put into small ones."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdops.core.spec import DTYPE_BITS
from sdops.verbs.inspect import inspect

KEYS = Path(__file__).parents[2] / "fixtures" / "keys"
SHARED = Path(__file__).parents[3] / "shared" / "data"
IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Path]:
    """A sparse file with the keys of a real model; `drop` leaves a key out, `values` fills some in."""

    def make(
        name: str,
        *,
        drop: str = "",
        values: dict[str, np.ndarray] | None = None,
        metadata: dict[str, str] | None = None,
    ) -> Path:
        keys = json.loads(gzip.decompress((KEYS / f"{name}.json.gz").read_bytes()))
        header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        end = 0
        for key, (dtype, shape) in keys.items():
            if key != drop:
                begin, end = end, end + prod(shape) * DTYPE_BITS[dtype] // 8
                header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        path = tmp_path / f"{name}.safetensors"
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
            for key, array in (values or {}).items():
                file.seek(8 + len(text) + header[key]["data_offsets"][0])
                file.write(array.tobytes())
        return path

    return make


def look(path: Path, **options: Any) -> dict[str, Any]:
    data: dict[str, Any] = inspect(path, **options).data["files"][0]
    return data


@pytest.mark.parametrize(
    ("name", "family", "components"),
    [
        ("sd15-ldm", "sd1", {"unet": 686, "vae": 248, "clip_l": 196}),
        ("sd21-ldm", "sd2", {"unet": 686, "vae": 248, "clip_h": 292}),
        ("sdxl-base-sgm", "sdxl", {"unet": 1680, "vae": 248, "clip_l": 196, "clip_g": 388}),
        ("flux1-dev-comfy-allinone", "flux1", {"transformer": 780, "vae": 244, "clip_l": 196, "t5xxl": 219}),
        ("wan21-t2v-1.3b-native-transformer", "wan", {"transformer": 825}),
    ],
)
def test_models_and_their_components(name, family, components, model):
    data = look(model(name))
    assert data["architecture"] == family
    assert {part["name"]: part["expected"] for part in data["components"]} == components
    assert all(not part["missing"] and not part["extra"] for part in data["components"])
    assert data["unclaimed"] == []
    assert sum(part["bytes"] for part in data["components"]) <= data["bytes"]


def test_missing_keys_are_counted_listed_and_warned_of(model):
    lost = "first_stage_model.decoder.mid.block_1.norm1.weight"
    report = inspect(model("sd15-ldm", drop=lost))
    (vae,) = [part for part in report.data["files"][0]["components"] if part["name"] == "vae"]
    assert vae["missing"] == [lost]
    assert "247 of 248" in report.text()
    assert lost not in report.text()
    assert lost in report.text(detail=True)
    assert "`sd15-ldm.safetensors` lacks 1 key of its vae" in report.warnings


def test_junk_is_told_by_kind_with_its_size(model):
    data = look(model("sd15-ldm-with-ema"))
    assert data["junk"]["schedule"] == {"keys": 12, "bytes": 48_000}
    assert data["junk"]["ema"]["keys"] == 688
    assert "ema" in data["variants"]


@pytest.mark.parametrize(
    ("ids", "state"),
    [(np.arange(77), "ok"), (np.arange(77) - (np.arange(77) > 40), "broken"), (np.zeros(77, np.int64), "broken")],
)
def test_position_ids(ids, state, model):
    report = inspect(model("sd15-ldm", values={IDS: ids.astype(np.int64)}))
    assert report.data["files"][0]["position_ids"][IDS]["state"] == state
    assert any(IDS in warning for warning in report.warnings) is (state == "broken")


@pytest.mark.parametrize(("spread", "kind"), [(0.2, "v"), (0.03, "epsilon")])
def test_sd2_prediction_is_read_from_one_small_tensor(spread, kind, model):
    key = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    bias = np.where(np.arange(320) % 2, spread, -spread).astype(np.float32)
    assert look(model("sd21-ldm", values={key: bias}))["prediction"] == [f"likely {kind} (spread of a bias)"]


def test_all_keys_on_request(write):
    path = write("m.safetensors", {"a.b": ("F16", np.zeros((2, 3), np.float16))})
    assert "keys" not in look(path)
    report = inspect(path, keys=True)
    assert report.data["files"][0]["keys"] == {"a.b": {"dtype": "F16", "shape": [2, 3], "component": "other"}}
    assert "2x3" in report.text()


def test_hashes_on_request(write):
    import hashlib

    path = write("m.safetensors", {"a": ("F16", np.zeros(2, np.float16))})
    assert "hashes" not in look(path)
    (hashes,) = look(path, hashes=True)["hashes"]
    assert hashes["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_unknown_is_an_answer(write):
    report = inspect(write("m.safetensors", {"a": ("F16", np.zeros(2, np.float16))}))
    assert report.data["files"][0]["architecture"] == "unknown"
    assert report.data["files"][0]["unclaimed"] == ["a"]
    assert not report.failed
    assert report.result[0].endswith("m.safetensors: unknown")


def test_metadata_long_values_are_cut_on_screen_and_whole_in_the_data(write):
    metadata = {
        "modelspec.title": "Title",
        "modelspec.thumbnail": "data:" + "A" * 50_000,
        "ss_network_dim": "32",
        "ss_tag_frequency": "{}",
        "evil\x1b[2J": "x\ny\x07",
        "sd_merge_recipe": "{}",
    }
    report = inspect(write("m.safetensors", {"a": ("F16", np.zeros(2, np.float16))}, metadata))
    assert report.data["files"][0]["metadata"] == metadata
    text = report.text()
    assert max(map(len, text.splitlines())) < 200
    assert "characters)" in text
    assert "evil\\x1b[2J" in text
    assert "x\\ny\\x07" in text
    assert "ss_tag_frequency" not in text
    assert "ss_tag_frequency" in report.text(detail=True)
    assert "1 more entry, shown with `-v`" in text
    order = [text.index(key) for key in ("modelspec.title", "sd_merge_recipe", "ss_network_dim", "evil")]
    assert order == sorted(order)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_fp8_is_told(dtype, write):
    path = write("m.safetensors", {"a.weight": (dtype, np.zeros((2, 2), np.uint8))})
    assert look(path)["quantised"] == ["fp8: 1 tensor"]


def test_the_data_are_json(model):
    report = inspect(model("sd15-ldm-with-ema"), keys=True)
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False)) == report.as_dict()


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("loras/catundchat_sd15_diffusers_old.safetensors", "Adapter"),
        ("loras/lycoris_lokr_r8_sd1_kohya_names.safetensors", "Adapter"),
        ("loras/cloneofsimo_lora_disney.safetensors", "Adapter"),
        ("loras/cloneofsimo_lora_kiriko2.ti.pt", "Embedding"),
        ("embeddings/fastai_learned_embeds.bin", "Embedding"),
    ],
)
def test_real_files(name, title):
    data = look(SHARED / name)
    assert title in data["title"]
    assert data["tensors"] > 0

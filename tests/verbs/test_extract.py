"""`extract` from file to file: the factors against the difference, ranks, what is left out, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdops
from sdops.errors import FormatError, MismatchError, OutputError, UsageError
from sdops.verbs._adapters import open_adapter, read_parts
from tests import tiny

OPENCLIP = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"
CONV = f"{tiny.UNET}input_blocks.4.0.in_layers.2.weight"
ATTENTION = "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_k"
FC1 = f"{tiny.CLIP}encoder.layers.0.mlp.fc1.weight"
Arrays = dict[str, Any]


def low_rank(shape: tuple[int, ...], rank: int, seed: int = 0) -> Any:
    """A change of exactly this rank, well above the rounding of float16 weights of 0.05."""
    random = np.random.default_rng(seed)
    columns = int(np.prod(shape[1:]))
    made = random.standard_normal((shape[0], rank)) @ random.standard_normal((rank, columns))
    return 0.01 * made.reshape(shape) / np.sqrt(rank)


def tuned_of(base: tiny.Model, changes: Arrays, dtype: str = "F16") -> tiny.Model:
    return base | {key: tiny.encoded(tiny.numbers(base[key]) + change, dtype) for key, change in changes.items()}


@pytest.fixture(scope="module")
def base() -> tiny.Model:
    fc1 = tiny.encoded(0.05 * np.random.default_rng(5).standard_normal((24, 32)), "F16")
    return tiny.checkpoint(0) | {FC1: fc1}


@pytest.fixture(scope="module")
def tuned(base: tiny.Model) -> tiny.Model:
    changes = {
        tiny.LARGE: low_rank((320, 768), 4),
        CONV: low_rank((6, 5, 3, 3), 2),
        FC1: low_rank((24, 32), 3),
        f"{tiny.UNET}out.0.weight": 0.01 * np.ones(9),
        f"{tiny.UNET}out.2.bias": 0.01 * np.ones(4),
    }
    return tuned_of(base, changes)


@pytest.fixture
def files(tmp_path: Path, base: tiny.Model, tuned: tiny.Model) -> tuple[Path, Path]:
    return tiny.write(tmp_path / "t.safetensors", tuned), tiny.write(tmp_path / "b.safetensors", base)


def deltas(path: Path) -> dict[str, Any]:
    """Layer -> its change, by the shelves that read adapters."""
    from sdops import adapters

    adapter = open_adapter(path)
    found = {}
    for patch in adapter.patches:
        parts = {name: value.double() for name, value in read_parts(adapter, patch).items()}
        if patch.family == "lora":
            shape = (parts["up"].shape[0], *parts["down"].shape[1:])
            found[str(patch.target)] = adapters.family("lora").delta(parts, shape).numpy()
        else:
            found |= {f"{patch.target}.{part}": value.numpy() for part, value in parts.items()}
    return found


def layers(report: sdops.Report) -> dict[str, Any]:
    return {layer["module"]: layer for layer in report.data["layers"]}


def change(base: tiny.Model, tuned: tiny.Model, key: str) -> Any:
    return tiny.numbers(tuned[key]) - tiny.numbers(base[key])


def test_the_noise_floor_finds_the_rank_of_every_layer(
    files: tuple[Path, Path], base: tiny.Model, tuned: tiny.Model, tmp_path: Path
) -> None:
    report = sdops.extract(files[0], base=files[1], output=tmp_path / "l.safetensors")
    found = {name.rpartition(".")[2]: layer["rank"] for name, layer in layers(report).items() if layer["rank"]}
    assert found == {"to_k": 4, "2": 2, "fc1": 3}
    made = deltas(tmp_path / "l.safetensors")
    assert len(made) == 3
    for key in (tiny.LARGE, CONV, FC1):
        wanted = change(base, tuned, key)
        close = [np.linalg.norm(m - wanted) for m in made.values() if m.shape == wanted.shape]
        assert min(close) <= 0.02 * np.linalg.norm(wanted)


def test_names_and_metadata_are_kohyas(files: tuple[Path, Path], tmp_path: Path) -> None:
    sdops.extract(files[0], base=files[1], output=tmp_path / "l.safetensors", rank=2)
    made, header = tiny.load(tmp_path / "l.safetensors"), tiny.metadata_of(tmp_path / "l.safetensors")
    assert made[f"{ATTENTION}.lora_up.weight"][1].shape == (320, 2)
    assert made[f"{ATTENTION}.lora_down.weight"][1].shape == (2, 768)
    assert made[f"{ATTENTION}.alpha"][0] == "F32"
    assert float(made[f"{ATTENTION}.alpha"][1]) == 2
    assert any(key.startswith("lora_te_text_model_encoder_layers_0_mlp_fc1.") for key in made)
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("2", "2")
    assert header["ss_network_module"] == "networks.lora"
    assert header["modelspec.architecture"] == "stable-diffusion-v1/lora"
    recipe = json.loads(header["sdops"])
    assert (recipe["verb"], recipe["rank"], [i["role"] for i in recipe["inputs"]]) == ("extract", 2, ["tuned", "base"])
    assert all(len(i["sha256"]) == 64 for i in recipe["inputs"])


@pytest.mark.parametrize("svd", ["auto", "exact", "gram", "krylov"])
def test_the_error_is_the_optimum_and_as_reported(
    svd: str, files: tuple[Path, Path], base: tiny.Model, tuned: tiny.Model, tmp_path: Path
) -> None:
    report = sdops.extract(
        files[0], base=files[1], output=tmp_path / "l.safetensors", rank=3, svd=svd, dtype="fp32", include=["*attn2*"]
    )
    wanted = change(base, tuned, tiny.LARGE)
    (made,) = (m for m in deltas(tmp_path / "l.safetensors").values() if m.shape == wanted.shape)
    measured = np.linalg.norm(made - wanted)
    best = np.sqrt(np.square(np.linalg.svd(wanted, compute_uv=False)[3:]).sum())
    assert measured <= 1.001 * best
    (layer,) = (layer for layer in report.data["layers"] if layer["rank"])
    assert np.isclose(np.sqrt(1 - layer["captured"]), measured / np.linalg.norm(wanted), rtol=1e-3)
    assert np.isclose(report.data["error"], measured / np.linalg.norm(wanted), rtol=1e-3)


def test_extracting_and_adding_gives_the_tuned_weights(tmp_path: Path, base: tiny.Model, tuned: tiny.Model) -> None:
    source, bottom = tiny.Memory(tuned, "t"), tiny.Memory(base, "b")
    sdops.extract(source, base=bottom, output=tmp_path / "l.safetensors", rank=400, dtype="fp32", norms=True, bias=True)
    made = deltas(tmp_path / "l.safetensors")
    for key in (tiny.LARGE, CONV, FC1, f"{tiny.UNET}out.0.weight", f"{tiny.UNET}out.2.bias"):
        wanted = change(base, tuned, key)
        assert min(np.abs(m - wanted).max() for m in made.values() if m.shape == wanted.shape) <= 1e-7


def test_ranks_by_kind_of_layer(files: tuple[Path, Path], tmp_path: Path) -> None:
    report = sdops.extract(
        files[0], base=files[1], output=tmp_path / "l.safetensors", rank=4, conv_rank=1, te_rank=2, include=["*"]
    )
    by_kind = {
        (layer["kind"], layer["rank"]) for layer in report.data["layers"] if layer["rank"] and not layer["dense"]
    }
    assert by_kind == {("linear", 4), ("conv", 1), ("te", 2)}


@pytest.mark.parametrize(
    ("rule", "rank"),
    [({"energy": 0.999}, 4), ({"ratio": 0.1}, 4), ({"absolute": 0.5}, 4), ({"max_rank": 3}, 3), ({"absolute": 1e3}, 0)],
)
def test_rules(rule: dict[str, Any], rank: int, files: tuple[Path, Path], tmp_path: Path) -> None:
    if not rank:
        with pytest.raises(MismatchError, match="keeps nothing"):
            sdops.extract(files[0], base=files[1], output=tmp_path / "l.safetensors", **rule)
        return
    report = sdops.extract(files[0], base=files[1], output=tmp_path / "l.safetensors", **rule)
    assert next(layer["rank"] for layer in report.data["layers"] if layer["module"].endswith("to_k")) == rank


def test_lycoris_quantile_sums_values_not_squares(
    files: tuple[Path, Path], base: tiny.Model, tuned: tiny.Model
) -> None:
    output = files[0].parent / "l.safetensors"
    report = sdops.extract(files[0], base=files[1], output=output, quantile=0.2, include=["*input_blocks.2*attn2*"])
    values = np.linalg.svd(change(base, tuned, tiny.LARGE), compute_uv=False)
    assert report.data["layers"][0]["rank"] == max((values.cumsum() < 0.2 * values.sum()).sum(), 1)


@pytest.mark.parametrize("budget", [6_000, 12_000, 10**9])
def test_a_budget_is_kept_and_spent(budget: int, files: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "l.safetensors"
    report = sdops.extract(files[0], base=files[1], output=output, budget=budget, hash_inputs=False)
    data = sum(array.nbytes for _, array in tiny.load(output).values())
    assert data <= budget
    assert not any(layer["dense"] for layer in report.data["layers"])
    if budget > 10**6:
        assert report.data["captured"] > 0.99


def test_any_number_of_threads_gives_the_same_bytes(files: tuple[Path, Path], tmp_path: Path) -> None:
    for rule in ({"rank": 2}, {"budget": 8000}, {}):
        made = []
        for jobs in (1, 4):
            sdops.extract(
                files[0],
                base=files[1],
                output=tmp_path / "l.safetensors",
                jobs=jobs,
                force=True,
                **rule,
            )
            made.append((tmp_path / "l.safetensors").read_bytes())
        assert made[0] == made[1]


def test_the_base_may_have_other_prefixes_and_dtypes(base: tiny.Model, tuned: tiny.Model, tmp_path: Path) -> None:
    other = {key.removeprefix(tiny.UNET): value for key, value in base.items() if key.startswith(tiny.UNET)}
    wide = {key: tiny.encoded(tiny.numbers(value), "F32") for key, value in other.items()}
    report = sdops.extract(tiny.Memory(tuned), base=tiny.Memory(wide), output=tmp_path / "l.safetensors", rank=4)
    assert layers(report)["input_blocks.2.1.transformer_blocks.0.attn2.to_k"]["captured"] > 0.99


@pytest.mark.parametrize("to", ["comfy", "diffusers", "onetrainer"])
def test_every_dialect_holds_the_same(to: str, files: tuple[Path, Path], tmp_path: Path) -> None:
    sdops.extract(files[0], base=files[1], output=tmp_path / "k.safetensors", rank=2)
    sdops.extract(files[0], base=files[1], output=tmp_path / "l.safetensors", rank=2, to=to)
    first, second = deltas(tmp_path / "k.safetensors"), deltas(tmp_path / "l.safetensors")
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[key], second[key]) for key in first)


def test_norms_and_biases_are_kept_on_request(files: tuple[Path, Path], tmp_path: Path) -> None:
    without = sdops.extract(files[0], base=files[1], output=tmp_path / "l.safetensors", rank=2)
    assert without.data["left_out"]["norm"] == 3
    sdops.extract(files[0], base=files[1], output=tmp_path / "n.safetensors", rank=2, norms=True, bias=True)
    made = tiny.load(tmp_path / "n.safetensors")
    assert made.keys() - tiny.load(tmp_path / "l.safetensors").keys() == {
        "lora_unet_conv_norm_out.w_norm",
        "lora_unet_conv_out.diff_b",
    }
    np.testing.assert_allclose(made["lora_unet_conv_out.diff_b"][1], 0.01, atol=1e-4)


def test_equal_models_are_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="same weights"):
        sdops.extract(files[1], base=files[1], output=tmp_path / "l.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.safetensors", "t.safetensors"]


def test_a_foreign_base_is_noticed(tmp_path: Path) -> None:
    other = {k: tiny.encoded(-tiny.numbers(v), "F16") if v[0] == "F16" else v for k, v in tiny.checkpoint(0).items()}
    report = sdops.extract(
        tiny.Memory(tiny.checkpoint(0)), base=tiny.Memory(other), output=tmp_path / "l.safetensors", rank=2
    )
    assert any("hardly the base" in text for text in report.warnings)
    near = sdops.extract(
        tiny.Memory(tiny.checkpoint(1)), base=tiny.Memory(tiny.checkpoint(0)), output=tmp_path / "n.safetensors", rank=2
    )
    assert not near.warnings


def test_an_inpainting_base_is_noticed(base: tiny.Model, tuned: tiny.Model, tmp_path: Path) -> None:
    inpainting = base | {tiny.FIRST: tiny.encoded(np.zeros((320, 9, 3, 3)), "F16")}
    report = sdops.extract(tiny.Memory(tuned), base=tiny.Memory(inpainting), output=tmp_path / "l.safetensors", rank=2)
    assert any("9" in text and "channels" in text for text in report.warnings)
    assert report.data["left_out"]["first layers of different width"] == 1


def test_moving_averages_and_predictions_are_noticed(base: tiny.Model, tuned: tiny.Model, tmp_path: Path) -> None:
    ema = {f"model_ema.{key[6:].replace('.', '')}": value for key, value in tuned.items() if key.startswith("model.")}
    marked = tiny.Memory(tuned | ema | {"v_pred": ("F32", np.zeros(0, "f4"))}, "marked")
    plain = tiny.Memory(base, "plain")
    plain.metadata = {"modelspec.prediction_type": "epsilon"}
    report = sdops.extract(marked, base=plain, output=tmp_path / "l.safetensors", rank=2)
    assert any("EMA" in text for text in report.warnings)
    assert any("predicts v" in text for text in report.warnings)


def test_other_shapes_nan_and_bad_requests_are_refused_before_anything_is_written(
    files: tuple[Path, Path], base: tiny.Model, tuned: tiny.Model, tmp_path: Path
) -> None:
    before = sorted(tmp_path.glob("*.safetensors"))
    output = tmp_path / "l.safetensors"
    bent = base | {CONV: tiny.encoded(np.zeros((6, 4, 3, 3)), "F16")}
    with pytest.raises(MismatchError, match="in_layers"):
        sdops.extract(files[0], base=tiny.Memory(bent), output=output)
    holes = tiny.numbers(tuned[tiny.LARGE])
    holes[5, 6] = np.nan
    with pytest.raises(FormatError, match="1 NaN"):
        sdops.extract(tiny.Memory(tuned | {tiny.LARGE: ("F16", holes.astype("f2"))}), base=files[1], output=output)
    for request, message in [
        ({"rank": 0}, "at least 1"),
        ({"rank": 4, "energy": 0.5}, "exclude each other"),
        ({"energy": 1.5}, "from 0 to 1"),
        ({"svd": "fast"}, "`svd`"),
        ({"dtype": "fp8"}, "`dtype`"),
        ({"to": "nonsense"}, "no dialect"),
        ({"include": ["attn2"]}, "matches no tensor"),
    ]:
        with pytest.raises(UsageError, match=message):
            sdops.extract(files[0], base=files[1], output=output, **request)
    with pytest.raises(OutputError, match="is the input"):
        sdops.extract(files[0], base=files[1], output=files[1], force=True)
    assert sorted(tmp_path.glob("*.safetensors")) == before


def test_a_dry_run_writes_nothing_and_counts(files: tuple[Path, Path], tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    report = sdops.extract(files[0], base=files[1], output=tmp_path / "l.safetensors", dry_run=True)
    assert report.data["layers"] == {"convolution": 3, "linear": 3, "text encoder": 1}
    assert report.data["left_out"]["embedding tables"] == 1
    assert sorted(tmp_path.iterdir()) == before


def test_fused_projections_of_openclip_become_three_layers(tmp_path: Path) -> None:
    from sdops.core.patch import Target
    from sdops.layouts.tables import Part
    from sdops.verbs._extract_difference import difference
    from sdops.verbs._extract_pairs import Pair, Side
    from sdops.verbs._inputs import open_model

    whole = np.random.default_rng(0).standard_normal((12, 5))
    moved = whole.copy()
    moved[4:8] += 1
    models = [open_model(tiny.Memory({OPENCLIP: tiny.encoded(v, "F32")})) for v in (moved, whole)]
    for index in range(3):
        part = (Part(OPENCLIP, (index, index + 1, 3)),)
        pair = Pair(Target("clip_h", "q"), "te", "weight", Side(models[0], part, 0), Side(models[1], part, 1))
        assert pair.shape == (4, 5)
        np.testing.assert_allclose(difference(pair).values.numpy(), float(index == 1), atol=1e-6)


def test_transposed_and_swapped_parts_are_read_so(tmp_path: Path) -> None:
    from sdops.core.patch import Target
    from sdops.layouts.tables import Part
    from sdops.verbs._extract_difference import difference
    from sdops.verbs._extract_pairs import Pair, Side
    from sdops.verbs._inputs import open_model

    values = np.arange(24.0).reshape(4, 6)
    model, zero = (open_model(tiny.Memory({"w": tiny.encoded(v, "F32")})) for v in (values, np.zeros((4, 6))))
    for operation, wanted in (("transpose", values.T), ("swap", np.roll(values, 2, 0)), ("", values)):
        part = (Part("w", None, operation),)
        pair = Pair(Target("unet", "w"), "linear", "weight", Side(model, part, 0), Side(zero, part, 1))
        assert np.array_equal(difference(pair).values.numpy(), wanted)

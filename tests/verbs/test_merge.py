"""`merge` from file to file: values, determinism, composition, provenance, output and what it says beforehand."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sdops
from sdops.card import Card, Knob, cards, find
from sdops.core.hashing import cached_sha256
from sdops.core.noise import Noise
from sdops.errors import ChangedError, FormatError, OutputError, UsageError
from sdops.verbs._hashes import Hashes
from sdops.verbs.merge import Merge, merge
from tests import tiny
from tests.merges import whole

CARDS = list(cards().values())
each = pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
RANDOM = [card for card in CARDS if "noise" in card.needs]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and three fine-tunes of it, fp16; read only."""
    folder = tmp_path_factory.mktemp("models")
    return [tiny.write(folder / f"m{seed}.safetensors", tiny.checkpoint(seed)) for seed in range(4)]


@pytest.fixture(scope="module")
def models() -> list[tiny.Model]:
    return [tiny.checkpoint(seed) for seed in range(4)]


@pytest.fixture(scope="module")
def shorter(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Models with one tensor of several pieces, some small ones and every odd shape."""
    keys = [tiny.LARGE, f"{tiny.UNET}input_blocks.4.0.in_layers.2.weight", f"{tiny.UNET}out.2.bias", tiny.IDS]
    folder = tmp_path_factory.mktemp("shorter")
    paths = []
    for seed in range(4):
        model = {key: tensor for key, tensor in tiny.checkpoint(seed).items() if key in keys}
        for shape in ((), (0, 3), (1,), (5, 1)):
            values = np.random.default_rng(seed).standard_normal(shape)
            model[f"odd.{'x'.join(map(str, shape))}"] = tiny.encoded(values, "F16")
        paths.append(tiny.write(folder / f"s{seed}.safetensors", model))
    return paths


def lazy(*sources: Any, **options: Any) -> Merge:
    made = merge(*sources, **options)
    assert isinstance(made, Merge)
    return made


def arguments(card: Card, files: list[Any]) -> tuple[list[Any], dict[str, Any]]:
    """Models and options for a call of the method."""
    count = 3 if card.inputs == ["*models"] else len(card.inputs)
    return files[1 : 1 + count], {"method": card.name, **({"base": files[0]} if card.base else {})}


def as_tensor(entry: tuple[str, Any]) -> torch.Tensor:
    return torch.from_numpy(tiny.numbers(entry)).float()


def float_keys(model: tiny.Model) -> list[str]:
    return [key for key, (dtype, _) in model.items() if dtype != "I64"]


# --- values ---------------------------------------------------------------------------------------------------------


@each
def test_every_method_gives_what_its_function_gives_with_any_number_of_threads(
    card: Card, shorter: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, options = arguments(card, shorter)
    for jobs in (8, 1):
        merge(*given, **options, dtype="fp32", output=tmp_path / f"{jobs}.safetensors", jobs=jobs, seed=5)
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "8.safetensors").read_bytes()
    out, models = tiny.load(tmp_path / "1.safetensors"), [tiny.load(path) for path in shorter]
    assert tiny.same(out[tiny.IDS], ("I64", tiny.POSITIONS))
    order = ([0] if card.base else []) + list(range(1, 1 + len(given)))
    inputs = {key: [as_tensor(models[i][key]) for i in order] for key in float_keys(models[0])}
    state = whole.load(card).prepare(list(inputs), inputs.__getitem__) if card.execution == "model" else None
    exact = card.execution in ("elementwise", "ranked") and "gram" not in card.needs
    for key, tensors in inputs.items():
        if card.execution == "model":
            expected = getattr(whole.load(card), card.name)(*tensors, state=state, key=key)
        else:
            monkeypatch.setattr(whole, "Noise", lambda key=key, **rest: Noise(5, key, rest["offset"]))
            monkeypatch.setattr(whole, "KEY", key)
            expected = whole.merge(card, tensors)
        scale = max((float(x.abs().max()) for x in tensors if x.numel()), default=0.0)
        tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 4e-6, "atol": 4e-6 * scale}
        torch.testing.assert_close(as_tensor(out[key]), expected.float(), **tolerance, msg=key)


def test_defect_20_and_41_weighted_sum_is_correctly_rounded(
    files: list[Path], models: list[tiny.Model], tmp_path: Path
) -> None:
    merge(files[1], files[2], alpha=0.3, output=tmp_path / "out.safetensors")
    out, alpha = tiny.load(tmp_path / "out.safetensors"), float(np.float32(0.3))
    for key in float_keys(models[1]):
        a, b = tiny.numbers(models[1][key]), tiny.numbers(models[2][key])
        expected = (a + alpha * (b - a)).astype(np.float16)  # multiples of 2**-49 below 1: float64 holds all of them
        assert np.array_equal(out[key][1].view("f2"), expected), key


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("method", ["weighted-sum", "add-difference", "average", "linear", "triple-sum", "sum-twice"])
def test_models_that_are_the_same_give_themselves(dtype: str, method: str, tmp_path: Path) -> None:
    model = tiny.checkpoint(1, dtype)
    path = tiny.write(tmp_path / "a.safetensors", model)
    count = {"weighted-sum": 2}.get(method, 3)
    merge(*[path] * count, method=method, output=tmp_path / "out.safetensors")
    out = tiny.load(tmp_path / "out.safetensors")
    for key in float_keys(model):
        assert np.array_equal(tiny.numbers(out[key]), tiny.numbers(model[key]))  # -0 + (0 - 0) is +0


def test_defect_42_alpha_0_is_a_and_alpha_1_is_b_bit_for_bit(tmp_path: Path) -> None:
    models = [tiny.checkpoint(1), tiny.checkpoint(2)]
    for model in models:  # what arithmetic would not keep
        array = np.array([np.nan, -0.0, 6e-8, np.inf], np.float16)
        model[f"{tiny.UNET}out.2.bias"] = ("F16", array)
    paths = [tiny.write(tmp_path / f"{name}.safetensors", model) for name, model in zip("ab", models, strict=True)]
    for alpha, model in enumerate(models):
        merge(*paths, alpha=alpha, output=tmp_path / f"{alpha}.safetensors")
        out = tiny.load(tmp_path / f"{alpha}.safetensors")
        assert out.keys() == model.keys()
        assert all(tiny.same(out[key], model[key]) for key in model)


def test_defect_33_a_weight_of_zero_is_a_weight(files: list[Path], models: list[tiny.Model], tmp_path: Path) -> None:
    merge(*files[1:4], method="linear", weights=(0, 1, 0), output=tmp_path / "out.safetensors")
    out = tiny.load(tmp_path / "out.safetensors")
    assert all(tiny.same(out[key], models[2][key]) for key in models[2])


@pytest.mark.parametrize("method", ["dare-linear", "dare-ties", "ties", "breadcrumbs", "sparse-topk"])
def test_defect_39_a_density_of_zero_gives_the_base(
    method: str, files: list[Path], models: list[tiny.Model], tmp_path: Path
) -> None:
    merge(*files[1:3], base=files[0], method=method, density=0.0, output=tmp_path / "out.safetensors")
    out = tiny.load(tmp_path / "out.safetensors")
    for key in float_keys(models[0]):
        assert np.array_equal(tiny.numbers(out[key]), tiny.numbers(models[0][key]))


def test_defect_26_two_dials_keep_apart(files: list[Path], models: list[tiny.Model], tmp_path: Path) -> None:
    dials = {"alpha": "0, vae=1", "beta": "0, *attn2*=1"}
    merge(*files[1:4], method="sum-twice", **dials, output=tmp_path / "out.safetensors")
    out = tiny.load(tmp_path / "out.safetensors")
    for key in float_keys(models[1]):
        source = models[2] if key.startswith(tiny.VAE) else models[3] if "attn2" in key else models[1]
        assert tiny.same(out[key], source[key]), key


def test_un_merging_gives_the_other_model_back(tmp_path: Path) -> None:
    a, b = (tiny.write(tmp_path / f"{seed}.safetensors", tiny.checkpoint(seed, "F32")) for seed in (1, 2))
    merge(a, b, alpha=0.25, output=tmp_path / "sum.safetensors")
    merge(tmp_path / "sum.safetensors", b, method="weighted-subtraction", alpha=0.25, beta=1.0,
          output=tmp_path / "back.safetensors")  # fmt: skip
    back, model = tiny.load(tmp_path / "back.safetensors"), tiny.checkpoint(1, "F32")
    for key in float_keys(model):
        np.testing.assert_allclose(back[key][1], model[key][1], rtol=0, atol=1e-7)


# --- random methods -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("card", RANDOM, ids=lambda card: card.name)
def test_seeds_decide(card: Card, files: list[Path], tmp_path: Path) -> None:
    given, options = arguments(card, files)
    if card.name == "plus_random":
        options["alpha"] = 0.01
    data = {}
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        merge(*given, **options, seed=seed, output=tmp_path / f"{name}.safetensors")
        data[name] = (tmp_path / f"{name}.safetensors").read_bytes()
    assert data["first"] == data["again"] != data["other"]
    assert json.loads(tiny.metadata_of(tmp_path / "first.safetensors")["sdops"])["seed"] == 3


def test_defect_8_masks_differ_between_tensors_of_one_shape(tmp_path: Path) -> None:
    base, tuned = tiny.checkpoint(0, "F32"), tiny.checkpoint(1, "F32")
    other = tiny.LARGE.replace("input_blocks.2", "output_blocks.11")
    tuned[other] = tuned[tiny.LARGE]
    base[other] = base[tiny.LARGE]
    out = lazy(tiny.Memory(tuned), base=tiny.Memory(base), method="dare-linear")
    tiny_out = {key: np.frombuffer(_read(out, key), "f4") for key in (tiny.LARGE, other)}
    kept = [values != base[tiny.LARGE][1].reshape(-1) for values in tiny_out.values()]
    assert 0.4 < np.mean(kept[0] == kept[1]) < 0.6


def test_defect_24_and_35_dare_scales_by_one_over_the_density(tmp_path: Path) -> None:
    base, tuned = tiny.checkpoint(0, "F32"), tiny.checkpoint(1, "F32", spread=1)
    for density in (0.1, 0.9):
        out = lazy(tiny.Memory(tuned), base=tiny.Memory(base), method="dare-linear", density=density)
        found = np.frombuffer(_read(out, tiny.LARGE), "f4").astype(float) - base[tiny.LARGE][1].reshape(-1)
        wanted = (tuned[tiny.LARGE][1].astype(float) - base[tiny.LARGE][1]).reshape(-1)
        assert found @ wanted / (wanted @ wanted) == pytest.approx(1, abs=0.03)


# --- composition ----------------------------------------------------------------------------------------------------


def _read(source: Any, key: str) -> bytes:
    from sdops.core.source import read

    return bytes(read(source, key))


INNER = ["weighted-sum", "train-difference", "slerp", "ties", "nuslerp-rows", "tensor-sum", "cosine-a", "dare-ties"]
PAIRS = [(inner, "weighted-sum") for inner in INNER] + [
    ("ties", "ties"), ("ties", "extract-similar"), ("nuslerp-rows", "slerp"), ("tensor-sum", "ties"),
    ("della", "extract-similar"), ("slerp", "cosine-b"), ("cosine-a", "rotate"),
]  # fmt: skip


@pytest.mark.parametrize(("inner", "outer"), PAIRS)
def test_merges_of_merges_equal_two_steps(inner: str, outer: str, shorter: list[Path], tmp_path: Path) -> None:
    given, options = arguments(find(inner), shorter)
    merge(*given, **options, output=tmp_path / "step.safetensors")
    outputs = []
    for name, middle in (("two", tmp_path / "step.safetensors"), ("one", lazy(*given, **options))):
        models, options = arguments(find(outer), [shorter[0], middle, *shorter[2:]])
        merge(*models, **options, output=tmp_path / f"{name}.safetensors", jobs=4)
        outputs.append(tiny.load(tmp_path / f"{name}.safetensors"))
    assert all(tiny.same(outputs[0][key], outputs[1][key]) for key in outputs[0])


def test_one_lazy_merge_may_be_used_twice_and_saved_twice(files: list[Path], tmp_path: Path) -> None:
    inner = lazy(files[1], base=files[0], method="ties")
    merge(inner, inner, method="slerp", output=tmp_path / "x.safetensors")
    first = inner.save(tmp_path / "a.safetensors")
    second = inner.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert first.data["retained"] == second.data["retained"]
    out, expected = tiny.load(tmp_path / "x.safetensors"), tiny.load(tmp_path / "a.safetensors")
    assert all(tiny.same(out[key], expected[key]) for key in expected)


def test_three_levels_in_python(files: list[Path], tmp_path: Path) -> None:
    one = lazy(files[1], files[2], alpha=0.3)
    two = lazy(one, files[3], alpha=0.1)
    report = two.save(tmp_path / "out.safetensors")
    made = report.data["recipe"]
    assert made["inputs"][0]["recipe"]["inputs"][1]["file"] == "m2.safetensors"
    digest = hashlib.sha256(files[2].read_bytes()).hexdigest()
    assert made["inputs"][0]["recipe"]["inputs"][1]["sha256"] == digest
    assert rebuilt(made, files, tmp_path) == (tmp_path / "out.safetensors").read_bytes()


# --- provenance -----------------------------------------------------------------------------------------------------


def opened(item: dict[str, Any], files: list[Path]) -> Any:
    """An input of a recipe, found by its hash alone, or made anew."""
    if "recipe" in item:
        return planned(item["recipe"], files)
    return next(path for path in files if hashlib.sha256(path.read_bytes()).hexdigest() == item["sha256"])


def planned(made: dict[str, Any], files: list[Path]) -> Merge:
    inputs = {item["role"]: opened(item, files) for item in made["inputs"]}
    named = {role: inputs.pop(role) for role in ("base", "vae", "text_encoder") if role in inputs}
    policy = {name: made[name] for name in ("dtype", "include", "exclude", "missing", "prune", "seed") if name in made}
    return lazy(*inputs.values(), method=made["method"], **named, **policy, **made["knobs"])


def rebuilt(made: dict[str, Any], files: list[Path], tmp_path: Path) -> bytes:
    planned(made, files).save(tmp_path / "rebuilt.safetensors")
    return (tmp_path / "rebuilt.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (2, {"alpha": 0.3}),
        (2, {"alpha": "GRAD_V, vae=0, *attn2*=0.25", "dtype": "bf16"}),
        (2, {"alpha": {"": 0.2, "IN00-IN04": 0.7}, "exclude": ["*.bias"], "prune": True}),
        (3, {"method": "linear", "weights": (0.5, 0.3, 0.2), "include": [f"{tiny.UNET}*"]}),
        (2, {"method": "dare-ties", "base": 0, "density": "0.4, M00=0.9", "seed": 11}),
        (1, {"method": "truncate-rank", "base": 0, "rank": 2, "vae": 3, "text_encoder": 2}),
    ],
)
def test_the_metadata_suffice_to_rebuild_the_file(
    count: int, options: dict[str, Any], files: list[Path], tmp_path: Path
) -> None:
    options = {name: files[v] if name in ("base", "vae", "text_encoder") else v for name, v in options.items()}
    merge(*files[1 : 1 + count], **options, output=tmp_path / "out.safetensors")
    made = json.loads(tiny.metadata_of(tmp_path / "out.safetensors")["sdops"])
    assert rebuilt(made, files, tmp_path) == (tmp_path / "out.safetensors").read_bytes()


def test_defect_10_and_37_metadata_has_no_folder_and_keeps_what_is_still_true(
    files: list[Path], tmp_path: Path
) -> None:
    first = tiny.write(tmp_path / "first.safetensors", tiny.checkpoint(1), {
        "modelspec.prediction_type": "v", "modelspec.license": "mit", "modelspec.title": "Old", "ss_epoch": "3",
        "modelspec.hash_sha256": "0x123",
    })  # fmt: skip
    merge(first, files[2].resolve(), output=tmp_path / "out.safetensors")
    found = tiny.metadata_of(tmp_path / "out.safetensors")
    assert str(tmp_path) not in str(found)
    assert str(files[2].parent) not in str(found)
    assert found["format"] == "pt"
    assert found["modelspec.sai_model_spec"] == "1.0.1"
    assert found["modelspec.title"] == "first+m2.weighted-sum"
    assert found["modelspec.merged_from"] == "first.safetensors, m2.safetensors"
    assert found["modelspec.prediction_type"] == "v"  # else a v-prediction model would lose what makes it usable
    assert found["modelspec.license"] == "mit"
    assert "modelspec.hash_sha256" not in found
    from safetensors import safe_open

    with safe_open(tmp_path / "out.safetensors", "np") as file:
        assert file.metadata() == found


def test_hashes_are_right_remembered_and_left_out_on_request(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = merge(files[1], files[2], output=tmp_path / "out.safetensors")
    found = [item["sha256"] for item in report.data["recipe"]["inputs"]]
    assert found == [hashlib.sha256(path.read_bytes()).hexdigest() for path in files[1:3]]
    assert tiny.metadata_of(tmp_path / "out.safetensors")["sdops"].count(found[0]) == 1
    assert cached_sha256(files[1]) == found[0]
    monkeypatch.setattr(Hashes, "_work", lambda _: pytest.fail("hashed again"))
    merge(files[1], files[2], output=tmp_path / "fast.safetensors", hash_inputs=False)
    inputs = json.loads(tiny.metadata_of(tmp_path / "fast.safetensors")["sdops"])["inputs"]
    assert inputs == [{"role": "a", "file": "m1.safetensors"}, {"role": "b", "file": "m2.safetensors"}]


def test_a_source_in_memory_has_no_hash(files: list[Path], tmp_path: Path) -> None:
    source = tiny.Memory(tiny.checkpoint(2), "/secret/place/thing")
    report = merge(files[1], source, output=tmp_path / "out.safetensors")
    assert report.data["recipe"]["inputs"][1] == {"role": "b", "file": "thing"}
    assert "secret" not in str(tiny.metadata_of(tmp_path / "out.safetensors"))


def test_a_source_is_as_good_as_a_path(files: list[Path], tmp_path: Path) -> None:
    merge(files[1], files[2], output=tmp_path / "paths.safetensors")
    merge(sdops.open(files[1]), sdops.open(files[2]), output=tmp_path / "sources.safetensors")
    assert (tmp_path / "paths.safetensors").read_bytes() == (tmp_path / "sources.safetensors").read_bytes()


# --- the output -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"alpha": 0.3}, "m1+m2.weighted-sum.alpha0.3.safetensors"),
        ({}, "m1+m2.weighted-sum.safetensors"),
        ({"alpha": 0.3, "dtype": "bf16"}, "m1+m2.weighted-sum.alpha0.3.bf16.safetensors"),
        ({"alpha": "0.3, vae=0"}, "m1+m2.weighted-sum.alpha-blocks.safetensors"),
        ({"alpha": [0.5] * 26}, "m1+m2.weighted-sum.safetensors"),
        ({"method": "linear", "weights": (1, 3)}, "m1+m2.linear.weights1_3.safetensors"),
        ({"method": "tensor-sum", "dim": 1}, "m1+m2.tensor-sum.dim-1.safetensors"),
    ],
)
def test_derived_names(options: dict[str, Any], name: str, files: list[Path]) -> None:
    assert lazy(files[1], files[2], **options).derived_name() == name


def test_derived_names_fit_into_a_file_system(tmp_path: Path) -> None:
    paths = [
        tiny.write(tmp_path / f"{'長' * 60}{i}.safetensors", tiny.checkpoint(i, clip=False, vae=False))
        for i in range(3)
    ]
    made = lazy(*paths, method="linear", weights=tuple([0.123456] * 3))
    made.save(tmp_path / made.derived_name(), hash_inputs=False)
    assert len(made.derived_name().encode()) <= 255
    assert made.derived_name().endswith("...linear.weights0.123456_0.123456_0.123456.safetensors")


def test_an_existing_output_needs_force(files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    out.write_text("mine")
    with pytest.raises(OutputError, match="exists already") as caught:
        merge(files[1], files[2], output=out)
    assert "--force" in caught.value.hint
    assert out.read_text() == "mine"
    merge(files[1], files[2], output=out, force=True)
    assert tiny.load(out)


@pytest.mark.parametrize("how", ["same", "symlink", "hard link", "folder link", "inside a lazy merge", "vae", "base"])
def test_defect_7_an_input_is_never_the_output(how: str, files: list[Path], tmp_path: Path) -> None:
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(files[1].read_bytes())
    out, models, options = mine, [mine, files[2]], {}
    if how == "symlink":
        (out := tmp_path / "link.safetensors").symlink_to(mine)
    elif how == "hard link":
        os.link(mine, out := tmp_path / "hard.safetensors")
    elif how == "folder link":
        (tmp_path / "folder").symlink_to(tmp_path)
        out = tmp_path / "folder" / "mine.safetensors"
    elif how == "inside a lazy merge":
        models = [lazy(mine, files[3]), files[2]]
    elif how == "vae":
        models, options = [files[1], files[2]], {"vae": mine}
    elif how == "base":
        models, options = [files[1]], {"base": mine, "method": "ties"}
    before = mine.read_bytes()
    with pytest.raises(OutputError, match="is the input"):
        merge(*models, **options, output=out, force=True)
    assert mine.read_bytes() == before
    assert not list(tmp_path.glob(".sdops-*"))


def test_mode_is_what_the_umask_says(files: list[Path], tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        merge(files[1], files[2], output=tmp_path / "out.safetensors")
    finally:
        os.umask(old)
    assert (tmp_path / "out.safetensors").stat().st_mode & 0o777 == 0o640


class Failing(tiny.Memory):
    """Breaks while it is read."""

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        if key == tiny.LARGE:
            raise FormatError("broken")
        super().read_into(key, start, buffer)


@pytest.mark.parametrize("method", ["weighted-sum", "slerp", "nearswap", "tensor-sum"])
def test_defect_6_a_failing_merge_leaves_nothing(method: str, files: list[Path], tmp_path: Path) -> None:
    source = Failing(tiny.checkpoint(1))
    if method == "tensor-sum":
        source = _nan_in(tiny.checkpoint(1))
    with pytest.raises(FormatError):
        merge(source, files[2], method=method, output=tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "cache"])


def _nan_in(model: tiny.Model) -> tiny.Memory:
    array = model[tiny.LARGE][1].copy()
    array[7, 7] = np.nan
    return tiny.Memory(model | {tiny.LARGE: ("F16", array)}, "broken.safetensors")


def test_an_input_that_changes_meanwhile_is_noticed(files: list[Path], tmp_path: Path) -> None:
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(files[1].read_bytes())
    made = lazy(mine, files[2])
    data = bytearray(mine.read_bytes())
    data[-1] ^= 1
    mine.write_bytes(data)
    with pytest.raises(ChangedError, match="mine"):
        made.save(tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


# --- values that go wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    ["weighted-sum", "nearswap", "slerp", "nuslerp-rows", "tensor-sum", "cosine-a", "euclidean-add-difference"],
)
def test_defect_3_nan_is_named_not_dropped(method: str, files: list[Path], tmp_path: Path) -> None:
    source = _nan_in(tiny.checkpoint(2))
    given: list[Any] = [files[1], source, files[3]][: len(find(method).inputs)]
    with pytest.raises(FormatError, match=r"attn2.to_k.weight` of `broken.safetensors` holds 1 NaN value"):
        merge(*given, method=method, output=tmp_path / "out.safetensors")


@pytest.mark.parametrize("method", ["add-difference", "slerp", "train-difference"])
def test_defect_2_overflow_is_counted_and_clamped(method: str, tmp_path: Path) -> None:
    key = f"{tiny.UNET}out.2.bias"
    models = [tiny.checkpoint(seed, "BF16") for seed in (1, 2, 3)]
    for sign, model in zip((1, 1, -1), models, strict=True):
        model[key] = tiny.encoded([1e5 * sign, -1e5 * sign, 1.0, 2.0], "BF16")
    given = models[:2] if method == "slerp" else models
    report = merge(*map(tiny.Memory, given), method=method, dtype="fp16", output=tmp_path / "out.safetensors")
    out = tiny.load(tmp_path / "out.safetensors")
    assert tiny.numbers(out[key])[:2].tolist() == [65504.0, -65504.0]
    assert report.data["overflows"] == {key: 2}
    assert any("2 values of 1 tensor were too large" in text and key in text for text in report.warnings)


def test_counts_begin_anew_with_every_run(tmp_path: Path) -> None:
    model = {"w": tiny.encoded([6e4, 1.0], "F16")}
    made = lazy(tiny.Memory(model), method="scale", alpha=2.0)
    for name in ("first", "second"):
        assert made.save(tmp_path / name).data["overflows"] == {"w": 1}


def test_overflow_of_a_copied_tensor_is_counted(tmp_path: Path) -> None:
    key = f"{tiny.UNET}out.2.bias"
    models = [tiny.checkpoint(seed, "F32") for seed in (1, 2)]
    models[0][key] = tiny.encoded([1e5, 0, 0, -1e9], "F32")
    report = merge(*map(tiny.Memory, models), exclude=[key], dtype="fp16", output=tmp_path / "out.safetensors")
    assert report.data["overflows"] == {key: 2}


def test_a_small_alpha_in_bf16_is_swallowed_and_said_so(tmp_path: Path) -> None:
    a, b = (tiny.Memory(tiny.checkpoint(seed, "BF16"), f"{name}.safetensors") for name, seed in (("a", 1), ("b", 2)))
    report = merge(a, b, alpha=0.005, output=tmp_path / "out.safetensors")
    assert report.data["retained"]["`b.safetensors`"] < 0.9
    assert any("rounding swallowed" in text and "`--dtype fp32`" in text for text in report.warnings)
    cured = merge(a, b, alpha=0.005, dtype="fp32", output=tmp_path / "cured.safetensors")
    assert cured.data["retained"]["`b.safetensors`"] == pytest.approx(1, abs=1e-3)
    assert cured.warnings == []


def test_delta_retained_is_told_per_input(files: list[Path], tmp_path: Path) -> None:
    report = merge(*files[1:4], method="linear", weights=(1, 1, 0.002), output=tmp_path / "out.safetensors")
    assert report.data["retained"].keys() == {"`m2.safetensors`", "`m3.safetensors`", "the merge"}
    assert report.data["retained"]["`m2.safetensors`"] == pytest.approx(1, abs=0.05)


def test_a_difference_is_judged_as_a_whole(tmp_path: Path) -> None:
    """b and c are far from a and near each other: seen alone, hardly anything of either would be lost."""
    a, b, c = tiny.checkpoint(1, "BF16", spread=5), tiny.checkpoint(2, "BF16", spread=0.01), tiny.checkpoint(0, "BF16")
    report = merge(*map(tiny.Memory, (a, b, c)), method="add-difference", output=tmp_path / "out.safetensors")
    assert report.data["retained"].keys() == {"the merge"}
    assert report.data["retained"]["the merge"] < 0.9


# --- knobs ----------------------------------------------------------------------------------------------------------


def test_what_a_method_found_is_told(files: list[Path], tmp_path: Path) -> None:
    report = lazy(*files[:2], method="weight-matching").save(tmp_path / "out.safetensors")
    assert "the same as weighted-sum" in report.data["found"]
    assert report.data["found"] in str(report)
    assert "found" not in lazy(*files[:2], method="cosine-a").save(tmp_path / "other.safetensors").data


def test_what_is_unusual_about_an_input_is_told(tmp_path: Path) -> None:
    model, paths = tiny.checkpoint(1), [tmp_path / f"part-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for index, path in enumerate(paths):
        tiny.write(path, dict(list(model.items())[index::2]))
    other = tiny.write(tmp_path / "other.safetensors", tiny.checkpoint(2))
    for models in ((paths[0], other), (lazy(other, paths[0]), other)):
        warnings = lazy(*models).plan.warnings
        assert warnings == ["the index that goes with `part-00001-of-00002.safetensors` is missing: "
                            "all tensors of 2 files are taken"]  # fmt: skip
    odd = tiny.Memory(model, "odd")
    odd.warnings = ["3 tensors cannot be read"]  # type: ignore[attr-defined]
    assert lazy(odd, other).plan.warnings == ["`odd`: 3 tensors cannot be read"]


def test_a_misspelt_method_and_knob(files: list[Path]) -> None:
    with pytest.raises(UsageError, match="did you mean `weighted-sum`"):
        merge(files[1], files[2], method="wieghted-sum")
    with pytest.raises(UsageError, match="no knob `alhpa`; did you mean `alpha`"):
        merge(files[1], files[2], alhpa=0.3)


@pytest.mark.parametrize(
    ("options", "count", "message"),
    [
        ({}, 1, "2 models"),
        ({}, 3, "2 models"),
        ({"method": "ties"}, 2, "common ancestor"),
        ({"base": 0}, 2, "takes no base"),
        ({"dtype": "fp8"}, 2, "`dtype` cannot be `fp8`"),
        ({"missing": "ignore"}, 2, "`missing` cannot be"),
        ({"method": "linear", "weights": (1.0, 2.0, 3.0)}, 2, "3 numbers for 2 models"),
        ({"method": "linear", "weights": (1.0, -1.0)}, 2, "sum to zero"),
        ({"alpha": "0.3, IN00=x"}, 2, "not a number"),
        ({"alpha": "0.3, IN77=1"}, 2, "IN77"),
        ({"alpha": float("nan")}, 2, "finite"),
        ({"alpha": 1e39}, 2, "too large"),
        ({"method": "weighted-subtraction", "alpha": 1.0, "beta": 1.0}, 2, "alpha"),
    ],
)
def test_requests_that_make_no_sense(options: dict[str, Any], count: int, message: str, files: list[Path]) -> None:
    options = {name: files[v] if name == "base" else v for name, v in options.items()}
    with pytest.raises(UsageError, match=message):
        merge(*files[1 : 1 + count], **options)


def _knob_cases() -> list[tuple[str, str, Any]]:
    kinds = {"float": [-7.0, 1e6], "int": [-3, 10**6], "floats": [(1.0,) * 9]}
    return [(card.name, knob.name, v) for card in CARDS for knob in card.knobs for v in kinds.get(knob.type, [])]


@pytest.fixture(scope="module")
def counted() -> list[tiny.Memory]:
    """Very small models, in a file with nothing but some of the UNet, which count what is read."""
    keys = [key for key in tiny.shapes(vae=False, clip=False) if key != tiny.FIRST and "attn2" not in key]
    models = [tiny.checkpoint(seed, "F32", vae=False, clip=False) for seed in range(4)]
    return [tiny.Memory({key: model[key] for key in keys}, f"m{i}") for i, model in enumerate(models)]


@pytest.mark.parametrize(("method", "knob", "value"), _knob_cases())
def test_knobs_out_of_range_are_refused_before_anything_is_read(
    method: str, knob: str, value: Any, counted: list[tiny.Memory], tmp_path: Path
) -> None:
    given, options = arguments(find(method), counted)
    for source in counted:
        source.reads.clear()
    try:
        merge(*given, **options, **{knob: value}, output=tmp_path / "out.safetensors", jobs=1)
    except UsageError:
        with pytest.raises(UsageError, match=f"`{knob}`|coefficient"):  # a dry run refuses it as well
            merge(*given, **options, **{knob: value})
        assert not any(source.reads for source in counted)
        assert not (tmp_path / "out.safetensors").exists()
    except FormatError as error:
        assert "not finite" in error.message or "NaN" in error.message  # noqa: PT017 a knob may be legal and absurd


RANGES = [(card.name, knob) for card in CARDS for knob in card.knobs if knob.range]


@pytest.mark.parametrize(("method", "knob"), RANGES, ids=lambda value: getattr(value, "name", value))
def test_a_stated_range_holds_in_a_dry_run(method: str, knob: Knob, files: list[Path]) -> None:
    given, options = arguments(find(method), files)
    low, _, high = knob.range.partition(" ")
    ends = [(float(low), -1)] if high == "or more" else [(float(low), -1), (float(high.removeprefix("to ")), 1)]
    for end, sign in ends:
        beyond = end + sign * (1e-9 if knob.type == "float" else 1)
        values = {"float": [end], "int": [int(end)], "floats": [(end,) * len(given)]}[knob.type]
        refused = {"float": [beyond, {"vae": beyond}, f"{end}, *attn2*={beyond}"], "int": [int(beyond)],
                   "floats": [(*(1.0,) * (len(given) - 1), beyond)]}[knob.type]  # fmt: skip
        for value in values:
            lazy(*given, **options, **{knob.name: value})
        for value in refused:
            with pytest.raises(UsageError, match=f"`{knob.name}` is ") as caught:
                merge(*given, **options, **{knob.name: value})
            assert low in str(caught.value.hint)


def test_defect_23_and_29_dials_per_block_component_and_pattern(
    files: list[Path], models: list[tiny.Model], tmp_path: Path
) -> None:
    rules = {"": 0.5, "IN00": 0.0, "vae": 1.0, "*attn2*": 0.25, f"{tiny.UNET}out.2.bias": 1.0}
    report = merge(files[1], files[2], alpha=rules, output=tmp_path / "out.safetensors")
    out = tiny.load(tmp_path / "out.safetensors")
    assert tiny.same(out[tiny.FIRST], models[1][tiny.FIRST])
    assert tiny.same(out[f"{tiny.UNET}time_embed.0.bias"], models[1][f"{tiny.UNET}time_embed.0.bias"])  # goes with IN00
    assert all(tiny.same(out[key], models[2][key]) for key in models[2] if key.startswith(tiny.VAE))
    assert tiny.same(out[f"{tiny.UNET}out.2.bias"], models[2][f"{tiny.UNET}out.2.bias"])
    a, b = (tiny.numbers(model[tiny.LARGE]) for model in models[1:3])
    assert np.array_equal(out[tiny.LARGE][1].view("f2"), (a + 0.25 * (b - a)).astype("f2"))
    assert report.data["rules"] == {
        "alpha: IN00=0.0": 3, "alpha: vae=1.0": 4, "alpha: *attn2*=0.25": 2, f"alpha: {tiny.UNET}out.2.bias=1.0": 1,
    }  # fmt: skip


@pytest.mark.parametrize("method", ["ties", "slerp", "similarity-add-difference", "tensor-sum"])
def test_any_method_has_dials(method: str, files: list[Path], models: list[tiny.Model], tmp_path: Path) -> None:
    card = find(method)
    knob = next(k.name for k in card.knobs if k.type == "float")
    given, options = arguments(card, files)
    for name, value in (("low", 0.25), ("high", 0.6), ("both", {"": 0.25, "vae": 0.6})):
        merge(*given, **options, **{knob: value}, output=tmp_path / f"{name}.safetensors")
    low, high, both = (tiny.load(tmp_path / f"{name}.safetensors") for name in ("low", "high", "both"))
    for key in both:
        assert tiny.same(both[key], (high if key.startswith(tiny.VAE) else low)[key])
    assert not all(tiny.same(low[key], high[key]) for key in low if key.startswith(tiny.VAE))


def test_defect_15_the_first_of_26_numbers_is_base_and_the_last_out11(
    files: list[Path], models: list[tiny.Model], tmp_path: Path
) -> None:
    weights = [0.0] * 26
    weights[25] = 1.0
    merge(files[1], files[2], alpha=weights, output=tmp_path / "out.safetensors")
    out = tiny.load(tmp_path / "out.safetensors")
    from_b = {key for key in float_keys(models[1]) if tiny.same(out[key], models[2][key])}
    ends = ("output_blocks.11.1.transformer_blocks.0.attn2.to_k.weight", "out.0.weight", "out.2.weight", "out.2.bias")
    assert from_b == {tiny.UNET + name for name in ends}
    weights = [1.0] + [0.0] * 25
    merge(files[1], files[2], alpha=weights, output=tmp_path / "base.safetensors")
    out = tiny.load(tmp_path / "base.safetensors")
    from_b = {key for key in float_keys(models[1]) if tiny.same(out[key], models[2][key])}
    assert from_b == {key for key in float_keys(models[1]) if not key.startswith(tiny.UNET)}


def test_a_rule_that_matches_nothing_is_an_error(files: list[Path]) -> None:
    for rule in ("IN07=0.1", "*attn7*=0.1", "/q_prj/=0.1"):
        with pytest.raises(UsageError, match="matches none of the"):
            merge(files[1], files[2], alpha=f"0.3, {rule}")


# --- beforehand -----------------------------------------------------------------------------------------------------


def test_a_dry_run_reads_position_ids_only(models: list[tiny.Model], tmp_path: Path) -> None:
    sources = [tiny.Memory(model, f"{name}.safetensors") for name, model in zip("abc", models[1:], strict=True)]
    made = lazy(*sources[:2], vae=sources[2], alpha="0.3, vae=0, IN00-IN02=0.5", exclude=["*.bias"], prune=True)
    report = made.dry_run(tmp_path / "out.safetensors", jobs=3)
    assert [source.reads for source in sources] == [{tiny.IDS: 616}, {}, {}]
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "cache"])
    data = report.data
    assert data["dry_run"] is True
    assert data["passes"] == 1
    assert data["jobs"] == 3
    assert data["rules"] == {"alpha: vae=0.0": 4, "alpha: IN00-IN02=0.5": 2}
    assert data["reasons"]["excluded"] == 4
    assert data["reasons"]["from `c.safetensors`"] == 4
    assert data["tensors"] == {"merge": 10, "copy": 9}
    sizes = {key: np.asarray(array).nbytes for key, (_, array) in models[1].items()}
    assert data["write_bytes"] == sum(sizes.values())
    merged = [key for key, step in made.plan.steps.items() if step.action == "merge"]
    assert data["read_bytes"] == sum(sizes.values()) + sum(sizes[key] for key in merged)
    assert 10e6 < data["memory_bytes"] < 300e6
    text = str(report)
    for word in ("weighted-sum", "a.safetensors", "Stable Diffusion 1", "1 pass", "memory", "writes"):
        assert word in text


def test_a_dry_run_needs_neither_torch_nor_numpy(files: list[Path], tmp_path: Path) -> None:
    code = """if True:
        import sys, sdops
        a, b, base, out = sys.argv[1:]
        sdops.merge(a, b, base=base, method="ties", density="0.2, vae=0.5").dry_run(out)
        sdops.merge(a, b, alpha=0.3).dry_run(out)
        sys.exit(", ".join({"torch", "numpy"} & set(sys.modules)) or 0)
    """
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, files[:3]), str(tmp_path / "out.safetensors")],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_a_linear_merge_needs_no_torch(files: list[Path], tmp_path: Path) -> None:
    code = "import sys, sdops; sdops.merge(*sys.argv[1:3], output=sys.argv[3]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, *map(str, files[:2]), str(tmp_path / "o.safetensors")], check=True)


@pytest.mark.parametrize(
    ("method", "passes"), [("slerp", 2), ("ties", 3), ("nearswap", 1), ("euclidean-add-difference", 2)]
)
def test_passes_are_told(method: str, passes: int, files: list[Path], tmp_path: Path) -> None:
    given, options = arguments(find(method), files)
    assert lazy(*given, **options).dry_run(tmp_path / "out.safetensors").data["passes"] == passes


def test_a_memory_budget_that_does_not_suffice(files: list[Path], tmp_path: Path) -> None:
    made = lazy(files[1], files[2], method="rotate", memory=10_000_000)
    for run in (made.dry_run, made.save):
        with pytest.raises(UsageError, match=r"not enough.*attn2.to_k.weight` alone needs") as caught:
            run(tmp_path / "out.safetensors")
        assert "--memory" in caught.value.hint
    with pytest.raises(UsageError, match="not enough"):
        lazy(files[1], files[2], memory=10_000_000).dry_run(tmp_path / "out.safetensors")
    merge(files[1], files[2], method="rotate", memory=400_000_000, output=tmp_path / "out.safetensors", jobs=2)


def test_progress_counts_every_byte(files: list[Path], tmp_path: Path) -> None:
    from contextlib import contextmanager

    seen: dict[str, list[int]] = {}

    @contextmanager
    def progress(label: str, total: int) -> Any:
        counted = seen.setdefault(label, [total])
        yield counted.append

    merge(files[1], files[2], output=tmp_path / "out.safetensors", progress=progress)
    total, *steps = seen["merging"]
    data = sum(np.asarray(array).nbytes for _, array in tiny.load(tmp_path / "out.safetensors").values())
    assert sum(steps) == data
    assert total >= data

"""What is wrong with a LoRA is named by every verb that takes one, and nothing is written; the same for `extract`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import sdops
from fixtures import loras
from fixtures.make import small
from sdops.errors import FormatError, MismatchError, SdopsError, UsageError
from sdops.formats import open_source

STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
KEY = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    small("sd15", path, dtype="F32")
    return path


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sdxl") / "sdxl.safetensors"
    small("sdxl", path, dtype="F16")
    return path


@pytest.fixture(scope="module")
def shape(base: Path) -> tuple[int, ...]:
    source = open_source(base)
    source.close()
    return source.specs[KEY].shape


def good(shape: tuple[int, ...]) -> Arrays:
    rng = np.random.default_rng(0)
    return {
        f"{STEM}.lora_up.weight": rng.standard_normal((shape[0], 2)).astype(np.float16),
        f"{STEM}.lora_down.weight": rng.standard_normal((2, shape[1])).astype(np.float16),
        f"{STEM}.alpha": np.array(2.0, np.float32),
    }


VERBS: dict[str, Callable[[Path, Path, Path, Path], object]] = {
    "apply": lambda file, _fine, base, output: sdops.apply(base, lora=[file], output=output),
    "merge": lambda file, fine, _base, output: sdops.merge(fine, file, output=output),
    "merge with a LoRA": lambda file, _fine, base, output: sdops.merge(base, base, lora=[file], output=output),
    "resize": lambda file, _fine, _base, output: sdops.resize(file, rank=1, output=output),
    "convert": lambda file, _fine, _base, output: sdops.convert(file, to="comfy", output=output),
    "convert family": lambda file, _fine, base, output: sdops.convert(file, family="full", base=base, output=output),
}
WRONG: dict[str, tuple[Callable[[Arrays], Arrays], str]] = {
    "missing pair": (lambda a: {k: v for k, v in a.items() if "up" not in k}, "is incomplete"),
    "wrong ranks": (
        lambda a: a | {f"{STEM}.lora_up.weight": np.zeros((len(a[f"{STEM}.lora_up.weight"]), 3), np.float16)},
        "lora_up.*the other parts ask for",
    ),
    "NaN": (
        lambda a: a | {f"{STEM}.lora_down.weight": a[f"{STEM}.lora_down.weight"] * np.float16("nan")},
        r"lora_down\.weight.*NaN",
    ),
    "infinity": (
        lambda a: a | {f"{STEM}.lora_up.weight": a[f"{STEM}.lora_up.weight"] * np.float16("inf")},
        r"lora_up\.weight.*infinite",
    ),
    "alpha 0": (lambda a: a | {f"{STEM}.alpha": np.array(0.0, np.float32)}, "alpha.*is 0"),
    "alpha NaN": (lambda a: a | {f"{STEM}.alpha": np.array(np.nan, np.float32)}, "alpha.*is nan"),
    "rank 0": (
        lambda a: {
            f"{STEM}.lora_up.weight": a[f"{STEM}.lora_up.weight"][:, :0],
            f"{STEM}.lora_down.weight": a[f"{STEM}.lora_down.weight"][:0],
        },
        "is empty",
    ),
    "unknown": (lambda a: a | {"lora_unet_nowhere.lora_up.weight": a[f"{STEM}.lora_up.weight"]}, "understands"),
}


def refused(verb: str, file: Path, base: Path, folder: Path, error: type[SdopsError], message: str) -> None:
    """The verb names what is wrong, says what to do, and leaves no trace."""
    fine = loras.save(folder / "fine.safetensors", good((8, 8)))
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(error, match=message) as caught:
        VERBS[verb](file, fine, base, folder / "out.safetensors")
    assert caught.value.hint
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("verb", VERBS)
def test_what_is_wrong_is_named(verb: str, wrong: str, base: Path, shape: tuple[int, ...], tmp_path: Path) -> None:
    change, message = WRONG[wrong]
    file = loras.save(tmp_path / "bad.safetensors", change(good(shape)))
    refused(verb, file, base, tmp_path, FormatError, message)


@pytest.mark.parametrize("verb", VERBS)
def test_half_a_file_is_named(verb: str, base: Path, shape: tuple[int, ...], tmp_path: Path) -> None:
    file = loras.save(tmp_path / "bad.safetensors", good(shape))
    file.write_bytes(file.read_bytes()[:-100])
    refused(verb, file, base, tmp_path, FormatError, r"bad\.safetensors.*(cut|short|missing)")


@pytest.mark.parametrize("verb", ["apply", "merge with a LoRA", "convert family"])
def test_a_lora_for_another_architecture_is_named(
    verb: str, sdxl: Path, shape: tuple[int, ...], tmp_path: Path
) -> None:
    arrays = good(shape) | {f"{STEM.replace('to_k', 'to_v')}.lora_up.weight": np.zeros((320, 1), np.float16)}
    arrays[f"{STEM.replace('to_k', 'to_v')}.lora_down.weight"] = np.zeros((1, 768), np.float16)
    file = loras.save(tmp_path / "bad.safetensors", arrays, {"ss_base_model_version": "sd_v1"})
    refused(verb, file, sdxl, tmp_path, MismatchError, "Stable Diffusion 1")


def test_loras_for_different_models_are_not_merged(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    files = []
    for name, width in (("one", 768), ("two", 2048)):
        arrays = {f"{STEM}.lora_up.weight": rng.standard_normal((320, 1)).astype(np.float16)}
        arrays[f"{STEM}.lora_down.weight"] = rng.standard_normal((1, width)).astype(np.float16)
        files.append(loras.save(tmp_path / f"{name}.safetensors", arrays))
    with pytest.raises(MismatchError, match="different models"):
        sdops.merge(*files, output=tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("verb", ["apply", "merge with a LoRA", "convert family"])
def test_wrong_shapes_for_the_model_are_named(verb: str, base: Path, shape: tuple[int, ...], tmp_path: Path) -> None:
    file = loras.save(tmp_path / "bad.safetensors", good((shape[0] + 1, shape[1])))
    refused(verb, file, base, tmp_path, MismatchError, "lora_up.*does not fit")


def test_loras_of_different_sizes_are_named(shape: tuple[int, ...], tmp_path: Path) -> None:
    one = loras.save(tmp_path / "one.safetensors", good(shape))
    two = loras.save(tmp_path / "two.safetensors", good((shape[0] - 1, shape[1])))
    for verb in (lambda: sdops.merge(one, two, output=tmp_path / "out.safetensors"), lambda: sdops.compare(one, two)):
        with pytest.raises(MismatchError, match=rf"{shape[0]}x{shape[1]} in `one.*{shape[0] - 1}x.* in `two"):
            verb()


# ------------------------------------------------------------------------------------------------------------- extract


def extracted(tuned: Path, base: Path, folder: Path, error: type[SdopsError], message: str, **options: int) -> None:
    (folder / "out").mkdir(exist_ok=True)
    with pytest.raises(error, match=message) as caught:
        sdops.extract(tuned, base=base, output=folder / "out" / "out.safetensors", **options)
    assert caught.value.hint
    assert not list((folder / "out").iterdir())


def test_extract_names_what_is_wrong_with_its_models(base: Path, sdxl: Path, tmp_path: Path) -> None:
    whole = base.read_bytes()
    half = tmp_path / "half.safetensors"
    half.write_bytes(whole[: len(whole) // 2])
    extracted(half, base, tmp_path, FormatError, "half")
    extracted(base, sdxl, tmp_path, MismatchError, "SDXL|Stable Diffusion XL")
    extracted(base, base, tmp_path, UsageError, "at least 1", rank=0)
    extracted(base, base, tmp_path, MismatchError, "same weights")

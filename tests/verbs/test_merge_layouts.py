"""Models in two layouts merge as if they were in one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sdops.archs.detect import detect
from sdops.core.source import read
from sdops.core.spec import Spec
from sdops.errors import MismatchError
from sdops.formats import open_source
from sdops.layouts.tables import layouts
from sdops.verbs.convert import convert
from sdops.verbs.merge import Merge, merge
from tests import tiny
from tests.archs.lists import load
from tests.verbs.test_diff_layouts import made_of, put_together

PREFIX = {"unet": "unet.", "transformer": "transformer.", "vae": "vae.", "clip_g": "text_encoder_2.text_model."}
PREFIX = {**PREFIX, "clip_h": "text_encoder."}
NAMES = ["sd15", "sd21", "sdxl", "sd35-medium", "flux1-dev"]


class Shapes:
    """The key list of a real model; its values are never read."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.specs = load(name)
        self.metadata: dict[str, str] = {}

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        assert key.endswith("position_ids")
        assert start == 0
        buffer[:] = np.arange(77, dtype=np.int64).tobytes()

    def close(self) -> None:
        pass


def respelled(path: Path) -> tuple[tiny.Model, list[str]]:
    """A model with all components in their other layout that have one, and which components those are."""
    model, found, changed = tiny.load(path), {}, []
    for part in detect(open_source(path).specs).components:
        arrays = {key.removeprefix(part.prefix): model[key][1] for key in part.keys}
        others = [name for name in layouts(part.family, part.name) if name != part.layout and part.name in PREFIX]
        if not others:
            found |= {key: model[key] for key in part.keys}
            continue
        made = made_of(part.family, part.name, part.layout, others[0], arrays)
        prefix = PREFIX[part.name].removesuffix("text_model.")
        found |= {prefix + key: ("F16", put_together(pieces, arrays)) for key, pieces in made.items()}
        changed.append(part.name)
    return found, changed


def lazy(*sources: object, **options: object) -> Merge:
    made = merge(*sources, **options)  # type: ignore[arg-type]
    assert isinstance(made, Merge)
    return made


@pytest.mark.parametrize("name", NAMES)
def test_a_model_and_itself_in_another_layout_give_the_model(
    name: str, small_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path = small_checkpoint(name, dtype="F16")
    other, changed = respelled(path)
    there = tiny.write(tmp_path / "other.safetensors", other)
    for a, b in ((path, there), (there, path)):
        made = lazy(a, b, alpha=0.3)
        first = tiny.load(a)
        assert set(made.parts["b"].layouts) == set(changed)
        assert set(made.specs) == set(first)
        for key, (_, array) in first.items():
            assert bytes(read(made, key)) == np.ascontiguousarray(array).tobytes(), key
        copied = {key for key, step in made.plan.steps.items() if step.action != "merge"}
        assert all("has no place for it" in made.plan.steps[key].reason or "position_ids" in key for key in copied)


@pytest.mark.parametrize("method", ["weighted-sum", "ties", "slerp", "della"])
def test_a_layout_changes_no_number(method: str, small_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    paths = [small_checkpoint("sdxl", dtype="F16", tuned=seed) for seed in (1, 2)]
    base = {"base": small_checkpoint("sdxl", dtype="F16")} if method in ("ties", "della") else {}
    other = tiny.write(tmp_path / "other.safetensors", respelled(paths[1])[0])
    plain, seen = lazy(*paths, method=method, **base), lazy(paths[0], other, method=method, **base)
    merged = [key for key, step in plain.plan.steps.items() if step.action == "merge" and not key.endswith("scale")]
    assert len(merged) > 2000
    for key in merged[::9]:
        assert read(seen, key) == read(plain, key), key


PAIRS = [
    ("sd15-ldm", "sd15-diffusers"),
    ("sd21-ldm", "sd21-diffusers"),
    ("sdxl-base-sgm", "sdxl-base-diffusers"),
    ("sd3-medium-sai-incl-clips", "sd3-medium-diffusers"),
    ("flux1-dev-comfy-allinone", "flux1-dev-diffusers"),
    ("wan21-t2v-1.3b-native-transformer", "wan21-t2v-1.3b-diffusers-transformer"),
    ("controlnet-sd15-ldm", "controlnet-sd15-diffusers"),
]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0])
@pytest.mark.parametrize("turned", [False, True])
def test_real_models_are_planned_whole(pair: tuple[str, str], turned: bool) -> None:
    a, b = pair[::-1] if turned else pair
    made = lazy(Shapes(a), Shapes(b))
    reasons = {step.reason for step in made.plan.steps.values()} | set(made.plan.dropped.values())
    assert not {
        reason for reason in reasons - {"", "position ids"} if "no place" not in reason and "in `" not in reason
    }
    assert made.plan.count("merge") > 0.6 * len(made.specs)


def test_it_is_told_in_the_report_and_the_recipe(small_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = small_checkpoint("sd15", dtype="F16")
    other = tiny.write(tmp_path / "other.safetensors", respelled(path)[0])
    report = lazy(path, other).save(tmp_path / "out.safetensors")
    assert "other.safetensors`: unet diffusers -> ldm, vae diffusers -> ldm" in str(report)
    assert report.data["layouts"] == {"b": {"unet": ("diffusers", "ldm"), "vae": ("diffusers", "ldm")}}
    recorded = json.loads(open_source(tmp_path / "out.safetensors").metadata["sdops"])["inputs"]
    assert recorded[1]["layouts"] == {"unet": ["diffusers", "ldm"], "vae": ["diffusers", "ldm"]}
    assert "layouts" not in recorded[0]


def test_what_has_no_counterpart_follows_the_policy(small_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = small_checkpoint("sd15", dtype="F16")
    other = respelled(path)[0]
    del other["unet.conv_out.bias"]
    there = tiny.write(tmp_path / "less.safetensors", other)
    with pytest.raises(MismatchError, match=r"`less.safetensors` lacks 1 tensor .*`model.diffusion_model.out.2.bias`"):
        merge(path, there)
    kept = lazy(path, there, missing="keep")
    assert kept.plan.steps["model.diffusion_model.out.2.bias"].reason == "missing in `less.safetensors`"
    assert "model.diffusion_model.out.2.bias" not in lazy(path, there, missing="drop").specs
    with pytest.raises(MismatchError, match=r"lacks 1 tensor .*`unet.conv_out.bias`"):
        merge(there, path)
    assert "unet.conv_out.bias" in lazy(there, path, missing="keep").specs


def test_a_tensor_that_nobody_knows_follows_the_policy(small_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = small_checkpoint("sd15", dtype="F16")
    other = respelled(path)[0] | {"unet.foreign.weight": ("F16", np.ones(3, np.float16))}
    there = tiny.write(tmp_path / "more.safetensors", other)
    with pytest.raises(MismatchError, match=r"lacks 1 tensor .*`model.diffusion_model.foreign.weight`"):
        merge(path, there)
    assert lazy(path, there, missing="keep").specs["model.diffusion_model.foreign.weight"] == Spec("F16", (3,))
    dropped = lazy(path, there, missing="drop").plan.dropped
    assert dropped == {"model.diffusion_model.foreign.weight": "only in `more.safetensors`"}
    with pytest.raises(MismatchError, match=r"lacks 1 tensor .*`unet.foreign.weight`"):
        merge(there, path)


def test_a_vae_in_another_layout(small_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    paths = [small_checkpoint("sd15", dtype="F16", tuned=seed) for seed in (1, 2)]
    donor = small_checkpoint("sd15", dtype="F16")
    vae = {key.removeprefix("vae."): tensor for key, tensor in respelled(donor)[0].items() if key.startswith("vae.")}
    made = lazy(*paths, vae=tiny.write(tmp_path / "vae.safetensors", vae))
    for key, (_, array) in tiny.load(donor).items():
        if key.startswith("first_stage_model."):
            assert bytes(read(made, key)) == np.ascontiguousarray(array).tobytes(), key


def test_a_vae_that_is_lacking_is_added_in_its_place(small_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    donor = small_checkpoint("sd15", dtype="F16")
    whole = tiny.load(donor)
    unet = {key: tensor for key, tensor in whole.items() if key.startswith("model.diffusion_model.")}
    vae = {key.removeprefix("vae."): tensor for key, tensor in respelled(donor)[0].items() if key.startswith("vae.")}
    path = tiny.write(tmp_path / "unet.safetensors", unet)
    made = lazy(path, path, vae=tiny.write(tmp_path / "vae.safetensors", vae))
    added = made.specs.keys() - unet.keys()
    assert added == {key for key in whole if key.startswith("first_stage_model.")}
    for key in added:
        assert bytes(read(made, key)) == np.ascontiguousarray(whole[key][1]).tobytes(), key


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
@pytest.mark.parametrize("method", ["weighted-sum", "nearswap"])
def test_a_folder_merges_as_the_single_file_that_it_stands_for(
    name: str, method: str, small_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    file, other = small_checkpoint(name, dtype="F16"), small_checkpoint(name, dtype="F16", tuned=1)
    convert(file, to="diffusers", output=tmp_path / "folder")
    seen, plain = lazy(tmp_path / "folder", other, method=method), lazy(file, other, method=method)
    assert seen.parts["a"].layouts["unet"] == ("diffusers", detect(open_source(file).specs).main.layout)
    assert set(seen.specs) == set(plain.specs)
    for key in list(plain.specs)[::9]:
        assert read(seen, key) == read(plain, key), key

"""Every dialect reads what it should, writes what it can hold, and gets it back."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sdops.dialects as shelf
from fixtures import loras
from sdops.core.spec import Spec
from sdops.dialects import ORDER, Contents, best, dialect
from sdops.errors import MismatchError, UsageError
from sdops.verbs._adapter_family import read_as_any
from sdops.verbs._adapter_names import ARCHITECTURES, names_of
from sdops.verbs._adapters import holders, open_adapter, spelled
from tests.dialects.helpers import assert_same_deltas, bytes_of, fixture, save

TABLES = sorted((Path(loras.__file__).parent / "lora_keys").glob("*.json"))
SHARED = sorted((Path(loras.__file__).parents[2] / "shared" / "data" / "loras").glob("*"))
SPELLINGS = sorted(loras.SPELLINGS)
FAMILIES = sorted(loras.FAMILIES)
RANKS = 32  # sizes up to this one are ranks in the tables
EVERYTHING = ("kohya", "onetrainer", "lycoris", "comfy")  # dialects of all families
ABLE = [(*spelling, family) for spelling in SPELLINGS for family in FAMILIES if spelling[0] in EVERYTHING]
ABLE += [(*spelling, "lora") for spelling in SPELLINGS if spelling[0] not in EVERYTHING]
WITHOUT_BASE = ("lora", "lora_alpha", "loha", "lokr")


def test_every_file_of_the_shelf_is_in_the_order():
    files = {path.stem for path in Path(shelf.__file__).parent.glob("[!_]*.py")}
    assert files == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_dialect_offers_what_the_shelf_says(name):
    module = import_module(f"sdops.dialects.{name}")
    assert all(callable(getattr(module, function)) for function in ("score", "stems", "read", "write"))
    assert dialect(name) is module


def test_an_unknown_dialect_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match="no dialect `klingon`") as caught:
        dialect("klingon")
    assert "kohya" in (caught.value.hint or "")


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: f"{a.family}-{a.variant}")
@pytest.mark.parametrize("name", ORDER)
def test_no_two_layers_share_a_name(name, architecture):
    names = names_of(architecture.family, architecture.variant)
    stems = dialect(name).stems(names)
    by_target: dict[object, set[str]] = {}
    for stem, target in stems.items():
        by_target.setdefault(target, set()).add(stem)
    for component in (names.denoiser, *names.text_encoders):
        for layout in names.layouts(component):
            modules = names.modules(component, layout)
            assert len({module.replace(".", "_") for module in modules}) == len(modules)


# ------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(("name", "architecture"), SPELLINGS)
def test_reads_names_written_by_hand(tmp_path, name, architecture):
    adapter = fixture(tmp_path, name, architecture)
    wanted = [target for target, _ in loras.SPELLINGS[name, architecture].values()]
    assert adapter.architecture == architecture
    assert [str(patch.target) for patch in adapter.patches] == wanted
    assert {patch.family for patch in adapter.patches} == {"lora"}
    assert adapter.dialect == name


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_every_family(tmp_path, family):
    adapter = fixture(tmp_path, "kohya", "sd1", family)
    expected = {"lora_alpha": "lora", "tucker": "lora", "dora": "lora", "dora_inputs": "lora"}.get(family, family)
    assert {patch.family for patch in adapter.patches} == {expected}
    assert len(adapter.patches) == len(loras.SPELLINGS["kohya", "sd1"])


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_understands_every_name_of_real_files(path):
    specs = {key: Spec("F16", tuple(shape)) for key, shape in json.loads(path.read_text()).items()}
    name = best(specs)
    assert name is not None
    meant = read_as_any(Contents(specs), dialect(name))
    reading = meant.reading
    assert reading.unknown == []
    assert meant.architecture.family == path.stem.removesuffix("_format").partition("_lo")[0].replace("flux", "flux1")
    assert sum(len(patch.parts) for patch in reading.patches) == len(specs)


# ------------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize(("name", "architecture", "family"), ABLE)
def test_comes_back_from_its_own_dialect_bit_by_bit(tmp_path, name, architecture, family):
    adapter = fixture(tmp_path, name, architecture, family)
    again = open_adapter(save(spelled(adapter, name), tmp_path / "again"))
    assert bytes_of(again) == bytes_of(adapter)


@pytest.mark.parametrize("to", ORDER)
@pytest.mark.parametrize(("name", "architecture", "family"), [case for case in ABLE if case[2] in WITHOUT_BASE])
def test_means_the_same_in_every_dialect_that_can_hold_it(tmp_path, name, architecture, family, to):
    adapter = fixture(tmp_path, name, architecture, family)
    try:
        other = open_adapter(save(spelled(adapter, to), tmp_path / "other"))
    except MismatchError:
        return
    assert_same_deltas(adapter, other)
    try:
        back = open_adapter(save(spelled(other, name), tmp_path / "back"))
    except MismatchError:
        return
    assert_same_deltas(adapter, back)


@pytest.mark.parametrize(
    ("name", "architecture", "family", "wanted"),
    [
        ("kohya", "sd1", "lora", {"bfl": False, "comfy": True, "xlabs": False, "diffusers": True, "peft": False}),
        ("kohya", "sd1", "loha", {"kohya": True, "comfy": True, "onetrainer": True, "diffusers": False}),
        ("xlabs", "flux1", "lora", {"kohya": True, "diffusers": True, "peft": True, "bfl": True, "xlabs": True}),
        ("kohya", "flux1", "lora", {"comfy": True, "diffusers": True, "xlabs": False, "cloneofsimo": False}),
        ("lycoris", "flux1", "dora", {"diffusers": True, "peft": True, "bfl": False}),
        ("lycoris", "flux1", "dora_inputs", {"lycoris": True, "diffusers": False, "kohya": False}),
    ],
)
def test_says_what_a_dialect_can_hold(tmp_path, name, architecture, family, wanted):
    able = set(holders(fixture(tmp_path, name, architecture, family)))
    assert {to: to in able for to in wanted} == wanted


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_real_names_come_back_from_every_dialect(tmp_path, path):
    rng = np.random.default_rng(0)
    arrays = {}
    for key, shape in json.loads(path.read_text()).items():
        narrow = [max(size // 96, 1) if size > RANKS else 2 for size in shape]
        arrays[key] = rng.standard_normal(narrow).astype(np.float16) if shape else np.array(2.0, np.float32)
    adapter = open_adapter(loras.save(tmp_path / "real.safetensors", arrays))
    for to in set(holders(adapter)) & {"kohya", "diffusers", "comfy"}:
        other = open_adapter(save(spelled(adapter, to), tmp_path / to))
        assert other.architecture == adapter.architecture
        if {patch.family for patch in adapter.patches} == {"lora"}:
            assert_same_deltas(adapter, other)
        back = open_adapter(save(spelled(other, adapter.dialect), tmp_path / f"{to}-back"))
        assert {patch.target for patch in back.patches} == {patch.target for patch in adapter.patches}


@pytest.mark.skipif(not SHARED, reason="the real files are not part of the repository")
@pytest.mark.parametrize("path", SHARED, ids=lambda path: path.name)
def test_real_files_come_back_bit_by_bit(tmp_path, path):
    adapter = open_adapter(path)
    before = bytes_of(adapter)
    able = list(holders(adapter))
    assert len(able) >= 3
    for to in able:
        there = spelled(adapter, to)
        other = open_adapter(save(there, tmp_path / to))
        back = open_adapter(save(spelled(other, adapter.dialect), tmp_path / "back"))
        assert bytes_of(back) == {key: value for key, value in before.items() if key not in there.left_out}


# --------------------------------------------------------------------------------------------------------- detection


@given(st.lists(st.text(max_size=40), max_size=20))
def test_any_names_can_be_asked_about(keys):
    assert best(keys) in (None, *ORDER)
    for key in keys:
        shelf.split(key)

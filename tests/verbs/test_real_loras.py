"""Real LoRA files, and tables of names of real ones: every dialect and back, resize, merge, apply."""

from __future__ import annotations

import json
import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import sdops
from fixtures import loras
from fixtures.make import small
from sdops.core.patch import Adapter, Target
from sdops.core.source import read
from sdops.dialects import ORDER
from sdops.errors import FormatError, MismatchError
from sdops.formats import open_source
from sdops.verbs._adapters import open_adapter
from tests.dialects.helpers import assert_same_deltas, deltas

SHARED = Path(loras.__file__).parents[2] / "shared" / "data"
FILES = sorted(path for path in (SHARED / "loras").glob("*") if not path.name.endswith(".ti.pt"))
TWINS = ("catundchat_sd15_diffusers_old.bin", "cloneofsimo_contents_lora_kiriko.pt")  # like others
DIFFERENT = [path for path in FILES if path.name not in TWINS]
TABLES = sorted((Path(loras.__file__).parent / "lora_keys").glob("*.json"))
SOME = 11  # layers are large: every eleventh is compared
pytestmark = pytest.mark.skipif(not FILES, reason="the real files are not here")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    small("sd15", path, dtype="F32")
    return path


def from_table(path: Path, folder: Path) -> Path:
    """Random tensors for a table's names of the first two blocks; widths are divided, so that files stay small."""
    random = np.random.default_rng(0)
    arrays = {}
    for key, shape in json.loads(path.read_text()).items():
        block = re.search(r"[._](\d+)[._]", key)
        if block is None or int(block[1]) < 2:
            narrow = [size // 64 if size >= 768 else min(size, 2) for size in shape]
            arrays[key] = random.standard_normal(narrow).astype(np.float32) if shape else np.float32(1.5)
    return loras.save(folder / "table.safetensors", arrays)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_inspect_explains_it(path: Path) -> None:
    report = sdops.inspect(path)
    assert not report.warnings or all("nothing here understands" not in text for text in report.warnings)


@pytest.mark.parametrize("path", DIFFERENT, ids=lambda path: path.name)
def test_every_dialect_that_holds_it_gives_it_back(path: Path, tmp_path: Path) -> None:
    path = thinned(path, tmp_path) if "lokr" in path.name else path
    original = open_adapter(path)
    held = [
        to for to in ORDER if to != "diffusers_old" and holds_and_returns(path, original.dialect, to, tmp_path / to)
    ]
    assert {"kohya", "comfy"} <= set(held)


def holds_and_returns(path: Path, dialect: str, to: str, folder: Path) -> bool:
    folder.mkdir()
    there = folder / "adapter_model.safetensors"
    try:
        sdops.convert(path, to=to, output=there)
    except MismatchError:
        return False
    same(path, there)
    back = folder / "back.safetensors"
    try:
        sdops.convert(there, to=dialect if dialect != "diffusers_old" else "diffusers", output=back)
    except MismatchError:
        return True
    same(path, back)
    return True


def same(one: Path, other: Path) -> None:
    """The same layers; and the same change of some of them, because they are large."""
    a, b = open_adapter(one), open_adapter(other)
    assert {patch.target for patch in a.patches} == {patch.target for patch in b.patches}
    assert_same_deltas(*(only(adapter, chosen(one)) for adapter in (a, b)))


def only(adapter: Adapter, targets: set[Target]) -> Adapter:
    return replace(adapter, patches=tuple(patch for patch in adapter.patches if patch.target in targets))


@pytest.mark.parametrize("path", DIFFERENT, ids=lambda path: path.name)
def test_resize_and_merge_with_itself(path: Path, tmp_path: Path) -> None:
    file = thinned(path, tmp_path) if "lokr" in path.name else path
    before = deltas(only(open_adapter(file), chosen(file)))
    whole = tmp_path / "whole.safetensors"
    sdops.resize(file, rank=1024, to="kohya", output=whole, dtype="fp32")
    close(deltas(only(open_adapter(whole), chosen(file))), before)
    twice = tmp_path / "twice.safetensors"
    sdops.merge(file, file, method="concat", weights=(0.75, -0.25), to="kohya", output=twice, dtype="fp32")
    close(deltas(only(open_adapter(twice), chosen(file))), {name: change / 2 for name, change in before.items()})


def chosen(file: Path) -> set[Target]:
    return {patch.target for patch in open_adapter(file).patches[::SOME]}


def thinned(path: Path, folder: Path) -> Path:
    """Every eleventh layer of a safetensors file: LoKr of high rank takes long."""
    arrays = load_file(path)
    stems = list(dict.fromkeys(key.partition(".")[0] for key in arrays))[::SOME]
    return loras.save(folder / "thinned.safetensors", {k: v for k, v in arrays.items() if k.partition(".")[0] in stems})


def load_file(path: Path) -> dict[str, loras.Array]:
    with closing(open_source(path)) as source:
        dtypes = {"F16": np.float16, "F32": np.float32}
        return {
            key: np.frombuffer(read(source, key), dtypes[spec.dtype]).reshape(spec.shape)
            for key, spec in source.specs.items()
        }


def close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for name, change in wanted.items():
        if name in found or change.any():  # layers that change nothing may be left out
            assert float((found[name] - change).norm()) <= 2e-6 * float(change.norm()), name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_apply_refuses_what_does_not_fit(path: Path, base: Path, tmp_path: Path) -> None:
    """The model is 32 times narrower than the LoRAs' own: shapes or names say so, before anything is written."""
    output = tmp_path / "applied.safetensors"
    with pytest.raises((MismatchError, FormatError)):
        sdops.apply(base, lora=[path], output=output)
    assert not output.exists()


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_tables_of_names_survive_every_dialect(path: Path, tmp_path: Path) -> None:
    file = from_table(path, tmp_path)
    dialect = open_adapter(file).dialect
    for to in ORDER:
        folder = tmp_path / to
        folder.mkdir()
        try:
            sdops.convert(file, to=to, output=folder / "adapter_model.safetensors")
            sdops.convert(folder / "adapter_model.safetensors", to=dialect, output=folder / "back.safetensors")
        except MismatchError:
            continue
        assert_same_deltas(open_adapter(file), open_adapter(folder / "back.safetensors"))

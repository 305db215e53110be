"""Checkpoints as torch and training programs write them."""

from __future__ import annotations

import collections
import pickle
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdops.errors import FormatError
from sdops.formats import load_object, open_source
from tests.formats.torch_files import check, save, zip_with
from tests.formats.writers import raw_bytes, sample

FORMS = [(legacy, protocol) for legacy in (False, True) for protocol in (2, 3, 4, 5)]
every_form = pytest.mark.parametrize(("legacy", "protocol"), FORMS)


# What honest files look like


@every_form
def test_strides_offsets_and_shared_storages(tmp_path, legacy, protocol):
    base = torch.randn(6, 8)
    tensors = {
        "base": base,
        "turned": base.T,
        "row": base[2],
        "column": base[:, 3],
        "steps": base[::2, 1::3],
        "again": base,
        "expanded": torch.randn(5, 1).expand(5, 4),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "ones": torch.randn(3, 1, 4).transpose(0, 1),
        "empty_view": base[:, 0:0],
        "scalar_view": base[3, 3],
    }
    source = check(save(tmp_path / "x.pt", tensors, legacy=legacy, protocol=protocol), tensors)
    assert {"base", "row", "again", "ones", "scalar_view"} <= set(source.offsets)
    assert not {"turned", "column", "steps", "expanded", "channels_last"} & set(source.offsets)


@every_form
def test_parts_of_a_gathered_tensor(tmp_path, legacy, protocol):
    tensor = torch.arange(48, dtype=torch.int16).reshape(6, 8).T
    source = open_source(save(tmp_path / "x.pt", {"a": tensor}, legacy=legacy, protocol=protocol))
    buffer = bytearray(11)
    source.read_into("a", 7, memoryview(buffer))
    assert buffer == raw_bytes(tensor)[7:18]
    source.close()


@every_form
def test_parameters_and_buffers(tmp_path, legacy, protocol):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    state = module.state_dict(keep_vars=True)  # an OrderedDict with an attribute, of Parameters
    check(save(tmp_path / "x.pt", state, legacy=legacy, protocol=protocol), dict(state))


def test_parameters_with_attributes_of_their_own(tmp_path):
    parameter = torch.nn.Parameter(torch.randn(3))
    parameter.float = "shadow"  # type: ignore[assignment]
    tagged = torch.randn(4)
    tagged.note = {"x": 1}  # type: ignore[attr-defined]
    check(save(tmp_path / "x.pt", {"a": parameter, "b": tagged}), {"a": parameter.data, "b": tagged})


@every_form
@pytest.mark.parametrize(
    "wrappers", [("state_dict",), ("model",), ("params_ema",), ("model", "state_dict"), ("x", "y")]
)
def test_wrappers_are_taken_off(tmp_path, wrappers, legacy, protocol):
    value: Any = sample()
    for name in reversed(wrappers):
        value = {name: value}
    check(save(tmp_path / "x.pt", value, legacy=legacy, protocol=protocol), sample())


class ModelCheckpoint:
    """Stands for the class that Lightning leaves in checkpoints."""

    def __init__(self) -> None:
        self.best = np.float64(0.5)


@pytest.fixture
def lightning(monkeypatch):
    """A class under a Lightning name while the file is written; gone when it is read."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    monkeypatch.setattr(ModelCheckpoint, "__module__", name)
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    monkeypatch.setattr(sys.modules[name], "ModelCheckpoint", ModelCheckpoint, raising=False)
    return ModelCheckpoint


@every_form
def test_lightning_leftovers(tmp_path, lightning, legacy, protocol):
    checkpoint = {
        "epoch": 12,
        "global_step": 470000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": collections.OrderedDict(sample()),
        "callbacks": {lightning: {"monitor": "val/loss", "best": np.float64(0.25), "saver": lightning()}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3), "step": 7}}, "param_groups": [{"lr": 1e-4}]}],
        "lr_schedulers": [],
        "hyper": {1, 2, frozenset({3})},
        "counts": collections.Counter("aab"),
        "ratio": 0.5,
        "done": True,
        "shape": torch.Size([1, 2]),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "array": np.arange(3),
        "path": Path("x"),
    }
    path = save(tmp_path / "x.ckpt", checkpoint, legacy=legacy, protocol=protocol)
    for name in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
        del sys.modules[name]
    source = check(path, sample())
    assert source.metadata == {
        "epoch": "12",
        "global_step": "470000",
        "pytorch-lightning_version": "1.4.2",
        "ratio": "0.5",
        "done": "True",
    }
    assert set(source.dropped) == {"callbacks", "optimizer_states", "lr_schedulers", "hyper", "counts", "shape",
                                   "dtype", "device", "array", "path"}  # fmt: skip


def test_dicts_inside_are_joined_with_dots(tmp_path):
    value = {"unet": {"a": torch.ones(2)}, "text": {"b": {"c": torch.zeros(3)}}, "step": 3}
    source = check(save(tmp_path / "x.pt", value), {"unet.a": torch.ones(2), "text.b.c": torch.zeros(3)})
    assert source.metadata == {"step": "3"}


def test_names_that_cannot_be_kept_are_listed(tmp_path):
    value = {"a": torch.ones(2), "__metadata__": torch.ones(1), 3: "x", "\ud800": torch.ones(1)}
    source = check(save(tmp_path / "x.pt", value), {"a": torch.ones(2)})
    assert sorted(source.dropped) == ["(unnamed)", "(unnamed)", "__metadata__"]


def test_big_endian(tmp_path):
    tensors = {
        "f16": torch.randn(5).half(), "f32": torch.randn(3, 4), "i64": torch.arange(4), "u8": torch.arange(5).byte(),
        "c64": torch.randn(3, dtype=torch.complex64), "turned": torch.randn(3, 4).T,
    }  # fmt: skip
    little = save(tmp_path / "little.pt", tensors)
    with zipfile.ZipFile(little) as old, zipfile.ZipFile(tmp_path / "big.pt", "w") as new:
        order = {str(index): tensor for index, tensor in enumerate(tensors.values())}
        for info in old.infolist():
            data = old.read(info)
            root, _, member = info.filename.partition("/")
            if member == "byteorder":
                data = b"big"
            if member.startswith("data/"):
                tensor = order[member.removeprefix("data/")]
                word = 4 if tensor.dtype == torch.complex64 else tensor.element_size()
                data = np.frombuffer(data, f"u{word}").byteswap().tobytes()
            new.writestr(f"{root}/{member}", data)
    check(tmp_path / "big.pt", tensors)


def test_names_of_the_archive_do_not_matter(tmp_path):
    data = pickle.dumps({}, 2)
    for root in ("archive", "sd-v1-4", "ä b", "x.y"):
        with pytest.raises(FormatError, match="holds no tensors"):
            open_source(zip_with(tmp_path / "x.ckpt", data, root=root))


def test_storages_without_checksums(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = save(tmp_path / "x.pt", sample())
    finally:
        torch.serialization.set_crc32_options(True)
    check(path, sample())


def test_views_of_early_legacy_files(tmp_path):
    """Before version 0.4 a storage could be part of another: (key, first element, elements)."""
    path = save(tmp_path / "x.pt", {"a": torch.arange(10.0)}, legacy=True)
    content = path.read_bytes()
    # numel 10, no view -> numel 10, view ("v", 3, 4); size and stride of the tensor follow
    old = b"K\nNtq"
    assert content.count(old) == 1
    content = content.replace(old, b"K\nX\1\0\0\0vK\3K\4\x87tq")
    content = content.replace(b"K\0K\n\x85", b"K\0K\4\x85")
    path.write_bytes(content)
    check(path, {"a": torch.arange(3.0, 7.0)})


DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.mark.skipif(not DATA.exists(), reason="the real files are not part of the repository")
def test_real_files():
    seen = 0
    for path in sorted(DATA.glob("*/*")):
        if path.suffix not in (".pt", ".bin"):
            continue
        seen += 1
        expected = torch.load(path, weights_only=True, map_location="cpu")
        if isinstance(expected, dict):
            check(path, expected)
        else:
            with pytest.raises(FormatError, match=r"without (a name|names)"):
                open_source(path)
            found = load_object(path)
            many = expected if isinstance(expected, list) else [expected]
            shapes = [tensor.spec.shape for tensor in (found if isinstance(found, list) else [found])]
            assert shapes == [tuple(tensor.shape) for tensor in many]
    assert seen


# What sdops does not read, by name

REFUSED = {
    "list": ([torch.ones(2), torch.ones(3)], "a list of 2 tensors without names"),
    "tensor": (torch.ones(2, 3), r"one tensor without a name, F32\[2,3\]"),
    "numbers": ({320: [{"linear.weight": torch.ones(2)}], "step": 3}, "names its tensors by numbers"),
    "nothing": ({"epoch": 3}, "holds no tensors"),
    "empty": ({}, "holds no tensors"),
    "value": (3, "a single value"),
    "complex128": ({"a": torch.ones(2, dtype=torch.complex128)}, "ComplexDoubleStorage"),
    "sparse": ({"a": torch.eye(3).to_sparse()}, "sparse tensors"),
    "meta": ({"a": torch.empty(3, device="meta")}, "without values"),
    "conjugated": ({"a": torch.ones(2, dtype=torch.complex64).conj()}, "conjugated"),
    "module": (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_refuses_by_name(tmp_path, name, legacy):
    value, message = REFUSED[name]
    with pytest.raises(FormatError, match=message) as caught:
        open_source(save(tmp_path / "x.pt", value, legacy=legacy))
    assert "x.pt" in caught.value.message
    assert caught.value.hint


def test_torchscript(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for name in ("data.pkl", "code/__torch__.py", "constants.pkl"):
            archive.writestr(f"x/{name}", b"")
    with pytest.raises(FormatError, match="TorchScript: code, not weights"):
        open_source(tmp_path / "x.pt")


def test_legacy_storages_must_fit(tmp_path):
    path = save(tmp_path / "x.pt", sample(), legacy=True)
    content = path.read_bytes()
    path.write_bytes(content + b"x")
    with pytest.raises(FormatError, match="1 bytes follow the last storage"):
        open_source(path)
    path.write_bytes(content[:-5])
    with pytest.raises(FormatError, match="cut short"):
        open_source(path)


def test_load_object_gives_the_whole_tree(tmp_path):
    value = {320: [{"a": torch.ones(2, 3)}, {"b": torch.zeros(1)}], "step": 7, "name": "x"}
    for legacy in (False, True):
        found = load_object(save(tmp_path / "x.pt", value, legacy=legacy))
        assert found["step"] == 7
        assert [list(part) for part in found[320]] == [["a"], ["b"]]
        assert found[320][0]["a"].spec.shape == (2, 3)

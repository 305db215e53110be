"""Every repair: what it mends, that it says so, and that it leaves all else as it was."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdops.errors import FormatError, OutputError, UsageError
from sdops.formats import open_source
from sdops.verbs._repairs import NAMES, TABLE
from sdops.verbs.fix import fix
from sdops.verbs.hash import hash_files
from sdops.verbs.inspect import inspect
from sdops.verbs.meta import meta
from sdops.verbs.verify import verify
from tests import tiny

PT = {"format": "pt"}


@pytest.fixture
def model() -> tiny.Model:
    return tiny.checkpoint(1)


@pytest.fixture
def write(tmp_path):
    def make(model, metadata=PT) -> Path:
        return tiny.write(tmp_path / "m.safetensors", model, metadata)

    return make


def data(path: Path) -> bytes:
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def fixed(path: Path, **options) -> tuple[dict[str, list[str]], tiny.Model]:
    report = fix(path, **options)
    json.dumps(report.as_dict(), allow_nan=False)
    return report.data["repairs"], tiny.load(Path(report.data["output"]))


def test_a_sound_file_is_left_alone(write, model, tmp_path):
    path = write(model)
    report = fix(path)
    assert (report.data["repairs"], report.data["left"], report.result) == ({}, {}, [])
    assert "nothing to repair" in report.text()
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(
    "ids",
    [
        ("F16", np.arange(77, dtype="f2").reshape(1, 77)),
        ("I64", np.maximum(np.arange(77) - 1, 0).reshape(1, 77)),
        ("F32", (np.arange(77, dtype="f4") - 1e-3).reshape(1, 77)),
    ],
)
def test_position_ids(write, model, ids):
    path = write({**model, tiny.IDS: ids})
    done, made = fixed(path)
    assert set(done) == {"position-ids"}
    assert tiny.same(made[tiny.IDS], ("I64", tiny.POSITIONS))
    assert all(tiny.same(made[key], model[key]) for key in model)
    assert not verify(path.with_name("m.fixed.safetensors")).failed


def test_the_prefix_text_model(write, model):
    flat = {key.replace("transformer.text_model.", "transformer."): tensor for key, tensor in model.items()}
    done, made = fixed(write(flat))
    assert set(done) == {"text-model"}
    assert made.keys() == model.keys()
    assert all(tiny.same(made[key], model[key]) for key in model)


def test_the_prefix_and_position_ids_together(write, model):
    flat = {key.replace("transformer.text_model.", "transformer."): tensor for key, tensor in model.items()}
    flat[tiny.IDS.replace("text_model.", "")] = ("F16", np.arange(77, dtype="f2").reshape(1, 77))
    done, made = fixed(write(flat))
    assert set(done) == {"text-model", "position-ids"}
    assert all(tiny.same(made[key], model[key]) for key in model)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            "unet.unet.up_blocks.1.attentions.2.transformer_blocks.0.attn2.processor.to_v_lora",
            "unet.up_blocks.1.attentions.2.transformer_blocks.0.attn2.processor.to_v_lora",
        ),
        (
            "transformer.base_model.model.transformer_blocks.4.attn.to_q.lora",
            "transformer.transformer_blocks.4.attn.to_q.lora",
        ),
    ],
)
def test_loras_with_two_prefixes(write, before, after):
    width = 3072 if "base_model" in before else 1280
    inner = 3072 if "base_model" in before else 768
    factors = {"up": ("F16", np.ones((width, 4), "f2")), "down": ("F16", np.ones((4, inner), "f2"))}
    path = write({f"{before}.{name}.weight": factor for name, factor in factors.items()})
    done, made = fixed(path)
    assert done == {"prefixes": ["renamed 2 keys"]}
    assert made.keys() == {f"{after}.{name}.weight" for name in factors}
    assert inspect(path.with_name("m.fixed.safetensors")).warnings == []
    assert fix(path.with_name("m.fixed.safetensors")).data["repairs"] == {}


def test_wrong_hashes(write, model):
    path = write(model, {**PT, "sshs_model_hash": "0" * 64, "modelspec.hash_sha256": "0x" + "1" * 64})
    done, _ = fixed(path)
    true = hashlib.sha256(data(path)).hexdigest()
    found = tiny.metadata_of(path.with_name("m.fixed.safetensors"))
    assert set(done) == {"hashes"}
    assert (found["sshs_model_hash"], found["modelspec.hash_sha256"]) == (true, f"0x{true}")
    assert data(path.with_name("m.fixed.safetensors")) == data(path)


def test_hashes_that_are_right_stay(write, model):
    true = hashlib.sha256(data(write(model))).hexdigest()
    path = write(model, {**PT, "sshs_model_hash": true, "modelspec.hash_sha256": f"0x{true}"})
    assert fix(path).data["repairs"] == {}


def test_hashes_become_true_with_the_tensors(write, model):
    broken = {**model, tiny.IDS: ("I64", tiny.POSITIONS + 1)}
    true = hashlib.sha256(data(write(broken))).hexdigest()
    path = write(broken, {**PT, "sshs_model_hash": true})
    done, _ = fixed(path, only=["position-ids"])
    assert set(done) == {"position-ids", "hashes"}
    out = path.with_name("m.fixed.safetensors")
    assert tiny.metadata_of(out)["sshs_model_hash"] == hashlib.sha256(data(out)).hexdigest()


def test_the_legacy_hash(write):
    large = {"w": ("F16", np.arange(700_000, dtype=np.float16))}
    path = write(large, {**PT, "ss_note": "n", "sshs_legacy_hash": "00000000"})
    done, _ = fixed(path)
    assert set(done) == {"hashes"}
    stored = hash_files(path.with_name("m.fixed.safetensors"), verify=True).data["files"][0]["stored"]
    assert stored["sshs_legacy_hash"]["state"] == "ok"


def test_the_legacy_hash_of_moved_tensors(write):
    large = {
        "w": ("F16", np.arange(700_000, dtype=np.float16)),
        "model_ema.num_updates": ("F32", np.ones((), np.float32)),
    }
    path = write(large, {**PT, "ss_note": "n", "sshs_legacy_hash": "00000000", "sshs_model_hash": "00" * 32})
    done, _ = fixed(path)
    assert set(done) == {"integers", "hashes"}
    stored = hash_files(path.with_name("m.fixed.safetensors"), verify=True).data["files"][0]["stored"]
    assert {each["state"] for each in stored.values()} == {"ok"}
    assert stored.keys() == {"sshs_legacy_hash", "sshs_model_hash"}


def test_bytes_after_the_last_tensor(write, model):
    path = write(model)
    sound = path.read_bytes()
    path.write_bytes(sound + b"junk")
    with pytest.raises(FormatError) as caught:
        open_source(path)
    assert "sdops fix" in (caught.value.hint or "")
    done, _ = fixed(path)
    assert done == {"trailing-bytes": ["cut off 4 bytes after the last tensor"]}
    assert data(path.with_name("m.fixed.safetensors")) == data(path)[:-4]


def test_tensors_at_odd_places(tmp_path):
    text = b'{"__metadata__":{"format":"pt"},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
    text += b'"w":{"dtype":"F32","shape":[2],"data_offsets":[1,9]}}'
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\x07" + np.array([1, 2], "f4").tobytes())
    done, made = fixed(path)
    assert set(done) == {"alignment"}
    assert made["w"][1].tolist() == [1, 2]
    assert made["a"][1].tolist() == [7]
    assert fix(tmp_path / "m.fixed.safetensors").data["repairs"] == {}


def test_counters_become_integers(write, model):
    counters = {
        "model_ema.num_updates": ("F16", np.array(1000.0, "f2")),
        "x.num_batches_tracked": ("F32", np.array(7.6, "f4")),
        "y.num_batches_tracked": ("F32", np.array(np.nan, "f4")),
    }
    done, made = fixed(write({**model, **counters}))
    assert set(done) == {"integers"}
    assert tiny.same(made["model_ema.num_updates"], ("I32", np.array(1000, "i4")))
    assert tiny.same(made["x.num_batches_tracked"], ("I64", np.array(8, "i8")))
    assert made["y.num_batches_tracked"][0] == "F32"


def test_alphas(write):
    lora = {}
    for name, alpha in {
        "a": ("I64", np.array(8)),
        "b": ("F16", np.array([4.0], "f2")),
        "c": ("F16", np.array(2.0, "f2")),
        "d": ("F64", np.array(1.5)),
    }.items():
        module = f"lora_unet_down_blocks_0_attentions_0_{name}"
        lora[f"{module}.lora_down.weight"] = tiny.encoded(np.ones((2, 3)), "F16")
        lora[f"{module}.lora_up.weight"] = tiny.encoded(np.ones((3, 2)), "F16")
        lora[f"{module}.alpha"] = alpha
    done, made = fixed(write(lora))
    assert set(done) == {"alphas"}
    found = {key.rpartition("_")[2]: tensor for key, tensor in made.items() if key.endswith(".alpha")}
    assert {key: (dtype, array.shape, float(array)) for key, (dtype, array) in found.items()} == {
        "a.alpha": ("F32", (), 8), "b.alpha": ("F32", (), 4), "c.alpha": ("F16", (), 2), "d.alpha": ("F32", (), 1.5),
    }  # fmt: skip


def test_the_format_is_written(write, model):
    path = write(model, {"title": "x"})
    done, _ = fixed(path)
    assert done == {"format": ["wrote `format: pt`"]}
    assert tiny.metadata_of(path.with_name("m.fixed.safetensors")) == {"format": "pt", "title": "x"}
    assert data(path.with_name("m.fixed.safetensors")) == data(path)


@pytest.mark.skipif(os.name != "posix", reason="there are no such permissions")
def test_permissions(write, model):
    path = write(model)
    path.chmod(0o600)
    before, inode = path.read_bytes(), path.stat().st_ino
    assert "--in-place" in fix(path, dry_run=True).hints[0]
    report = fix(path, in_place=True)
    umask = os.umask(0)
    os.umask(umask)
    assert set(report.data["repairs"]) == {"permissions"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert (path.read_bytes(), path.stat().st_ino) == (before, inode)


def test_leftovers_go_on_request_only(write, model):
    stray = "lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight"
    extra = {stray: tiny.encoded(np.ones((2, 2)), "F16"), "optimizer_states.0": tiny.encoded([1.0], "F32")}
    path = write({**model, **extra})
    report = fix(path)
    assert report.data["repairs"] == {}
    assert set(report.data["left"]) == {"adapter-leftovers", "training-leftovers"}
    assert "--only adapter-leftovers --only training-leftovers" in report.hints[0]
    done, made = fixed(path, only=["adapter-leftovers", "training-leftovers"])
    assert set(done) == {"adapter-leftovers", "training-leftovers"}
    assert made.keys() == model.keys()


def test_in_place_replaces_the_file(write, model, tmp_path):
    path = write({**model, tiny.IDS: ("I64", tiny.POSITIONS + 1)})
    path.chmod(0o640)
    fix(path, in_place=True)
    assert tiny.same(tiny.load(path)[tiny.IDS], model[tiny.IDS])
    assert path.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == [path.name]


def test_a_dry_run_tells_and_writes_nothing(write, model, tmp_path):
    path = write({**model, tiny.IDS: ("I64", tiny.POSITIONS + 1)})
    report = fix(path, dry_run=True)
    assert report.data["repairs"]["position-ids"] == [f"`{tiny.IDS}` was broken: 77 of 77 are wrong"]
    assert report.data["output"] is None
    assert os.listdir(tmp_path) == [path.name]


def test_what_cannot_be_done_is_refused(write, model, tmp_path):
    path = write({**model, tiny.IDS: ("I64", tiny.POSITIONS + 1)})
    with pytest.raises(UsageError, match="no repair `position_id`") as caught:
        fix(path, only=["position_id"])
    assert caught.value.hint == "did you mean `position-ids`?"
    with pytest.raises(UsageError, match="either"):
        fix(path, in_place=True, output=tmp_path / "x.safetensors")
    with pytest.raises(OutputError, match="is the input"):
        fix(path, output=path, force=True)
    fix(path)
    with pytest.raises(OutputError, match="exists already"):
        fix(path)
    fix(path, force=True)


def test_what_is_shared_or_protected_is_not_replaced(write, model, tmp_path, monkeypatch):
    path = write(model, {})
    before = path.read_bytes()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OutputError, match="in the cache of the Hugging Face Hub"):
        fix(path, in_place=True)
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="is write-protected"):
        fix(path, in_place=True)
    with pytest.raises(OutputError, match="is write-protected"):
        meta(path, set_={"title": "x" * 9000})
    assert path.read_bytes() == before


def test_a_torch_file_becomes_safetensors(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "m.ckpt"
    torch.save({"state_dict": {"w": torch.ones(2), "text_model.embeddings.position_ids": torch.arange(1, 78.0)}}, path)
    done, made = fixed(path)
    assert set(done) == {"position-ids"}
    assert made["w"][1].tolist() == [1, 1]
    assert tiny.metadata_of(path.with_name("m.fixed.safetensors"))["format"] == "pt"
    with pytest.raises(FormatError, match="not a safetensors file"):
        fix(path, in_place=True)


def test_a_sound_torch_file_is_left_alone(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.ones(2)}, tmp_path / "m.pt")
    (tmp_path / "m.pt").chmod(0o600)
    report = fix(tmp_path / "m.pt", output=tmp_path / "wanted.safetensors")
    assert report.data["repairs"] == {}
    assert "was not written" in report.warnings[0]
    assert os.listdir(tmp_path) == ["m.pt"]


def test_every_repair_explains_itself_in_one_line():
    assert set(NAMES) == {*TABLE, "hashes"}
    for repair in TABLE.values():
        assert repair.explanation.endswith(".")
        assert len(repair.explanation) <= 85


@settings(max_examples=25, deadline=None)
@given(faults=st.sets(st.sampled_from(["ids", "flat", "junk", "format", "hash", "counter"])))
def test_any_mix_of_faults_is_repaired_at_once(tmp_path_factory, faults):
    model = tiny.checkpoint(1)
    wanted = dict(model)
    metadata = {} if "format" in faults else dict(PT)
    if "ids" in faults:
        model[tiny.IDS] = ("F16", np.arange(77, dtype="f2").reshape(1, 77))
    if "counter" in faults:
        model["model_ema.num_updates"] = ("F32", np.array(3.0, "f4"))
        wanted["model_ema.num_updates"] = ("I32", np.array(3, "i4"))
    if "flat" in faults:
        model = {key.replace("transformer.text_model.", "transformer."): tensor for key, tensor in model.items()}
    if "hash" in faults:
        metadata["sshs_model_hash"] = "f" * 64
    path = tiny.write(tmp_path_factory.mktemp("mix") / "m.safetensors", model, metadata)
    if "junk" in faults:
        path.write_bytes(path.read_bytes() + b"\0" * 7)
    report = fix(path, in_place=True)
    assert bool(report.data["repairs"]) == bool(faults)
    made = tiny.load(path)
    assert made.keys() == wanted.keys()
    assert all(tiny.same(made[key], wanted[key]) for key in wanted)
    assert fix(path).data["repairs"] == {}
    stored = hash_files(path, verify=True).data["files"][0]["stored"]
    assert {entry["state"] for entry in stored.values()} <= {"ok"}

"""Models on the Hub, read where a path stands: headers by range requests, contents through the cache or not at all."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from fixtures import make
from sdops.errors import HubError
from sdops.hub import blocks
from sdops.hub.listing import Entry, Listing, chosen
from sdops.hub.reference import parse
from sdops.verbs import _convert_extra
from tests.hub.conftest import large
from tests.hub.server import Blob, Fault


def test_a_header_of_7_gb_takes_less_than_1_mb(hub, sdops, tmp_path):
    make.full("sdxl", tmp_path / "sdxl.safetensors", dtype="F16", sparse=True)
    with (tmp_path / "sdxl.safetensors").open("rb") as file:
        header = file.read(4 << 20)
    nbytes = (tmp_path / "sdxl.safetensors").stat().st_size
    assert nbytes > 6_900_000_000
    hub.add("ann/sdxl", {"sdxl.safetensors": Blob(header, nbytes)})
    done = sdops("inspect", "hf://ann/sdxl", "--json")
    assert done.code == 0, done.err
    found = done.json["files"][0]
    assert (found["file"], found["bytes"]) == ("hf://ann/sdxl/sdxl.safetensors", nbytes)
    assert found["architecture"] == "sdxl"
    assert found["components"][0]["missing"] == []
    assert hub.sent() < 1_000_000
    assert len(hub.requests("GET")) <= 8


def test_names_are_the_users_in_every_form(hub, sdops, model):
    commit = hub.add("ann/one", {"sub/model.safetensors": model, "README.md": b"# one"})
    for name in ("hf://ann/one/sub/model.safetensors", f"hf://ann/one@{commit}/sub/model.safetensors"):
        done = sdops("inspect", name, "-v")
        assert done.lines[0] == name
        assert "sdops-hub" not in done.out + done.err
        assert "hf:/a" not in done.out + done.err
    done = sdops("inspect", "hf://ann/one/sub/model.safetensors", "--json", "--keys")
    assert "sdops-hub" not in done.out


def test_a_dry_run_reads_headers_and_keeps_nothing(hub, sdops, home, model):
    data = large(model, 9 << 20)
    hub.add("ann/a", {"a.safetensors": data})
    hub.add("ann/b", {"b.safetensors": data})
    done = sdops("merge", "hf://ann/a", "hf://ann/b", "--include", "nothing", "--dry-run")
    assert "nothing" in done.err  # a pattern that matches nothing is told before anything is downloaded
    assert hub.sent() < 1_200_000
    assert not home.exists() or not list(home.rglob("blobs/*"))


def test_merging_from_the_hub_gives_the_bytes_of_merging_files(hub, sdops, home, tmp_path, model, tuned):
    (tmp_path / "a.safetensors").write_bytes(model)
    (tmp_path / "b.safetensors").write_bytes(tuned)
    one, two = hub.add("ann/a", {"a.safetensors": model}), hub.add("ann/b", {"x/b.safetensors": tuned})
    assert sdops("merge", "a.safetensors", "b.safetensors", "-o", "files.safetensors", "--alpha", "0.3").code == 0
    remote = ("merge", "hf://ann/a", "hf://ann/b/x/b.safetensors", "--alpha", "0.3")
    done = sdops(*remote, "-q")
    assert done.lines == ["a+b.weighted-sum.alpha0.3.safetensors"]
    assert sorted(path.name for path in home.rglob("snapshots/*/**/*") if path.is_file()) == [
        "a.safetensors",
        "b.safetensors",
    ]
    hub.forget()
    streamed = sdops(*remote, "-o", "streamed.safetensors", "--stream", HF_HOME=str(tmp_path / "other"))
    assert streamed.code == 0, streamed.err
    assert not list((tmp_path / "other").rglob("blobs/*"))
    made, again = tmp_path / done.lines[0], tmp_path / "streamed.safetensors"
    assert made.read_bytes() == again.read_bytes()
    assert _tensors(made) == _tensors(tmp_path / "files.safetensors")
    recorded = json.loads(_header(made)["__metadata__"]["sdops"])["inputs"]
    assert [item["hub"] for item in recorded] == [
        f"hf://ann/a@{one}/a.safetensors",
        f"hf://ann/b@{two}/x/b.safetensors",
    ]
    assert [item["sha256"] for item in recorded] == [Blob(model).sha256, Blob(tuned).sha256]


def test_streaming_a_large_file_takes_it_once_and_keeps_nothing(hub, sdops, home, model):
    """Blocks are asked for once although tensors are read in pieces by several threads."""
    data = large(model, 40 << 20)
    hub.add("ann/large", {"m.safetensors": data})
    done = sdops("convert", "hf://ann/large", "--to", "ckpt", "--keep-unknown", "--stream", "-o", "m.ckpt")
    assert done.code == 0, done.err
    assert len(data) <= hub.sent() < 1.5 * len(data)
    assert not list(home.rglob("blobs/*"))
    assert len(hub.requests("GET /ann/large/resolve")) == 1  # then from where the Hub sent us
    assert {entry["token"] for entry in hub.requests() if entry["origin"] == "contents"} == {""}


def test_streamed_contents_are_compared_with_the_hash(hub, sdops, tmp_path, model):
    data = large(model, 20 << 20)
    hub.add("ann/large", {"m.safetensors": data})
    hub.faults.append(Fault("GET /[0-9a-f]{64}", after=3, flip=True))
    streamed = ("convert", "hf://ann/large", "--to", "ckpt", "--keep-unknown", "--stream", "-o", "m.ckpt")
    done = sdops(*streamed)
    assert done.code == 1
    assert "arrived damaged" in done.err
    assert not list(tmp_path.glob("*.ckpt"))
    hub.faults[:] = [Fault("GET /[0-9a-f]{64}", after=2, times=6, drop=1 << 20)]
    assert sdops(*streamed).code == 0  # a block that broke off goes on there, whatever `SDOPS_HUB_RETRIES` says


def test_blocks_are_followed_in_whatever_order_they_come(monkeypatch):
    """What is skipped, overtaken or let go of is asked for, a little; who reads everywhere is not followed."""
    monkeypatch.setattr(blocks, "BLOCK", 1 << 20)
    total = 2 * blocks.MOST
    data = bytes(range(256)) * (total * blocks.BLOCK // 256)
    digest, asked, wrong = hashlib.sha256(data).hexdigest(), [], -1

    def ask(start: int, stop: int) -> memoryview:
        asked.append(start // blocks.BLOCK)
        return memoryview(data[start : stop - 1] + b"?" if start == wrong else data[start:stop])

    def read(*order: int) -> blocks.Blocks:
        asked.clear()
        file, piece = blocks.Blocks("file", len(data), ask), bytearray(1 << 16)
        for number in order:
            file.read_into(number * blocks.BLOCK, memoryview(piece))
        return file

    forward = [number for number in range(total) if number != 7]
    read(*forward).check(digest)
    assert sorted(asked) == list(range(total))
    with pytest.raises(HubError, match="arrived damaged"):
        read(*forward).check("0" * 64)
    with pytest.raises(HubError, match="arrived damaged"):  # all could wait in memory for the first
        read(*range(blocks.MOST - 1, -1, -1), *range(blocks.MOST, total)).check("0" * 64)
    assert set(asked) == set(range(total))
    assert len(asked) <= total + 1
    backward = read(*range(total - 1, -1, -1))
    backward.check("0" * 64)
    assert len(asked) <= total + 5
    again, wrong = read(*range(total)), 0
    with pytest.raises(HubError, match="arrived damaged"):
        again.read_into(0, memoryview(bytearray(1)))


def test_blocks_that_are_wanted_again_stay(monkeypatch):
    """Threads at tensors far from each other, each of which they read twice: few blocks come twice."""
    monkeypatch.setattr(blocks, "BLOCK", 1 << 20)
    data, asked = bytes(40 << 20), []

    def ask(start: int, stop: int) -> memoryview:
        asked.append(start)
        return memoryview(data)[start:stop]

    file, piece = blocks.Blocks("file", len(data), ask), bytearray(1 << 16)
    for tensor in range(0, 40, 8):  # two threads in turn, of four blocks each
        for number in [0, 4, 1, 5, 2, 6, 3, 7] * 2:
            file.read_into((tensor + number) << 20, memoryview(piece))
    assert len(asked) < 1.2 * 40


def test_no_token_reaches_another_origin(hub, sdops, model):
    hub.add("ann/private", {"m.safetensors": model}, private=True)
    assert sdops("hash", "hf://ann/private", HF_TOKEN="hf_reader").code == 0
    contents = [entry for entry in hub.requests() if entry["origin"] == "contents"]
    assert contents
    assert {entry["token"] for entry in contents} == {""}
    assert "hf_reader" in {entry["token"] for entry in hub.requests()}


def test_a_folder_of_diffusers(hub, sdops, small_checkpoint, model):
    folder = small_checkpoint("sd15-diffusers")
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.add("ann/pipe", files)
    done = sdops("verify", "hf://ann/pipe", "-q")
    assert done.out == "hf://ann/pipe: ok\n", done.err
    assert sdops("inspect", "hf://ann/pipe", "-q", HF_HUB_OFFLINE="1").out == "hf://ann/pipe: sd1/unusual-widths\n"
    hub.add("ann/both", {**files, "m.safetensors": model})
    refused = sdops("inspect", "hf://ann/both")
    assert refused.code == 1
    assert "`m.safetensors`" in refused.err
    named = re.search(r"the folder is `([^`]+)`", refused.err)
    assert sdops("inspect", named[1], "-q").out == "hf://ann/both: sd1/unusual-widths\n"


def test_a_folder_that_was_made_of_a_file_is_one_model():
    entry = Entry(1, None, "0")
    names = ("model_index.json", "unet/diffusion_pytorch_model.safetensors", _convert_extra.NAME)
    assert chosen(parse("hf://ann/pipe"), Listing("ann/pipe", "", "0" * 40, dict.fromkeys(names, entry))) == ""


def test_several_models_are_listed(hub, sdops, model, tuned):
    hub.add("ann/two", {"a.safetensors": model, "b.safetensors": tuned, "old.ckpt": b"x"})
    done = sdops("inspect", "hf://ann/two")
    assert done.code == 1
    assert "`a.safetensors` (2.28 MB), `b.safetensors` (2.28 MB)" in done.err
    assert "hint: name one: `hf://ann/two/a.safetensors`" in done.err


def test_a_lora_with_a_strength(hub, sdops, small_checkpoint, model):
    import numpy as np
    from safetensors.numpy import save

    key = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
    width = json.loads(model[8 : 8 + int.from_bytes(model[:8], "little")])[
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    ]["shape"]
    lora = save({
        f"{key}.lora_up.weight": np.ones((width[0], 1), np.float32),
        f"{key}.lora_down.weight": np.ones((1, width[1]), np.float32),
    })  # fmt: skip
    hub.add("ann/base", {"m.safetensors": model})
    hub.add("ann/lora", {"l.safetensors": lora})
    done = sdops("apply", "hf://ann/base", "--lora", "hf://ann/lora:0.5", "--json")
    assert done.code == 0, done.err
    assert "0.5" in done.out


def test_only_references_import_the_client(hub, sdops, tmp_path, model):
    (tmp_path / "m.safetensors").write_bytes(model)
    code = (
        "import sys; from sdops.commands.main import main; main(sys.argv[1:]); print('huggingface_hub' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", "-q", str(tmp_path / "m.safetensors")],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith("False\n")


def test_a_server_without_ranges_is_read_as_a_whole_or_refused(hub, sdops, model):
    hub.redirects = False
    hub.add("ann/m", {"m.safetensors": large(model, 2 << 20)})
    hub.faults.append(Fault("GET /ann/m/resolve", times=9, ignore_range=True))
    done = sdops("inspect", "hf://ann/m", "-q")
    assert done.code == 1
    assert "does not give parts of files" in done.err
    assert "sdops pull hf://ann/m@" in done.err


@pytest.mark.parametrize(
    "text", ["hf://ann", "hf://ann/m/../../other/x.safetensors", "hf://datasets/ann/m/x.safetensors", "hf://a b/c"]
)
def test_malformed_references_ask_nobody(hub, sdops, text):
    done = sdops("inspect", text)
    assert done.code == 2
    assert "hf://owner/repo/model.safetensors" in done.err
    assert not hub.log


@pytest.mark.parametrize(
    "text",
    [
        "https://ann:hf_reader@huggingface.co/ann/m",
        "https://huggingface.co/spaces/ann/m?token=hf_reader",
        "hf://ann:hf_reader@ann/m",
        "hf://datasets/ann/hf_reader12345",
    ],
)
def test_no_secret_of_a_link_is_shown(sdops, text):
    done = sdops("inspect", text)
    assert done.code == 2
    assert "..." in done.err  # and no token, as `sdops` itself compares


def test_links_of_the_hub_in_use(hub, sdops, model):
    """As `push` prints them, and browsers show them."""
    hub.add("ann/m", {"my m.safetensors": model})
    for link in (f"{hub.url}/ann/m", f"{hub.url}/ann/m/blob/main/my%20m.safetensors?download=true"):
        assert sdops("inspect", link, "-q").out.startswith("hf://ann/m/my m.safetensors: ")
    done = sdops("recipe", "cp", "anime", "-o", "hf://ann/m/r.toml")
    assert done.code == 1
    assert "outputs are written to this disk" in done.err


def _header(path: Path) -> dict:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def _tensors(path: Path) -> bytes:
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def test_a_header_is_kept_as_it_is(hub, sdops, tmp_path, model):
    """The folder becomes the same file again, and metadata can be changed in a copy."""
    hub.add("ann/one", {"one.safetensors": model})
    assert sdops("convert", "hf://ann/one", "--to", "diffusers", "-o", "folder", "--stream").code == 0
    back = sdops("convert", "folder", "--to", "original", "-o", "back.safetensors")
    assert back.code == 0, back.err
    assert (tmp_path / "back.safetensors").read_bytes() == model
    changed = sdops("meta", "hf://ann/one", "--set", "author=ann", "-o", "copy.safetensors")
    assert changed.code == 0, changed.err
    assert _header(tmp_path / "copy.safetensors")["__metadata__"]["modelspec.author"] == "ann"
    assert _tensors(tmp_path / "copy.safetensors") == model[8 + int.from_bytes(model[:8], "little") :]
    for _ in range(2):  # before the file is in the cache, and when it is
        refused = sdops("meta", "hf://ann/one/one.safetensors", "--set", "author=ann")
        assert refused.code == 1
        assert "not changed in place" in refused.err
        assert "`-o FILE`" in refused.err
        assert sdops("hash", "hf://ann/one/one.safetensors").code == 0


def test_fix_finds_no_fault_with_a_sound_file_of_the_hub(hub, sdops, tmp_path, model):
    hub.add("ann/one", {"m.safetensors": model})
    done = sdops("fix", "hf://ann/one/m.safetensors", "-o", "fixed.safetensors")
    assert done.code == 0
    assert "nothing to repair" in done.out
    assert "`fixed.safetensors` was not written" in done.err
    assert not (tmp_path / "fixed.safetensors").exists()
    assert sdops("fix", "hf://ann/one/m.safetensors", "--in-place").code == 2


def test_a_checkpoint_of_torch_takes_a_few_requests(hub, sdops, tmp_path):
    """Every storage has a header of its own: it is read with the storage, and must say what the directory says."""
    import numpy as np
    from safetensors.numpy import save_file

    tensors = {f"model.diffusion_model.x{i}.{end}": np.full(size, i, np.float16) for i in range(30)
               for end, size in (("weight", 100_000), ("bias", 40))}  # fmt: skip
    save_file(tensors, tmp_path / "local.safetensors")
    assert sdops("convert", "local.safetensors", "--to", "ckpt", "--keep-unknown", "-o", "m.ckpt").code == 0
    data = (tmp_path / "m.ckpt").read_bytes()
    hub.add("ann/m", {"m.ckpt": data})
    convert = ("convert", "hf://ann/m", "--to", "safetensors", "--keep-unknown")
    assert sdops("inspect", "hf://ann/m").code == 0
    assert sdops(*convert, "--dry-run").code == 0
    assert len(hub.requests("GET /[0-9a-f]{64}")) <= 8
    assert hub.sent() < 1_000_000
    assert sdops(*convert, "--stream", "-o", "made.safetensors").code == 0
    assert _tensors(tmp_path / "made.safetensors") == _tensors(tmp_path / "local.safetensors")
    with ZipFile(tmp_path / "m.ckpt") as archive:
        (header,) = (entry.header_offset for entry in archive.infolist() if entry.filename.endswith("/data/20"))
    place = data.index(b"/data/20", header)
    hub.add("ann/evil", {"m.ckpt": data[:place] + b"/data/66" + data[place + 8 :]})
    for words in (("--stream",), ()):
        refused = sdops("convert", "hf://ann/evil", *convert[2:], "-o", "evil.safetensors", *words)
        assert refused.code == 1
        assert "contradicts itself" in refused.err
    assert not (tmp_path / "evil.safetensors").exists()

"""Downloads: resumed, checked, shared with huggingface_hub, and each failure in its own words."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sdops.errors import OutputError
from sdops.hub import download
from sdops.hub.listing import Entry, Listing
from tests.hub.conftest import large
from tests.hub.server import Blob, Fault

FILE = "hf://ann/m/m.safetensors"


@pytest.fixture
def data(hub, model) -> bytes:
    found = large(model, 12 << 20)
    hub.add("ann/m", {"m.safetensors": found, "README.md": b"# m"})
    return found


def bodies(hub) -> list[dict]:
    return [entry for entry in hub.requests("GET /") if entry["origin"] == "contents"]


def test_pull_puts_the_file_where_huggingface_hub_looks(hub, sdops, home, data):
    done = sdops("pull", FILE, "-q")
    assert done.code == 0, done.err
    path = done.lines[0]
    assert Path(path).read_bytes() == data
    code = "import huggingface_hub as h; print(h.hf_hub_download('ann/m', 'm.safetensors', local_files_only=True))"
    environment = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PATH": ""}
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert found.stdout.strip() == path
    hub.forget()
    assert sdops("pull", FILE, "-q").lines == [path]
    assert hub.sent() < 10_000  # it is there


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_broken_connection_is_resumed(hub, sdops, data, reset):
    hub.faults.append(Fault("GET /[0-9a-f]{64}", times=2, drop=5 << 20, reset=reset))
    done = sdops("pull", FILE, "-q")
    assert done.code == 0, done.err
    assert Path(done.lines[0]).read_bytes() == data
    ranges = [entry["range"] for entry in bodies(hub)]
    assert ranges[0] is None
    assert len(ranges) == 3
    starts = [int(text[6:-1]) for text in ranges[1:]]
    assert 0 < starts[0] < starts[1]
    if not reset:  # a reset also throws away what was on its way
        assert sum(entry["bytes"] for entry in bodies(hub)) < len(data) + (3 << 20)


def test_a_later_run_goes_on_where_the_first_gave_up(hub, sdops, home, data):
    hub.faults.append(Fault("GET /[0-9a-f]{64}", times=1, drop=8 << 20))
    hub.faults.append(Fault("GET /ann/m/resolve", after=1, times=3, status=503))
    first = sdops("pull", FILE)
    assert first.code == 1
    assert "unavailable (503)" in first.err
    (partial,) = home.rglob("*.incomplete")
    have = partial.stat().st_size
    assert have > 4 << 20
    hub.faults.clear()
    hub.forget()
    second = sdops("pull", FILE, "-q")
    assert Path(second.lines[0]).read_bytes() == data
    assert bodies(hub)[0]["range"] == f"bytes={have}-"
    assert not list(home.rglob("*.incomplete"))


def test_a_wrong_bit_is_noticed_and_fetched_again(hub, sdops, data):
    hub.faults.append(Fault("GET /[0-9a-f]{64}", times=1, flip=True))
    done = sdops("pull", FILE, "-q")
    assert done.code == 0, done.err
    assert Path(done.lines[0]).read_bytes() == data
    assert len(bodies(hub)) == 2


def test_wrong_bits_for_ever_are_refused_and_kept_nowhere(hub, sdops, home, data):
    hub.faults.append(Fault("GET /[0-9a-f]{64}", times=9, flip=True))
    done = sdops("pull", FILE)
    assert done.code == 1
    assert "arrived damaged" in done.err
    assert not [path for path in home.rglob("*") if path.is_file() and path.stat().st_size > 1 << 20]


def test_a_damaged_file_that_another_program_left_is_found(hub, sdops, data):
    path = sdops("pull", FILE, "-q").lines[0]
    with open(path, "r+b") as file:
        file.seek(1 << 20)
        file.write(b"!!")
    done = sdops("pull", FILE)
    assert done.code == 1
    assert "was damaged in the cache" in done.err
    assert sdops("pull", FILE, "-q").code == 0
    assert Path(path).read_bytes() == data


def test_xet_that_fails_falls_back_to_http(hub, sdops, data):
    pytest.importorskip("hf_xet")
    hub.xet = True
    done = sdops("pull", FILE, "-q", HF_HUB_DISABLE_XET="0")
    assert done.code == 0, done.err
    assert Path(done.lines[0]).read_bytes() == data


def test_a_snapshot_of_a_folder(hub, sdops, tmp_path, small_checkpoint):
    folder = small_checkpoint("sd15-diffusers")
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.add("ann/pipe", {**files, "unet/diffusion_pytorch_model.bin": b"not wanted", "README.md": b"#"})
    done = sdops("pull", "ann/pipe", "-o", "here", "--json")
    assert done.code == 0, done.err
    here = {
        path.relative_to(tmp_path / "here").as_posix(): path.read_bytes()
        for path in (tmp_path / "here").rglob("*")
        if path.is_file()
    }
    assert here == files | {"README.md": b"#"}
    assert sdops("pull", "ann/pipe", "-o", "here").code == 1
    assert sdops("pull", "ann/pipe", "-o", "here", "--force").code == 0
    assert not list(tmp_path.glob(".sdops*"))


def test_a_folder_is_a_folder_and_replaces_nothing_else(hub, sdops, tmp_path, small_checkpoint, model):
    hub.add("ann/loras", {"a/one.safetensors": model, "two.safetensors": model, "three.safetensors": model})
    assert sdops("pull", "hf://ann/loras/a", "-o", "one").code == 0
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["one.safetensors"]
    ambiguous = sdops("pull", "ann/loras")
    assert ambiguous.code == 1
    assert "`sdops pull hf://ann/loras/` brings everything" in ambiguous.err
    assert sdops("pull", "hf://ann/loras/", "-o", "all").code == 0
    assert sorted(path.name for path in (tmp_path / "all").rglob("*.safetensors")) == [
        "one.safetensors", "three.safetensors", "two.safetensors",
    ]  # fmt: skip
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("x")
    for name in ("mine", "mine/", "mine/../mine/.", "."):
        done = sdops("pull", "ann/loras/", "-o", name, "--force")
        assert done.code == 1
        assert "holds other things, such as" in done.err
    assert (tmp_path / "mine" / "precious").exists()
    (tmp_path / "all" / "two.safetensors").write_bytes(b"old")
    assert sdops("pull", "ann/loras/", "-o", "all", "--force").code == 0
    assert (tmp_path / "all" / "two.safetensors").read_bytes() == model
    assert "is the name of one" in sdops("pull", "ann/loras/", "-o", "x.safetensors").err
    assert not list(tmp_path.glob(".sdops*"))


def test_a_revision(hub, sdops, tmp_path, model, tuned):
    old = hub.add("ann/v", {"m.safetensors": model})
    hub.add("ann/v", {"m.safetensors": tuned})
    assert sdops("pull", "ann/v", "--revision", old, "-o", "old.safetensors").code == 0
    assert (tmp_path / "old.safetensors").read_bytes() == model
    assert (
        sdops(
            "pull",
            "https://huggingface.co/ann/v/blob/main/m.safetensors",
            "-o",
            "new.safetensors",
        ).code
        == 0
    )
    assert (tmp_path / "new.safetensors").read_bytes() == tuned
    done = sdops("pull", "ann/v", "--revision", "v9")
    assert (done.code, "has no revision `v9`" in done.err) == (1, True)


def test_offline(hub, sdops, data, tmp_path):
    refused = sdops("merge", FILE, FILE, HF_HUB_OFFLINE="1")
    assert refused.code == 1
    assert "HF_HUB_OFFLINE" in refused.err
    assert sdops("pull", FILE).code == 0
    hub.forget()
    for name in (FILE, "hf://ann/m", f"hf://ann/m@{hub.repositories['ann/m'].branches['main']}/m.safetensors"):
        done = sdops("hash", name, "-q", HF_HUB_OFFLINE="1")
        assert done.out.split()[0] == Blob(data).sha256, done.err
    assert not hub.log


OUTSIDER, READER, EXPIRED = ({"HF_TOKEN": f"hf_{name}"} for name in ("outsider", "reader", "expired"))
REFUSALS = {
    "gated": ("hf://ann/gated/m.safetensors", {}, "is gated, and no token is set", "hf auth login"),
    "gated-token": ("hf://ann/gated/m.safetensors", OUTSIDER, "your token has no access", "/ann/gated"),
    "private": ("hf://ann/private", {}, "or it is private and no token is set", "hf auth login"),
    "private-token": ("hf://ann/private", OUTSIDER, "or your token may not read it", "hf auth whoami"),
    "missing": ("hf://ann/missing", READER, "there is no repository `ann/missing`", "check the name"),
    "token": ("hf://ann/m", EXPIRED, "does not accept your token", "hf auth login"),
    "file": ("hf://ann/m/n.safetensors", {}, "has no file `n.safetensors`", "did you mean `hf://ann/m/m.safetensors`"),
    "revision": ("hf://ann/m@v2/m.safetensors", {}, "has no revision `v2`", "the main branch"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_say_what_to_do(hub, sdops, data, case):
    reference, environment, message, hint = REFUSALS[case]
    hub.add("ann/gated", {"m.safetensors": data}, gated=True)
    hub.add("ann/private", {"m.safetensors": data}, private=True)
    done = sdops("inspect", reference, **environment, SDOPS_DEBUG="1")
    assert done.code == 1
    assert message in done.err
    assert hint in done.err.partition("hint:")[2]


def test_a_busy_hub_is_waited_for_but_not_for_ever(hub, sdops, data):
    hub.faults.append(Fault("GET /api/models", times=1, status=429, headers={"Retry-After": "1"}))
    hub.faults.append(Fault("GET /ann/m/resolve", times=1, status=503))
    assert sdops("inspect", FILE, "-q").code == 0
    hub.faults[:] = [Fault("GET /api/models", times=9, status=429, headers={"Retry-After": "3600"})]
    done = sdops("inspect", FILE)
    assert done.code == 1
    assert "slow down (429)" in done.err
    assert "in 3600 seconds" in done.err
    hub.faults[:] = [Fault("GET /api/models", times=9, status=503)]
    done = sdops("inspect", FILE)
    assert "the Hub is unavailable (503)" in done.err
    limit = {"RateLimit": '"api";r=0;t=155', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}
    hub.faults[:] = [Fault("GET /api/models", times=9, status=429, headers=limit)]
    assert "in 155 seconds" in sdops("inspect", FILE).err
    hub.faults[:] = [Fault("/resolve/", times=9, status=403)]
    assert "may not be read without a token" in sdops("inspect", FILE).err


def test_content_that_is_listed_and_gone(hub, sdops, data):
    hub.contents.clear()
    done = sdops("inspect", FILE)
    assert done.code == 1
    assert "does not give its content (404)" in done.err


def test_nobody_there(sdops):
    done = sdops("inspect", FILE, HF_ENDPOINT="http://user:secret@127.0.0.1:9", SDOPS_DEBUG="1")
    assert done.code == 1
    assert "`http://127.0.0.1:9` cannot be reached" in done.err
    assert "secret" not in done.err


def test_servers_that_are_not_the_hub(sdops, hub):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        given = {"HF_ENDPOINT": address, "HF_HUB_ETAG_TIMEOUT": "1", "SDOPS_HUB_RETRIES": "0"}
        assert f"`{address}` does not answer" in sdops("inspect", FILE, **given).err
    unsafe = sdops("inspect", FILE, HF_ENDPOINT=hub.url.replace("http:", "https:"), SDOPS_HUB_RETRIES="0")
    assert "no secure connection to `https://127.0.0.1" in unsafe.err
    hub.faults.append(Fault("GET /api/models", text=b"<html>log in</html>"))
    assert "does not answer as the Hub does" in sdops("inspect", FILE).err


def test_a_revision_that_is_in_the_cache_is_known_without_network(hub, sdops, data):
    commit = hub.repositories["ann/m"].branches["main"]
    hub.repositories["ann/m"].branches["feature/50%"] = commit
    assert sdops("pull", f"hf://ann/m@{commit}/m.safetensors").code == 0
    for revision in ("main", "feature/50%"):
        assert sdops("pull", "ann/m/m.safetensors", "--revision", revision).code == 0
        done = sdops("pull", "ann/m/m.safetensors", "--revision", revision, HF_HUB_OFFLINE="1")
        assert done.code == 0, done.err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_cache_that_cannot_be_written_is_named(hub, monkeypatch, tmp_path, number):
    """Also when a part of the file has come already."""
    monkeypatch.setattr(download.library().constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(download.library().constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(download, "_by_xet", lambda *_: False)
    monkeypatch.setattr(download.library(), "hf_hub_url", lambda *_, **__: f"{hub.contents_url}/{'0' * 64}?signature=1")
    entry = Entry(8 << 20, "0" * 64, "0" * 64)
    hub.contents["0" * 64] = Blob(b"", entry.size)
    write, calls = os.pwrite, []

    def full(fd: int, data: bytes, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 2:
            raise OSError(number, os.strerror(number))
        return write(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match=f"cannot be written: {os.strerror(number)}") as raised:
        download.download(Listing("ann/m", "", "0" * 40, {"m.safetensors": entry}), "m.safetensors")
    assert "HF_HOME" in str(raised.value.hint)
    assert len(calls) == 3


def test_a_token_that_no_header_can_hold_is_not_shown(hub, sdops, data):
    done = sdops("inspect", FILE, HF_TOKEN="hf_rea\x01der", SDOPS_DEBUG="1")
    assert done.code == 1
    assert "rea" not in done.err.replace("read", "").replace("create", "")

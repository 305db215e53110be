"""Measure what models on the Hub cost: bytes over the wire, time and memory, against a local server of its protocol.

    python tools/bench_hub.py --folder bench-data --rounds 3

The server is that of the tests (tests/hub/server.py), on the same machine: bytes and memory are as with the Hub, times
have no network in them. `inspect` and a dry run look at an SDXL of 7 GB, merges read two SD1.5 in fp16. Bar: the
inspection transfers less than 1 MB.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

from measure import Cost, run

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from tests.hub.server import Blob, HubServer  # noqa: E402

SDOPS = [sys.executable, "-m", "sdops"]
FILES = {"one": ("sd15", "--tuned", "1"), "two": ("sd15", "--tuned", "2"), "sdxl": ("sdxl", "--sparse")}


class Stored(Blob):
    """A file on this disk, read while it is sent."""

    def __init__(self, path: Path, *, sha256: str = "") -> None:
        super().__init__(b"")
        self.size = path.stat().st_size
        self._fd = os.open(path, os.O_RDONLY)
        with path.open("rb") as file:
            self.sha256 = sha256 or hashlib.file_digest(file, "sha256").hexdigest()

    def read(self, start: int, stop: int) -> bytes:
        """Bytes from `start` to `stop`."""
        return os.pread(self._fd, stop - start, start)


def prepare(folder: Path) -> None:
    """Make what is not there yet."""
    folder.mkdir(exist_ok=True)
    for name, words in FILES.items():
        path = folder / f"{name}.safetensors"
        if not path.exists():
            command = [sys.executable, str(HERE.parent / "fixtures" / "make.py"), "full", *words, "--dtype", "fp16"]
            subprocess.run([*command, "-o", str(path)], check=True, stdout=subprocess.DEVNULL)


def measured(server: HubServer, folder: Path, name: str, *words: str) -> Cost:
    """Run a command line, print what it cost and what went over the wire."""
    environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "0"}
    server.forget()
    cost = run([*SDOPS, *words, "-q"], environment={**environment, "SDOPS_CACHE": str(folder / "cache")})
    kept = sum(file.stat().st_size for file in (folder / "hub").rglob("blobs/*"))
    print(
        f"{name}: {cost.wall:.2f} s, {cost.anonymous_mb:.0f} MB, {server.sent():,} bytes in {len(server.log)} requests,"
        f" {kept:,} bytes kept {cost.error}"
    )
    return cost


def merges(server: HubServer, folder: Path) -> dict[str, Cost]:
    """The same merge of files, with nothing in the cache, with both files there, and streamed."""
    output = folder / "output.safetensors"
    here = [str(folder / f"{name}.safetensors") for name in ("one", "two")]
    there = ["hf://ann/one", "hf://ann/two"]
    costs = {}
    for name, words in {
        "merge of files": here,
        "merge --stream": [*there, "--stream"],
        "merge with an empty cache": there,
        "merge with both in the cache": there,
    }.items():
        if "empty" in name:
            shutil.rmtree(folder / "hub", ignore_errors=True)
        costs[name] = measured(server, folder, name, "merge", *words, "-f", "-o", str(output))
    output.unlink()
    shutil.rmtree(folder / "hub")
    return costs


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("bench-data"))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    folder: Path = options.folder
    prepare(folder)
    with HubServer() as server:
        for name in ("one", "two"):
            server.add(f"ann/{name}", {f"{name}.safetensors": Stored(folder / f"{name}.safetensors")})
        server.add("ann/sdxl", {"sdxl.safetensors": Stored(folder / "sdxl.safetensors", sha256="0" * 64)})
        measured(server, folder, "inspect of 7 GB", "inspect", "hf://ann/sdxl")
        measured(server, folder, "dry run with 7 GB", "merge", "hf://ann/sdxl", "hf://ann/sdxl", "--dry-run")
        rounds = [merges(server, folder) for _ in range(options.rounds)]
    for name in rounds[0]:
        wall = median(costs[name].wall for costs in rounds)
        print(f"{name}: {wall:.2f} s, {max(costs[name].anonymous_mb for costs in rounds):.0f} MB")


if __name__ == "__main__":
    main()

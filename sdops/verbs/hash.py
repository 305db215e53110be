"""The hashes of model files, in all the forms that sites and web UIs use, and whether those inside a file are true.

sha256        of the file; AutoV2 is its first 10 digits
AutoV1        the first web UI's "model hash": 8 digits of the SHA-256 of 64 KiB at 1 MiB
tensors       of everything after the safetensors header ("addnet"); AutoV3 is its first 12 digits, ModelSpec
              writes it as `0x...`, kohya's trainer as `sshs_model_hash`
"""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from sdops import standin
from sdops.core.hashing import Digests, digests
from sdops.formats import open_source
from sdops.hub import located
from sdops.report import Progress, Report, Section, silent
from sdops.verbs._each import FilePath, each_file

OF_TENSORS = ("modelspec.hash_sha256", "sshs_model_hash")
STORED = (*OF_TENSORS, "sshs_legacy_hash")
_NOTHING = sha256(b"").hexdigest()  # e3b0c442...: what some trainers stored instead of a hash
_STATES = {
    "ok": "is right",
    "empty": "is the hash of nothing, a fault of the program that wrote it",
    "differs": "does not match: the file was edited after the hash was written, or is damaged",
    "unknown": "cannot be recomputed",
}


def hash_files(*files: FilePath, verify: bool = False, progress: Progress = silent) -> Report:
    """Hashes of model files; of folders and sharded models, those of every file.

    Args:
        files: Paths.
        verify: Read the files even if their hashes are remembered, and compare with the hashes stored inside.
        progress: Called as `progress(label, total_bytes)`.

    Raises:
        SdopsError: the only file cannot be read.
    """
    return each_file("hash", _parts(files), lambda file: _one(Path(file), verify, progress))


def _parts(files: tuple[FilePath, ...]) -> list[FilePath]:
    """The files themselves, folders and indexes replaced by what belongs to them."""
    parts: list[FilePath] = []
    for file in files:
        file = located(file)
        if file.is_dir() or file.name.endswith(".index.json"):
            source = open_source(file)
            parts += source.files
            source.close()
        else:
            parts.append(file)
    return parts


def _one(path: Path, verify: bool, progress: Progress) -> Report:
    found = digests(path, progress, fresh=verify)
    facts = _facts(found)
    report = Report("hash", data={"file": str(path), "bytes": path.stat().st_size, **facts})
    report.result = [f"{found.sha256}  {path}"]  # the form that `sha256sum --check` reads
    report.sections = [Section(str(path), [[name, value] for name, value in facts.items() if value])]
    if verify:
        stored = stored_hashes(path, found)
        report.data["stored"] = stored
        rows = [[key, _STATES[entry["state"]]] for key, entry in stored.items()]
        report.sections.append(Section("", rows or [["stored inside", "no hashes, so there is nothing to compare"]]))
        report.failed = any(entry["state"] in ("differs", "empty") for entry in stored.values())
    return report


def _facts(found: Digests) -> dict[str, str | None]:
    return {
        "sha256": found.sha256,
        "AutoV1": found.legacy,
        "AutoV2": found.sha256[:10],
        "AutoV3": found.tensors and found.tensors[:12],
        "tensors_sha256": found.tensors,
        "modelspec.hash_sha256": found.tensors and f"0x{found.tensors}",
    }


def stored_hashes(path: Path, found: Digests) -> dict[str, dict[str, Any]]:
    """The hashes in a safetensors file's metadata: name -> value and state, one of `_STATES`."""
    if found.tensors is None:
        return {}
    header = _header(path)
    metadata = header.get("__metadata__", {})
    stored = {}
    for key in STORED:
        if key in metadata:
            true = found.tensors if key in OF_TENSORS else training_legacy(path, header)
            stored[key] = {"value": metadata[key], "state": _state(metadata[key], true)}
    return stored


def _state(stored: str, true: str | None) -> str:
    digits = stored.lower().removeprefix("0x")
    if true is None:
        return "unknown"
    if len(digits) >= 8 and true.startswith(digits):
        return "ok"
    return "empty" if len(digits) >= 8 and _NOTHING.startswith(digits) else "differs"


def training_legacy(path: Path, header: dict[str, Any]) -> str | None:
    """kohya's `sshs_legacy_hash`: AutoV1 of the file as it would be with the `ss_*` metadata alone.

    None if it reaches into the header.
    """
    part = training_part(header)
    if part is None:
        return None
    with open(standin.real(path), "rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little") + part.start)
        return sha256(file.read(len(part))).hexdigest()[:8]


def training_part(header: dict[str, Any]) -> range | None:
    """The bytes of the tensors that `sshs_legacy_hash` is of; None if it reaches into the header.

    Only the length of the header with the `ss_*` metadata alone matters, since it shifts the 64 KiB that are hashed.
    """
    training = {key: text for key, text in header.get("__metadata__", {}).items() if key.startswith("ss_")}
    tensors = {key: entry for key, entry in header.items() if key != "__metadata__"}
    other = {"__metadata__": training, **tensors} if training else tensors
    length = len(json.dumps(other, ensure_ascii=False, separators=(",", ":")).encode())
    offset = 0x100000 - 8 - (length + 7) // 8 * 8
    return range(offset, offset + 0x10000) if offset >= 0 else None


def _header(path: Path) -> dict[str, Any]:
    open_source(path).close()  # refuses what is damaged or hostile
    with open(standin.real(path), "rb") as file:
        header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return header

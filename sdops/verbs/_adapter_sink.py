"""The files of an adapter in the making. Safetensors say what their tensors hash to, as kohya's trainer does."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from sdops.core import files
from sdops.core.sink import SafetensorsSink, Sink
from sdops.core.sink_shards import BytesSink
from sdops.core.spec import Spec
from sdops.verbs._adapter_lists import SUFFIX as LIST
from sdops.verbs._adapter_lists import list_sink

MODEL_HASH, LEGACY_HASH = "sshs_model_hash", "sshs_legacy_hash"  # verbs/hash.py tells what they are of
MODELSPEC_HASH = "modelspec.hash_sha256"  # the first of these, after 0x
_BUFFER = 4 << 20
_LEGACY = slice(0x100000, 0x110000)


@contextmanager
def adapter_sink(
    path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str], companions: Mapping[str, str], *, force: bool
) -> Iterator[Sink]:
    """An adapter's file and its companions; a folder that is missing is made, and goes if nothing comes of it.

    Args:
        path: The file; of cloneofsimo's lists, which end in `.pt`, the first one.
        specs, metadata: Of the file.
        companions: Name of a file that belongs beside it -> its text.
        force: Replace what is there.

    Raises:
        OutputError: one of them exists or cannot be written.
    """
    if path.suffix == LIST:
        with list_sink(path, specs, force=force) as lists:
            yield lists
        return
    is_new = not path.parent.exists()
    if is_new:
        path.parent.mkdir()
    try:
        with ExitStack() as stack:
            texts = [BytesSink(path.parent / name, text.encode(), force=force) for name, text in companions.items()]
            for text in texts:
                stack.enter_context(text)
            yield stack.enter_context(AdapterSink(path, specs, metadata, texts, force=force))
    except BaseException:
        if is_new:
            with suppress(OSError):
                path.parent.rmdir()
        raise


class AdapterSink(SafetensorsSink):
    """As SafetensorsSink; the hashes are added to the metadata when everything is written.

    That of ModelSpec only replaces one that the metadata have: it is of what the tensors were. Companions get their
    names just before the file does: PEFT's configuration without weights is refused by whoever reads it, weights
    without the configuration would be read with a wrong alpha.
    """

    def __init__(
        self,
        path: Path,
        specs: Mapping[str, Spec],
        metadata: Mapping[str, str],
        companions: Sequence[BytesSink] = (),
        *,
        force: bool,
    ) -> None:
        self._companions = companions
        hashes = {MODEL_HASH: "0" * 64, LEGACY_HASH: "0" * 8}  # of the length that they will have
        if MODELSPEC_HASH in metadata:
            hashes[MODELSPEC_HASH] = f"0x{hashes[MODEL_HASH]}"
        super().__init__(path, specs, {**metadata, **hashes}, force=force)

    def seal(self, replace_metadata: Mapping[str, str] | None = None) -> None:
        """Complete the temporary file and make it durable."""
        super().seal({**(replace_metadata or {}), **self._hashes()})
        for companion in self._companions:
            companion.seal()

    def publish(self) -> Path:
        """Give the file and its companions their names; a failure takes back those that are new."""
        with ExitStack() as undo:
            for companion in self._companions:
                is_new = not companion.target.exists()
                companion.publish()
                if is_new:
                    undo.callback(companion.target.unlink, missing_ok=True)
            path = super().publish()
            undo.pop_all()
        return path

    def _hashes(self) -> dict[str, str]:
        """SHA-256 of the tensors; and of bytes 0x100000 to 0x10FFFF of the file with the `ss_*` metadata alone."""
        position = len(self._header)
        shift = self._training_header() - position  # what lies at x here would lie at x + shift there
        tensors, legacy = hashlib.sha256(), hashlib.sha256()
        while chunk := files.read_bytes(self._fd, _BUFFER, position):
            tensors.update(chunk)
            there = position + shift
            legacy.update(chunk[max(_LEGACY.start - there, 0) : max(_LEGACY.stop - there, 0)])
            position += len(chunk)
        found = {MODEL_HASH: tensors.hexdigest(), LEGACY_HASH: legacy.hexdigest()[:8]}
        return found | ({MODELSPEC_HASH: f"0x{found[MODEL_HASH]}"} if MODELSPEC_HASH in self.metadata else {})

    def _training_header(self) -> int:
        """Length of a header with the `ss_*` metadata alone."""
        everything = self.metadata
        self.metadata = {key: text for key, text in everything.items() if key.startswith("ss_")}
        length = len(self._encode_header())
        self.metadata = everything
        return length

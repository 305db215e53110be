"""A file on the Hub, read in portions by range requests, or brought here as a whole.

Headers are read in small portions that stay in the stand-in. Who reads more than LOOK bytes wants the content: then the
whole file is downloaded into the shared cache, or, when streaming, read in blocks (`blocks.py`).
"""

from __future__ import annotations

import os
import threading
from functools import partial
from io import BytesIO
from pathlib import Path
from urllib.parse import urlsplit

from sdops import hub
from sdops.core.source import aligned
from sdops.errors import HubError
from sdops.hub.blocks import Blocks, damaged
from sdops.hub.download import content_hash, download
from sdops.hub.listing import Listing
from sdops.hub.session import library, patiently, utilities

GRAIN = 64 << 10  # portions of headers
FIRST = 256 << 10  # of the first request: most headers are shorter
MOST = 2 << 20  # who reads on and on gets ever larger portions, up to this
LOOK = 16 << 20  # bytes; headers and a few small tensors are less
SMALL = 256 << 10  # bytes; configurations and the like are downloaded at once, and are there without network later


class HubFile:
    """One file of a repository at a commit; see `sdops.standin.StandIn`.

    Args:
        found: The repository.
        path: Of the file in it.
        place: The stand-in on this disk: a file without content of the same size.

    Attributes:
        reference: With the commit.
        sha256: As the Hub says; once the file is here, as it is.
        stream: Whether the file is never to be kept on the disk.
    """

    def __init__(self, found: Listing, path: str, place: Path) -> None:
        self.stream = False
        self._found, self._path, self._place = found, path, place
        self._entry = found.files[path]
        self.sha256 = self._entry.sha256
        self.reference = str(found.pinned(path))
        self._grains: set[int] = set()
        self._is_whole = False  # all of it will be read
        self._looked = 0
        self._end = -1  # of the last request for grains
        self._portion = GRAIN
        self._direct: str | None = None  # where the Hub sent us to
        self._here = -1
        self._holder: Path | None = None  # where it is here, if not in the cache
        self._start()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on.

        Raises:
            HubError: the Hub does not give them.
        """
        if offset + len(buffer) > self._entry.size:
            raise HubError(f"`{self.reference}` ends before byte {offset + len(buffer):,}", reason="damaged")
        if self._pid != os.getpid():  # locks and threads do not survive a fork
            self._start()
        self._looked += len(buffer)
        wanted = self._is_whole or self._looked > LOOK or self._entry.size <= SMALL
        if self._here < 0 and wanted and not self.stream:
            self.fetch()
        if self._here >= 0:
            _fill(self._here, offset, buffer)
        elif self._is_whole or self._looked > LOOK:
            self._in_blocks().read_into(offset, buffer)
        else:
            self._read_grains(offset, buffer)

    def prepare(self) -> None:
        """Fetch, or, when streaming, read in blocks from now on."""
        self._is_whole = True
        if not self.stream:
            self.fetch()

    def check(self) -> None:
        """See that what was streamed is what the Hub announces; what was not read as a whole is not compared.

        Raises:
            HubError: it is not.
        """
        if self._blocks and self._entry.sha256:
            self._blocks.check(self._entry.sha256)

    def fetch(self) -> Path:
        """Bring the whole file into the shared cache, checked, and say where it is.

        Raises:
            HubError: the Hub does not give it, or gives something else.
        """
        with self._lock:
            path = download(self._found, self._path, hub.holder())
            if self._here < 0:
                self._here, self._holder = os.open(path, os.O_RDONLY | os.O_CLOEXEC), hub.holder()
        return path

    def content(self) -> bytes:
        """All of a small file, checked, and kept in the cache unless it is streamed.

        Raises:
            HubError: the Hub does not give it, or gives something else.
        """
        if not self.stream:
            return self.fetch().read_bytes()
        data = bytes(self._ask(0, self._entry.size))
        if content_hash(BytesIO(data), len(data), self._entry) != self._entry.blob:
            raise damaged(self.reference)
        return data

    def let_go(self) -> None:
        """Close the file if it is only here for a while."""
        with self._lock:
            if self._holder is not None:
                os.close(self._here)
                self._here, self._holder = -1, None

    def _start(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._blocks: Blocks | None = None

    def _read_grains(self, offset: int, buffer: memoryview) -> None:
        """Through the stand-in, whose missing portions are filled first, in one request."""
        with self._lock:
            wanted = range(offset // GRAIN, -(-(offset + len(buffer)) // GRAIN))
            missing = [grain for grain in wanted if grain not in self._grains]
            if missing:
                start, stop = missing[0] * GRAIN, (missing[-1] + 1) * GRAIN
                self._portion = min(2 * self._portion, MOST) if start == self._end else GRAIN
                least = start + self._portion if self._grains else FIRST
                self._end = stop = min(max(stop, least), self._entry.size)
                fd = os.open(self._place, os.O_RDWR | os.O_CLOEXEC)
                try:
                    os.pwrite(fd, self._ask(start, stop), start)
                finally:
                    os.close(fd)
                self._grains.update(range(start // GRAIN, -(-stop // GRAIN)))
        fd = os.open(self._place, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _fill(fd, offset, buffer)
        finally:
            os.close(fd)

    def _in_blocks(self) -> Blocks:
        with self._lock:
            if self._blocks is None:
                self._blocks = Blocks(self.reference, self._entry.size, self._ask)
            return self._blocks

    def _ask(self, start: int, stop: int) -> memoryview:
        """Bytes `[start, stop)` over the wire."""
        data, done = aligned(stop - start), 0
        while done < len(data):  # as long as there is progress, every break is forgiven
            done += patiently(self._found.pinned(self._path), partial(self._request, start + done, data[done:]))
        return data

    def _request(self, start: int, buffer: memoryview) -> int:
        """One request for what fills `buffer`; returns how many bytes it brought before it ended or broke off.

        Raises:
            Exception: as the client does, if it brought none.
        """
        stop, done = start + len(buffer), 0
        asked = library().hf_hub_url(self._found.repo, self._path, revision=self._found.commit)
        url = self._direct or asked
        headers = {} if self._direct else utilities().build_hf_headers(library_name="sdops")
        headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        timeout = library().constants.HF_HUB_DOWNLOAD_TIMEOUT
        try:
            with (
                utilities()
                .get_session()
                .stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as answer
            ):
                if answer.status_code >= 400 and self._direct:
                    self._direct = None  # it was given for some minutes
                    raise ConnectionError
                utilities().hf_raise_for_status(answer)
                self._check(answer.status_code, str(answer.headers.get("Content-Range")), start, stop)
                if urlsplit(str(answer.url)).netloc != urlsplit(asked).netloc:
                    self._direct = str(answer.url)
                for chunk in answer.iter_raw():
                    chunk = chunk[: len(buffer) - done]
                    buffer[done : done + len(chunk)] = chunk
                    done += len(chunk)
            if not done:
                raise ConnectionError
        except Exception:
            if not done:
                raise
        return done

    def _check(self, status: int, content_range: str, start: int, stop: int) -> None:
        if status == 200 and (start, stop) == (0, self._entry.size):
            return
        if status != 206 or content_range != f"bytes {start}-{stop - 1}/{self._entry.size}":
            raise HubError(
                f"the server of `{self.reference}` does not give parts of files",
                hint=f"`sdops pull {self.reference}` downloads it as a whole",
                reason="refused",
            )


def _fill(fd: int, offset: int, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done : done + (1 << 30)]], offset + done)
        if count == 0:
            raise HubError("a file in the cache was cut short", hint="`hf cache verify` finds it", reason="damaged")
        done += count

"""A file on the Hub, read in portions by range requests, or brought here as a whole.

Headers are read in small portions that stay in the stand-in. Who reads more than LOOK bytes wants the content: then the
whole file is downloaded into the shared cache, or, when streaming, read in BLOCKs of which only a few are kept, in
memory.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

from sdops.errors import HubError
from sdops.hub.download import download
from sdops.hub.listing import Listing
from sdops.hub.session import library, patiently, utilities

GRAIN = 64 << 10  # portions of headers
FIRST = 256 << 10  # of the first request: most headers are shorter
LOOK = 16 << 20  # bytes; headers and a few small tensors are less
SMALL = 256 << 10  # bytes; configurations and the like are downloaded at once, and are there without network later
BLOCK = 8 << 20
KEPT = 6  # blocks in memory, per file
AHEAD = 1  # blocks that are asked for before they are wanted


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
        transferred: Bytes that came over the wire by range requests.
    """

    def __init__(self, found: Listing, path: str, place: Path) -> None:
        self.stream = False
        self.transferred = 0
        self._found, self._path, self._place = found, path, place
        self._entry = found.files[path]
        self.sha256 = self._entry.sha256
        self.reference = str(found.pinned(path))
        self._grains: set[int] = set()
        self._looked = 0
        self._direct: str | None = None  # where the Hub sent us to
        self._here = -1
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
        wanted = self._looked > LOOK or self._entry.size <= SMALL
        if self._here < 0 and wanted and not self.stream:
            self.fetch()
        if self._here >= 0:
            _fill(self._here, offset, buffer)
        elif self._looked > LOOK:
            self._read_blocks(offset, buffer)
        else:
            self._read_grains(offset, buffer)

    def prepare(self) -> None:
        """Fetch, unless streaming."""
        if not self.stream:
            self.fetch()

    def fetch(self) -> Path:
        """Bring the whole file into the shared cache, checked, and say where it is.

        Raises:
            HubError: the Hub does not give it, or gives something else.
        """
        with self._lock:
            path = download(self._found, self._path)
            if self._here < 0:
                self._here = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return path

    def _start(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._blocks: OrderedDict[int, Future[bytes]] = OrderedDict()

    def _read_grains(self, offset: int, buffer: memoryview) -> None:
        """Through the stand-in, whose missing portions are filled first, in one request."""
        with self._lock:
            wanted = range(offset // GRAIN, -(-(offset + len(buffer)) // GRAIN))
            missing = [grain for grain in wanted if grain not in self._grains]
            if missing:
                start, stop = missing[0] * GRAIN, (missing[-1] + 1) * GRAIN
                stop = min(max(stop, FIRST if not self._grains else 0), self._entry.size)
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

    def _read_blocks(self, offset: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            index, inside = divmod(offset + done, BLOCK)
            portion = self._block(index)[inside : inside + len(buffer) - done]
            buffer[done : done + len(portion)] = portion
            done += len(portion)

    def _block(self, index: int) -> bytes:
        """A block, from memory or the Hub; the one behind it is asked for in advance."""
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(AHEAD + 2, thread_name_prefix="hub")
            last = (self._entry.size - 1) // BLOCK
            for number in range(index, min(index + AHEAD, last) + 1):
                if number not in self._blocks:
                    start = number * BLOCK
                    self._blocks[number] = self._pool.submit(self._ask, start, min(start + BLOCK, self._entry.size))
            self._blocks.move_to_end(index)
            while len(self._blocks) > KEPT:
                self._blocks.popitem(last=False)
            wanted = self._blocks[index]
        try:
            return wanted.result()
        except BaseException:
            with self._lock:
                self._blocks.pop(index, None)
            raise

    def _ask(self, start: int, stop: int) -> bytes:
        """Bytes `[start, stop)` over the wire."""
        data = patiently(self._found.pinned(self._path), lambda: self._request(start, stop))
        self.transferred += len(data)
        return data

    def _request(self, start: int, stop: int) -> bytes:
        hub = library().hf_hub_url(self._found.repo, self._path, revision=self._found.commit)
        url = self._direct or hub
        headers = {} if self._direct else utilities().build_hf_headers(library_name="sdops")
        headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        timeout = library().constants.HF_HUB_DOWNLOAD_TIMEOUT
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
            if urlsplit(str(answer.url)).netloc != urlsplit(hub).netloc:
                self._direct = str(answer.url)
            data = b"".join(answer.iter_raw())
        if len(data) != stop - start:
            raise ConnectionError
        return data

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

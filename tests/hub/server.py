"""A server that speaks the Hub's protocol, as far as models go, for the real huggingface_hub client.

It has users with tokens, private and gated repositories, commits and branches, LFS with a second origin for contents,
pull requests, and faults on demand. Everything that is asked of it is in `log`.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS = re.compile(r".*\.(safetensors|ckpt|bin|pt|gguf)$")


class Blob:
    """Bytes, or a large file of which only the beginning is not zero."""

    def __init__(self, data: bytes, size: int | None = None) -> None:
        self.data = data
        self.size = len(data) if size is None else size
        self.sha256 = hashlib.sha256(data).hexdigest() if size is None else hashlib.sha256(b"%d" % size).hexdigest()
        self.oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def read(self, start: int, stop: int) -> bytes:
        part = self.data[start:stop]
        return part + bytes(stop - start - len(part))


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    allowed: set[str] = field(default_factory=set)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    parents: dict[str, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, Blob], branch: str = "main", message: str = "") -> str:
        parent = self.branches.get(branch, "")
        new = hashlib.sha1(f"{parent}{sorted(files)}{len(self.commits)}".encode()).hexdigest()
        self.commits[new] = files
        self.parents[new], self.messages[new] = parent, message
        self.branches[branch] = new
        return new

    def find(self, revision: str) -> str | None:
        revision = unquote(revision)
        return self.branches.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Fault:
    """What goes wrong with requests whose `METHOD path` matches, so many times.

    status: an answer with that code. drop: the body is cut after so many bytes, "reset" cuts it the hard way.
    flip: one bit of the body is wrong. ignore_range: the whole file instead of the part. lose: done, but no answer.
    """

    match: str
    times: int = 1
    after: int = 0  # requests that are let through first
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    drop: int | None = None
    reset: bool = False
    flip: bool = False
    ignore_range: bool = False
    lose: bool = False
    text: bytes = b""  # an answer that says nothing the client knows


class HubServer:
    """Starts with the first `with`."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.tokens = {"hf_writer": "write", "hf_reader": "read", "hf_outsider": "write"}
        self.users = {"hf_writer": "ann", "hf_reader": "ann", "hf_outsider": "bob"}
        self.contents: dict[str, Blob] = {}  # of LFS, by hash
        self.faults: list[Fault] = []
        self.log: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        self.redirects = True
        self.xet = False
        hub, contents = (ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, kind)) for kind in ("hub", "contents"))
        self._servers = [hub, contents]
        self.url = f"http://127.0.0.1:{hub.server_address[1]}"
        self.contents_url = f"http://127.0.0.1:{contents.server_address[1]}"

    def __enter__(self) -> HubServer:
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add(self, repo: str, files: dict[str, bytes | Blob], **attributes: Any) -> str:
        """Make a repository, or another commit in it; returns the commit."""
        blobs = {path: data if isinstance(data, Blob) else Blob(data) for path, data in files.items()}
        found = self.repositories.setdefault(repo, Repository(**attributes))
        for path, blob in blobs.items():
            if LFS.match(path):
                self.contents[blob.sha256] = blob
        return found.commit(blobs)

    def requests(self, pattern: str = "") -> list[dict[str, Any]]:
        with self.lock:
            return [entry for entry in self.log if re.search(pattern, f"{entry['method']} {entry['path']}")]

    def sent(self) -> int:
        with self.lock:
            return sum(entry["bytes"] for entry in self.log)

    def forget(self) -> None:
        with self.lock:
            self.log.clear()


def _handler(hub: HubServer, kind: str) -> type[BaseHTTPRequestHandler]:  # noqa: C901
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):
                super().handle()

        def _serve(self) -> None:
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = urlsplit(self.path)
            self.query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            self.entry = {
                "method": self.command,
                "path": parts.path,
                "range": self.headers.get("Range"),
                "token": self.token,
                "origin": kind,
                "bytes": 0,
            }
            with hub.lock:
                hub.log.append(self.entry)
                self.fault = self._fault(f"{self.command} {parts.path}")
            if self.fault and self.fault.status:
                self._answer(self.fault.status, {"error": "so it is"}, self.fault.headers)
            elif self.fault and self.fault.text:
                self._answer(200, self.fault.text)
            elif kind == "contents":
                self._contents(parts.path)
            else:
                self._route(parts.path)

        def _fault(self, request: str) -> Fault | None:
            for one in hub.faults:
                if one.times and re.search(one.match, request):
                    if not one.after:
                        one.times -= 1
                        return one
                    one.after -= 1
            return None

        def __getattr__(self, name: str) -> Any:
            if name.startswith("do_"):
                return self._serve
            raise AttributeError(name)

        # ------------------------------------------------------------------------------------------ answers

        def _answer(self, status: int, content: Any = None, headers: dict[str, str] | None = None) -> None:
            if self.fault and self.fault.lose:
                return self._cut()
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, text in (headers or {}).items():
                self.send_header(name, text)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self._send(data)
            return None

        def _fail(self, status: int, code: str, message: str = "no") -> None:
            self._answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

        def _send(self, data: bytes) -> None:
            self.entry["bytes"] += len(data)
            self.wfile.write(data)

        def _cut(self) -> None:
            self.close_connection = True
            self.wfile.flush()
            if self.fault and self.fault.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

        def _file(self, blob: Blob, headers: dict[str, str]) -> None:
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            start, stop, status = 0, blob.size, 200
            if wanted and not (self.fault and self.fault.ignore_range):
                start, status = int(wanted[1]), 206
                stop = min(int(wanted[2]) + 1, blob.size) if wanted[2] else blob.size
                headers = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{blob.size}"}
            self.send_response(status)
            for name, text in headers.items():
                self.send_header(name, text)
            self.send_header("Content-Length", str(stop - start))
            self.end_headers()
            if self.command == "HEAD":
                return
            fault = self.fault
            end = min(stop, start + fault.drop) if fault and fault.drop is not None else stop
            for position in range(start, end, 1 << 20):
                data = bytearray(blob.read(position, min(position + (1 << 20), end)))
                if fault and fault.flip and position == start:
                    data[len(data) // 2] ^= 1
                self._send(bytes(data))
            if end < stop:
                self._cut()

        # ------------------------------------------------------------------------------------------ who may what

        def _may_read(self, name: str, *, content: bool) -> Repository | None:
            found = hub.repositories.get(name)
            if self.token and self.token not in hub.tokens:
                self._answer(
                    401, {"error": "Invalid"}, {"X-Error-Message": "Invalid credentials in Authorization header"}
                )
                return None
            user = hub.users.get(self.token)
            if found is None or (found.private and user != name.partition("/")[0]):
                self._fail(404 if self.token else 401, "RepoNotFound", "Repository not found")
                return None
            if content and found.gated and user not in found.allowed:
                self._fail(403 if self.token else 401, "GatedRepo", "Access to this repository is restricted")
                return None
            return found

        def _may_write(self, name: str) -> bool:
            if hub.tokens.get(self.token) != "write":
                self._fail(403 if self.token else 401, "", "You need the write role")
                return False
            if hub.users[self.token] != name.partition("/")[0] and "create_pr" not in self.query:
                self._fail(403, "", "You are not in this organisation")
                return False
            return True

        # ------------------------------------------------------------------------------------------ routes

        def _route(self, path: str) -> None:
            for pattern, method in routes:
                if found := re.fullmatch(pattern, path):
                    return method(self, *(unquote(part) if part else "" for part in found.groups()))
            return self._fail(404, "", "no such route")

        def whoami(self) -> None:
            if self.token not in hub.tokens:
                return self._answer(
                    401, {"error": "Invalid"}, {"X-Error-Message": "Invalid credentials in Authorization header"}
                )
            role = {"accessToken": {"role": hub.tokens[self.token]}}
            name = hub.users[self.token]
            return self._answer(200, {"type": "user", "name": name, "fullname": name, "orgs": [], "auth": role})

        def create(self) -> None:
            wish = json.loads(self.body)
            owner = wish.get("organization") or hub.users.get(self.token, "")
            name = f"{owner}/{wish['name'].rpartition('/')[2]}"
            if not self._may_write(name):
                return None
            if name in hub.repositories:
                return self._answer(409, {"error": "exists", "url": f"{hub.url}/{name}"})
            new = Repository(private=wish.get("visibility") == "private" or bool(wish.get("private")))
            hub.repositories[name] = new
            new.commit({".gitattributes": Blob(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")})
            return self._answer(200, {"url": f"{hub.url}/{name}", "name": name, "id": name})

        def about(self, name: str, revision: str = "main") -> None:
            found = self._may_read(name, content=False)
            if found is None:
                return None
            commit = found.find(revision or "main")
            if commit is None:
                return self._fail(404, "RevisionNotFound", "Invalid rev id")
            siblings = [self._sibling(path, blob) for path, blob in sorted(found.commits[commit].items())]
            about = {"id": name, "modelId": name, "sha": commit, "private": found.private, "siblings": siblings}
            return self._answer(200, {**about, "gated": "auto" if found.gated else False, "tags": [], "downloads": 0})

        def _sibling(self, path: str, blob: Blob) -> dict[str, Any]:
            entry: dict[str, Any] = {"rfilename": path}
            if "blobs" in self.query:
                entry |= {"size": blob.size, "blobId": blob.oid}
                if LFS.match(path):
                    entry["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": 135}
            return entry

        def paths_info(self, name: str, revision: str) -> None:
            found = self._may_read(name, content=False)
            if found is None:
                return None
            commit = found.find(revision)
            if commit is None:
                return self._fail(404, "RevisionNotFound")
            kind = self.headers.get("Content-Type") or ""
            asked = json.loads(self.body)["paths"] if "json" in kind else parse_qs(self.body.decode()).get("paths", [])
            return self._answer(
                200, [self._tree_entry(p, found.commits[commit][p]) for p in asked if p in found.commits[commit]]
            )

        def tree(self, name: str, revision: str, _: str = "") -> None:
            found = self._may_read(name, content=False)
            if found is None:
                return None
            commit = found.find(revision)
            if commit is None:
                return self._fail(404, "RevisionNotFound")
            return self._answer(200, [self._tree_entry(p, blob) for p, blob in sorted(found.commits[commit].items())])

        def _tree_entry(self, path: str, blob: Blob) -> dict[str, Any]:
            entry: dict[str, Any] = {"type": "file", "path": path, "size": blob.size, "oid": blob.oid}
            if LFS.match(path):
                entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 135}
            return entry

        def resolve(self, name: str, revision: str, path: str) -> None:
            found = self._may_read(name, content=True)
            if found is None:
                return None
            commit = found.find(revision)
            if commit is None:
                return self._fail(404, "RevisionNotFound", "Invalid rev id")
            blob = found.commits[commit].get(path)
            if blob is None:
                headers = {
                    "X-Error-Code": "EntryNotFound",
                    "X-Error-Message": "Entry not found",
                    "X-Repo-Commit": commit,
                }
                return self._answer(404, {"error": "Entry not found"}, headers)
            headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
            if not LFS.match(path):
                return self._file(blob, {**headers, "ETag": f'"{blob.oid}"'})
            headers |= {
                "X-Linked-ETag": f'"{blob.sha256}"',
                "X-Linked-Size": str(blob.size),
                "ETag": f'"{blob.sha256}"',
            }
            if hub.xet:
                headers |= {
                    "X-Xet-Hash": blob.sha256,
                    "Link": f'<{hub.url}/api/models/{name}/xet-read-token/main>; rel="xet-auth"',
                }
            if not hub.redirects:
                return self._file(blob, headers)
            where = f"{hub.contents_url}/{blob.sha256}?signature=secret"
            return self._answer(302, b"", {**headers, "Location": where})

        # ------------------------------------------------------------------------------------------ uploads

        def validate(self) -> None:
            self._answer(200, {"errors": [], "warnings": []})

        def preupload(self, name: str, revision: str) -> None:
            found = hub.repositories.get(name)
            if found is None:
                return self._fail(404, "RepoNotFound", "Repository not found")
            if not self._may_write(name):
                return None
            now = found.commits.get(found.find(revision) or "", {})
            answers = []
            for wish in json.loads(self.body)["files"]:
                path = wish["path"]
                lfs = bool(LFS.match(path))
                old = now.get(path)
                answers.append({
                    "path": path,
                    "uploadMode": "lfs" if lfs else "regular",
                    "shouldIgnore": False,
                    "oid": None if old is None else old.sha256 if lfs else old.oid,
                })  # fmt: skip
            return self._answer(200, {"files": answers})

        def batch(self, _: str) -> None:
            if hub.tokens.get(self.token) != "write":
                return self._fail(403, "", "You need the write role")
            objects = []
            for wish in json.loads(self.body)["objects"]:
                one: dict[str, Any] = dict(wish)
                if wish["oid"] not in hub.contents:
                    one["actions"] = {"upload": {"href": f"{hub.contents_url}/{wish['oid']}"}}
                objects.append(one)
            return self._answer(200, {"transfer": "basic", "objects": objects})

        def commit(self, name: str, revision: str) -> None:
            found = hub.repositories.get(name)
            if found is None:
                return self._fail(404, "RepoNotFound", "Repository not found")
            if not self._may_write(name):
                return None
            now = found.find(revision)
            if now is None:
                return self._fail(404, "RevisionNotFound", "Invalid rev id")
            lines = [json.loads(line) for line in self.body.splitlines()]
            (header,) = (line["value"] for line in lines if line["key"] == "header")
            if header.get("parentCommit") not in (None, now):
                return self._fail(412, "", "The branch has moved")
            large = {line["value"]["path"]: line["value"]["oid"] for line in lines if line["key"] == "lfsFile"}
            if not set(large.values()) <= hub.contents.keys():
                return self._fail(400, "", "LFS object missing")
            files = found.commits[now] | {path: hub.contents[oid] for path, oid in large.items()}
            for value in (line["value"] for line in lines if line["key"] == "file"):
                files[value["path"]] = Blob(base64.b64decode(value["content"]))
            pull = "create_pr" in self.query
            number = 1 + sum(branch.startswith("refs/pr/") for branch in found.branches)
            branch = f"refs/pr/{number}" if pull else unquote(revision)
            if pull:
                found.branches[branch] = now
            new = found.commit(files, branch, header["summary"])
            answer = {"success": True, "commitOid": new, "commitUrl": f"{hub.url}/{name}/commit/{new}"}
            if pull:
                answer["pullRequestUrl"] = f"{hub.url}/{name}/discussions/{number}"
            return self._answer(200, answer)

        def commits(self, name: str, revision: str) -> None:
            found = self._may_read(name, content=False)
            if found is None:
                return None
            one, entries = found.find(revision), []
            while one:
                entries.append(
                    {
                        "id": one,
                        "title": found.messages[one],
                        "message": "",
                        "date": "2026-01-01T00:00:00.000Z",
                        "authors": [],
                    }
                )
                one = found.parents[one]
            return self._answer(200, entries)

        def _contents(self, path: str) -> None:
            oid = path.strip("/")
            if self.command == "PUT":
                blob = Blob(self.body)
                if blob.sha256 != oid:
                    return self._fail(400, "", "wrong hash")
                hub.contents[oid] = blob
                return self._answer(200, b"")
            if oid not in hub.contents or "signature" not in self.query:
                return self._fail(404, "", "no such content")
            return self._file(hub.contents[oid], {"ETag": f'"{oid}"'})

    repo, revision = r"([\w.-]+/[\w.-]+)", r"([^/]+|refs/pr/\d+)"
    routes: list[tuple[str, Callable[..., None]]] = [
        (r"/api/whoami-v2", Handler.whoami),
        (r"/api/repos/create", Handler.create),
        (r"/api/validate-yaml", Handler.validate),
        (rf"/api/models/{repo}", Handler.about),
        (rf"/api/models/{repo}/revision/{revision}", Handler.about),
        (rf"/api/models/{repo}/tree/{revision}(?:/(.*))?", Handler.tree),
        (rf"/api/models/{repo}/paths-info/{revision}", Handler.paths_info),
        (rf"/api/models/{repo}/preupload/{revision}", Handler.preupload),
        (rf"/api/models/{repo}/commit/{revision}", Handler.commit),
        (rf"/api/models/{repo}/commits/{revision}", Handler.commits),
        (rf"/{repo}\.git/info/lfs/objects/batch", Handler.batch),
        (rf"/{repo}/resolve/{revision}/(.*)", Handler.resolve),
    ]
    return Handler

"""A Hub on the loopback interface, with the few calls by which huggingface_hub downloads and uploads.

It stores repositories in memory, notes every request, and fails on command: a refusal by status, or a connection cut in
the middle of a file.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_loopback"
LARGE = (".safetensors", ".bin")


@dataclass
class Hub:
    """What the server holds and what was asked of it.

    `repositories` is `{name: {commit: {path: content}}}`, a repository's last commit being `main`. `refuse` answers a
    repository with `(status, error code)`. `cuts` closes the connection after so many bytes of a path, once for each
    entry; `down` answers every request for a path's content, and each upload to a repository, with 500. `pages` are
    contents outside all repositories.
    `etags` replaces a path's; `answers` is what a repository answers to everything: status, kind of content, content.
    `on_request` runs before each answer to a reader, as a push by somebody else would. `whoami` is what is known of the
    token; `closed` are the repositories that it may not write to.
    """

    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    refuse: dict[str, tuple[int, str]] = field(default_factory=dict)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    down: set[str] = field(default_factory=set)
    requests: list[tuple[str, str]] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)
    pages: dict[str, bytes] = field(default_factory=dict)
    etags: dict[str, str] = field(default_factory=dict)
    answers: dict[str, tuple[int, str, bytes]] = field(default_factory=dict)
    on_request: Callable[[], None] = lambda: None
    whoami: dict[str, object] = field(
        default_factory=lambda: {
            "type": "user",
            "name": "somebody",
            "orgs": [{"name": "ours", "roleInOrg": "write"}, {"name": "theirs", "roleInOrg": "read"}],
            "auth": {"accessToken": {"role": "write"}},
        }
    )
    closed: set[str] = field(default_factory=set)
    address: str = ""

    def publish(self, name: str, commit: str, folder: Path, **renamed: str) -> None:
        """Makes a commit of a folder; `renamed` gives a file another name, dots written as underscores."""
        files = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
        for new, old in renamed.items():
            files[new.replace("__", ".")] = files.pop(old.replace("__", "."))
        self.repositories.setdefault(name, {})[commit] = files

    def fetched(self) -> list[str]:
        """Paths whose content was asked for, in order of name, each once."""
        return sorted({path.split("/")[-1] for verb, path in self.requests if verb == "GET" and "/resolve/" in path})

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """Environment variables with which huggingface_hub asks this server alone and keeps its files in `home`."""
        return {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            **more,
        }


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """A Hub on a free port of 127.0.0.1, for as long as the block lasts."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # header and content are written apart, and would wait 40 ms for each other
    state: Hub

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._read()

    def do_GET(self) -> None:
        self._read()

    def do_POST(self) -> None:
        self._write()

    def do_PUT(self) -> None:
        self._write()

    def _read(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.state.requests.append((self.command, path))
        self.state.on_request()
        repository = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+)/.+", path)
        if repository and repository[1] in self.state.answers:
            self._answer(*self.state.answers[repository[1]])
        elif path == "/api/whoami-v2":
            known = self._may_write()
            self._json(self.state.whoami if known else {"error": "Invalid credentials"}, 200 if known else 401)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/auth-check(?:/write)?", path):
            if self._files(found[1], "main") is not None:
                self._json(
                    {"error": "no write access"} if found[1] in self.state.closed else {},
                    403 if found[1] in self.state.closed else 200,
                )
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(?:revision|tree)/([^/]+)", path):
            files = self._files(*found.groups())
            if files is not None:
                name, revision = found.groups()
                commit = self._commit(name, revision)
                listing = [{"type": "file", "path": path, **_described(data)} for path, data in sorted(files.items())]
                siblings = [{"rfilename": path, "size": len(files[path])} for path in sorted(files)]
                info = {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "private": False, "tags": []}
                self._json(listing if "/tree/" in path else info)
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            name, revision, file = found.groups()
            files = self._files(name, revision)
            if files is not None and file not in files:
                self._json({"error": "no such entry"}, 404, {"X-Error-Code": "EntryNotFound"})
            elif files is not None:
                self._content(file, files[file], str(self._commit(name, revision)))
        elif path in self.state.pages:
            self._content(path, self.state.pages[path], "")
        else:
            self._json({"error": "no such page"}, 404)

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _content(self, file: str, data: bytes, commit: str) -> None:
        start = 0
        if (asked := self.headers.get("Range")) is not None:
            self.state.ranges.append(asked)
            start = int(re.fullmatch(r"bytes=(\d+)-.*", asked)[1])
        if self.command == "GET" and file in self.state.down:
            self._json({"error": "down"}, 500)
            return
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{self.state.etags.get(file) or hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        cuts = self.state.cuts.get(file, [])
        if cuts:
            self.wfile.write(data[start : cuts.pop(0)])
            self.wfile.flush()
            self.close_connection = True
        else:
            self.wfile.write(data[start:])

    def _write(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.state.requests.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        if path.startswith("/api/") and not path.endswith("validate-yaml") and not self._may_write():
            self._json({"error": "Invalid username or password."}, 401)
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif (name := path.removeprefix("/api/models/").rpartition("/preupload")[0]) in self.state.down:
            self._json({"error": "down"}, 500)
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            taken = name in self.state.repositories
            self.state.repositories.setdefault(name, {"0" * 40: {}})
            self._json({"url": f"{self.state.address}/{name}", "name": name}, 409 if taken else 200)
        elif re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/main", path):
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = {file: "lfs" if file.endswith(LARGE) else "regular" for file in files}
            self._json({"files": [{"path": f, "uploadMode": modes[f], "shouldIgnore": False} for f in files]})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.state.address}/store/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/store/([0-9a-f]{64})", path):
            assert hashlib.sha256(body).hexdigest() == found[1]
            self.state.uploads[found[1]] = body
            self._json({})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self._commit_files(found[1], [json.loads(line) for line in body.splitlines() if line.strip()])
        else:
            self._json({"error": f"no such page {path}"}, 404)

    def _commit_files(self, name: str, lines: list[dict]) -> None:
        commits = self.state.repositories[name]
        files = dict(list(commits.values())[-1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.state.uploads[value["oid"]]
        commit = f"{len(commits):040x}"
        commits[commit] = files
        address = f"{self.state.address}/{name}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": address, "hookOutput": ""})

    def _may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _commit(self, name: str, revision: str) -> str | None:
        commits = self.state.repositories.get(name, {})
        return list(commits)[-1] if revision == "main" and commits else revision if revision in commits else None

    def _files(self, name: str, revision: str) -> dict[str, bytes] | None:
        """The files of a commit; where there are none the refusal has been sent."""
        if name in self.state.refuse:
            status, code = self.state.refuse[name]
            self._json({"error": "refused"}, status, {"X-Error-Code": code} if code else {})
        elif name not in self.state.repositories:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif (commit := self._commit(name, revision)) is None:
            self._json({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        else:
            return self.state.repositories[name][commit]
        return None

    def _json(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _described(data: bytes) -> dict[str, object]:
    return {"size": len(data), "oid": hashlib.sha1(data).hexdigest()}

"""A hub on loopback: the few routes that an upload or a download needs, and a memory of what it was asked."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


USER = "someone"
COMMIT = "0" * 40


@dataclass
class Request:
    """What a client sent."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class FakeHub:
    """What the hub holds, and how it is to fail.

    Attributes:
        token: The one that may write.
        endpoint: Its address.
        failing: Status by the part of a route, such as ``"/commit/"``.
        requests: All that came, in order.
        repositories: Names of those that were made.
        gated: Names of those whose files nobody may read.
        files: What was committed or is there to be downloaded, by repository and path.
    """

    token: str
    endpoint: str = ""
    failing: dict[str, int] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    repositories: list[str] = field(default_factory=list)
    gated: list[str] = field(default_factory=list)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def answer(self, request: Request) -> tuple[int, Any]:
        """Status and JSON of the answer."""
        self.requests.append(request)
        path = request.path.partition("?")[0]
        for part, status in self.failing.items():
            if part in path:
                return status, {"error": "the disk of the hub is full"}
        if request.headers.get("authorization") != f"Bearer {self.token}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            asked = json.loads(request.body)
            name = f"{asked.get('organization') or USER}/{asked['name']}"
            if name in self.repositories:
                return 409, {"error": "You already created this model repo", "url": f"{self.endpoint}/{name}"}
            self.repositories.append(name)
            return 200, {"url": f"{self.endpoint}/{name}", "name": name, "id": "1"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        repository, _, route = path.removeprefix("/api/models/").partition("/")
        name, _, route = route.partition("/")
        repository = f"{repository}/{name}"
        if not path.startswith("/api/models/") or repository not in self.repositories:
            return 404, {"error": "Repository not found"}
        if route.startswith("preupload/"):
            asked = json.loads(request.body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]
            return 200, {"files": modes, "commitOid": COMMIT}
        if route.startswith("commit/"):
            for line in map(json.loads, request.body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.files.setdefault(repository, {})[line["value"]["path"]] = content
            url = f"{self.endpoint}/{repository}/commit/{COMMIT}"
            return 200, {"success": True, "commitOid": COMMIT, "commitUrl": url}
        if route in ("", "revision/main"):
            return 200, {"id": repository, "sha": COMMIT, "siblings": [], "private": False, "tags": []}
        if route.startswith("tree/"):
            names = self.files.get(repository, {})
            entries = [{"type": "file", "path": n, "size": len(c), "oid": COMMIT} for n, c in names.items()]
            return 200, entries
        return 404, {"error": f"this hub does not know {path}"}

    def download(self, request: Request) -> bytes | None:
        """The contents of the file that is asked for, if it is one."""
        repository, found, file = request.path.partition("?")[0].lstrip("/").partition("/resolve/")
        content = self.files.get(repository, {}).get(file.partition("/")[2]) if found else None
        if content is not None:
            self.requests.append(request)
        return content

    @property
    def downloaded(self) -> set[str]:
        """Names of the files that were sent."""
        paths = [request.path for request in self.requests if request.method == "GET" and "/resolve/" in request.path]
        return {path.partition("/resolve/")[2].partition("/")[2] for path in paths}


@contextmanager
def fake_hub(token: str) -> Iterator[FakeHub]:
    """A hub that answers while the context lasts."""
    hub = FakeHub(token)

    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = Request(self.command, self.path, headers, body)
            data = hub.download(request)
            closed = "/resolve/" in self.path and any(self.path.startswith(f"/{name}/") for name in hub.gated)
            if data is None or closed:
                status, answer = (401, {"error": "gated"}) if closed else hub.answer(request)
                data = json.dumps(answer).encode()
                self.send_response(status)
                if closed:
                    self.send_header("X-Error-Code", "GatedRepo")
                self.send_header("Content-Type", "application/json")
            else:
                self.send_response(200)
                self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_POST = do_HEAD = _serve  # noqa: N815

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

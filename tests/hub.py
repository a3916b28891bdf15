"""A small Hugging Face hub: the endpoints that an upload uses, on this machine. What is not whole is refused."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

WRITER, READER = "hf_writer", "hf_reader"
OWNER = "somebody"
# As the real one: small texts are stored with the commit, all else beside it.
_BESIDE = (".gguf", ".onnx", ".data", ".bin")


@dataclass
class Repository:
    """What a repository has: files by branch (``refs/pr/1`` for a proposal) and name."""

    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[dict[str, Any]] = field(default_factory=list)


class Hub(ThreadingHTTPServer):
    """A hub.

    Attributes:
        repositories: by name. stored: large files by SHA-256. asked: every request's method and path.
        card_problem: what it finds wrong with any model card. broken: a path whose requests it drops.
        cas: directory in which clients of its chunk storage (Xet) leave their files.
    """

    daemon_threads = True

    def __init__(self, cas: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.card_problem: str | None = None
        self.broken = "/nothing"
        self.cas = cas

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """A client that was interrupted is no error of this server."""


class _RefusedError(Exception):
    def __init__(self, status: int, message: str, code: str = "", more: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code
        self.answer = {"error": message, "errors": [{"message": message}], **(more or {})}


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Tests read ``asked``."""

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self._body()
        self.server.asked.append(f"{self.command} {self.path}")
        if self.server.broken in self.path:
            self.close_connection = True
            return
        try:
            status, answer, code = 200, self._do(self.path.partition("?")[0], body), ""
        except _RefusedError as refused:
            status, answer, code = refused.status, refused.answer, refused.code
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(data)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _do(self, path: str, body: bytes) -> dict[str, Any]:
        if path.startswith("/storage/"):  # its addresses are signed; they need no token
            return self._store(path.removeprefix("/storage/"), body)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in (WRITER, READER):
            raise _RefusedError(401, "Invalid username or password.")
        if path == "/api/validate-yaml":
            if self.server.card_problem:
                raise _RefusedError(400, self.server.card_problem)
            return {"warnings": [], "errors": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body), token)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            made = self._repository(found[1])
            return {"id": found[1], "private": made.private, "sha": "0" * 40, "siblings": []}
        if token != WRITER:
            raise _RefusedError(403, "your token has no write permission for this repository")
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
            branches = self._repository(found[1]).branches
            if found[2] in branches:
                raise _RefusedError(409, "Reference already exists")
            branches[found[2]] = dict(branches["main"])
            return {}
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            return self._modes(found[1], found[2], json.loads(body))
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._batch(json.loads(body))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/xet-write-token/(.+)", path):
            return {"casUrl": f"local://{self.server.cas}", "exp": 4_000_000_000, "accessToken": "x"}
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            return self._commit(found[1], found[2], [json.loads(line) for line in body.splitlines()])
        raise _RefusedError(404, f"{self.command} {path} is nothing that this hub knows")

    def _repository(self, name: str) -> Repository:
        if name not in self.server.repositories:
            raise _RefusedError(404, "Repository not found", "RepoNotFound")
        return self.server.repositories[name]

    def _create(self, asked: dict[str, Any], token: str) -> dict[str, Any]:
        owner = asked.get("organization") or OWNER
        name = f"{owner}/{asked['name']}"
        if token != WRITER or owner != OWNER:
            raise _RefusedError(403, f"You don't have the rights to create a model under the namespace {owner}")
        if name in self.server.repositories:
            raise _RefusedError(409, "You already created this model repo", more={"url": f"{self.server.url}/{name}"})
        self.server.repositories[name] = Repository(asked.get("visibility") == "private")
        return {"url": f"{self.server.url}/{name}", "id": name}

    def _modes(self, name: str, branch: str, asked: dict[str, Any]) -> dict[str, Any]:
        self._branch(self._repository(name), branch)
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(_BESIDE) else "regular",
                "shouldIgnore": False,
            }
            for file in asked["files"]
        ]
        return {"files": files}

    def _branch(self, repository: Repository, branch: str) -> dict[str, bytes]:
        if branch not in repository.branches:
            raise _RefusedError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        return repository.branches[branch]

    def _batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        objects = []
        for each in asked["objects"]:
            upload = {"href": f"{self.server.url}/storage/{each['oid']}", "header": {}}
            missing = each["oid"] not in self.server.stored
            objects.append({**each, **({"actions": {"upload": upload}} if missing else {})})
        return {"transfer": "basic", "objects": objects}

    def _store(self, oid: str, body: bytes) -> dict[str, Any]:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _RefusedError(400, "this is another file")
        self.server.stored[oid] = body
        return {}

    def _commit(self, name: str, branch: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
        repository = self._repository(name)
        files = dict(self._branch(repository, branch))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] in self.server.stored:
                    files[value["path"]] = self.server.stored[value["oid"]]
                elif self.server.cas.is_dir() and any(self.server.cas.rglob("*")):
                    files[value["path"]] = value["oid"].encode()  # its chunks are there
                else:
                    raise _RefusedError(400, f"{value['path']} was not uploaded")
            else:
                repository.commits.append(value)
        proposed = "create_pr=1" in self.path
        repository.branches["refs/pr/1" if proposed else branch] = files
        oid = f"{len(repository.commits):040x}"
        page = f"{self.server.url}/{name}"
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{page}/commit/{oid}", "hookOutput": ""}
        return {**answer, **({"pullRequestUrl": f"{page}/discussions/1"} if proposed else {})}

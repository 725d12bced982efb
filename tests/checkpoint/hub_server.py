"""A stand-in for the Hugging Face hub on loopback: the part of its HTTP API that downloads and uploads use."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Serves ``files`` of repositories and takes uploads.

    Attributes:
        files: content by repository (``models/owner/name`` or ``datasets/owner/name``) and path.
        gated: repositories whose files need ``token``.
        token: the one token that is accepted.
        stall_after: bytes after which a file's download hangs until ``resume`` is set; None: never.
        requests: (method, path, headers) of everything that was asked.
        commits: uploaded files by repository.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.token = "hf_correct"
        self.stall_after: int | None = None
        self.resume = threading.Event()
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.created: dict[str, dict[str, Any]] = {}
        self.commits: dict[str, dict[str, bytes]] = {}
        self.stored: dict[str, bytes] = {}

    def __enter__(self) -> HubServer:
        hub = self

        class Handler(_Handler):
            server_state = hub

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.resume.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Clients that are killed in the middle are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server_state: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._handle()

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def do_PUT(self) -> None:
        self._handle()

    def _handle(self) -> None:
        hub = self.server_state
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            self._info(f"{match[1]}/{match[2]}")
        elif match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/\w+", path):
            files = hub.files.get(f"{match[1]}/{match[2]}", {})
            entry = lambda name: {"type": "file", "path": name, "size": len(files[name]), "oid": COMMIT}  # noqa: E731
            self._json(200, [entry(name) for name in files])
        elif match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(f"{'datasets' if match[1] else 'models'}/{match[2]}", match[4])
        elif match := re.fullmatch(r"/store/(\w+)", path):
            assert hashlib.sha256(body).hexdigest() == match[1]
            hub.stored[match[1]] = body
            self._json(200, {})
        elif not self._authorized():
            self._json(401, {"error": "token needed"})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            hub.created[repo] = asked
            self._json(200, {"url": f"{hub.address}/{repo}", "name": repo})
        elif path == "/api/validate-yaml":
            self._json(200, {"warnings": [], "errors": []})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            asked = json.loads(body)["files"]
            mode = lambda name: "lfs" if name.endswith(".safetensors") else "regular"  # noqa: E731
            files = [{"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False} for f in asked]
            self._json(200, {"files": files, "commitOid": COMMIT})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{hub.address}/store/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            self._json(200, {"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self._commit(match[1], body)
        else:
            self._json(404, {"error": f"no {self.command} {path}"})

    def _authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.server_state.token}"

    def _info(self, repo: str) -> None:
        hub = self.server_state
        files = hub.files.get(repo)
        if files is None:
            self._json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
        self._json(200, {"id": repo.split("/", 1)[1], "sha": COMMIT, "siblings": siblings, "private": False})

    def _file(self, repo: str, name: str) -> None:
        hub = self.server_state
        data = hub.files.get(repo, {}).get(name)
        if data is None:
            self._json(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        if repo in hub.gated and not self._authorized():
            self._json(403 if "Authorization" in self.headers else 401, {}, {"X-Error-Code": "GatedRepo"})
            return
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start, status = 0, 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, status = int(match[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data) - start)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if hub.stall_after is not None and len(data) > hub.stall_after:
            self.wfile.write(data[start : hub.stall_after])
            hub.resume.wait()
            start = max(start, hub.stall_after)
        self.wfile.write(data[start:])

    def _commit(self, repo: str, body: bytes) -> None:
        hub, files = self.server_state, self.server_state.commits.setdefault(repo, {})
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                files[entry["value"]["path"]] = hub.stored[entry["value"]["oid"]]
        url = f"{hub.address}/{repo}/commit/{COMMIT}"
        self._json(200, {"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})

    def _json(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

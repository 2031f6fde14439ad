"""A local HTTP server that speaks what ``huggingface_hub`` asks of the Hub when it downloads a file.

Written from the requests of huggingface_hub 1.0 and 2.4: HEAD and GET of
``/{owner}/{name}/resolve/{revision}/{file}`` with commit, ETag and linked-size headers, large files behind a
redirect to a CDN that knows ranges, the model API, and each refusal with the status and ``X-Error-Code`` by
which the Hub tells them apart; and of uploads: a repository made, a model card checked, files of any size
sent in the commit itself.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

GOOD_TOKEN, OUTSIDE_TOKEN, NARROW_TOKEN = "hf_good", "hf_outside", "hf_narrow"
TOKENS = {GOOD_TOKEN, OUTSIDE_TOKEN, NARROW_TOKEN}
LFS = (".pth", ".bin", ".safetensors")
LICENCES = {"apache-2.0", "mit", "cc-by-nc-nd-4.0", "cc-by-4.0", "other"}


@dataclass
class Repo:
    """Files of the newest commit, under the branch ``main`` and its hash, and those of commits before."""

    files: dict[str, bytes]
    gated: bool = False
    private: bool = False
    history: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def push(self, files: dict[str, bytes]) -> None:
        """A new commit, which replaces all files; the one before stays under its hash."""
        self.history[self.commit] = self.files
        self.files = files

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        """Commit and files of a revision."""
        commit = self.commit if revision == "main" else revision
        return commit, self.history.get(commit, self.files)

    @property
    def commit(self) -> str:
        digest = hashlib.sha1()
        for name, content in sorted(self.files.items()):
            digest.update(name.encode() + content)
        return digest.hexdigest()


@dataclass
class FakeHub:
    """What the server knows, what it was asked, and how it misbehaves.

    Attributes:
        repos: by ``owner/name``.
        asked: every request as ``"METHOD path"``.
        cut_at: the CDN closes the connection after this many bytes of a file.
        status: answer everything with this status.
        foreign: answer everything as a web server that is no Hub.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    cut_at: int | None = None
    status: int | None = None
    foreign: bool = False
    url: str = ""


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        path = unquote(self.path).split("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        self.hub.asked.append(f"POST {path}")
        if self.hub.status is not None:
            return self._send(self.hub.status, b"")
        if path == "/api/validate-yaml":
            return self._card(json.loads(body)["content"])
        if self._token != GOOD_TOKEN:
            status = 403 if self._token in TOKENS else 401
            return self._send(status, b"", {"X-Error-Message": "You may not write here"})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            return self._json({"files": [{**f, "shouldIgnore": False} for f in files]})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            return self._commit(match[1], [json.loads(line) for line in body.splitlines()])
        return self._send(404, b"")

    @property
    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _chunks(self) -> bytes:
        whole = b""
        while size := int(self.rfile.readline(), 16):
            whole += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return whole

    def _json(self, answer: object, status: int = 200) -> None:
        self._send(status, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _card(self, content: str) -> None:
        """A licence that the Hub does not know is refused, as one of a card without any front matter."""
        licence = re.match(r"---\n(?:.*\n)*?license: (\S+)\n(?:.*\n)*?---\n", content)
        if licence is None or licence[1] not in LICENCES:
            return self._json({"errors": [{"message": '"license" must be one of many'}], "warnings": []}, 400)
        return self._json({"errors": [], "warnings": []})

    def _create(self, asked: dict[str, object]) -> None:
        repo_id = f"{asked['organization'] or 'lab'}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repos:
            return self._json({**answer, "error": "You already created this model repo"}, 409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repos[repo_id] = Repo({}, private=private)
        return self._json(answer)

    def _commit(self, repo_id: str, lines: list[dict[str, dict[str, str]]]) -> None:
        repo = self.hub.repos[repo_id]
        for line in lines:
            if line["key"] == "file":
                repo.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        url = f"{self.hub.url}/{repo_id}/commit/{repo.commit}"
        return self._json({"success": True, "commitUrl": url, "commitOid": repo.commit})

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, body: bool) -> None:
        path = unquote(self.path)
        self.hub.asked.append(f"{self.command} {path}")
        if self.hub.status is not None:
            return self._send(self.hub.status, b"")
        if self.hub.foreign:
            return self._send(200, b"<html>hello</html>" if body else b"")
        if match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/([^/]+)/(.+)", path):
            return self._send_range(self.hub.repos[match[1]].at(match[2])[1][match[3]], body)
        if path == "/api/whoami-v2":
            return self._whoami()
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/auth-check", path):
            return None if self._refused(match[1], "main") else self._send(200, b"")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self._api(match[1], match[2] or "main")
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(match[1], match[2], match[3], body)
        return self._send(404, b"")

    def _whoami(self) -> None:
        if self._token not in TOKENS:
            return self._send(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
        return self._json({"name": self._token.removeprefix("hf_"), "type": "user"})

    def _refused(self, repo_id: str, revision: str) -> bool:
        """Whether the request was answered by a refusal."""
        repo, token = self.hub.repos.get(repo_id), self._token
        refusal: tuple[int, str, str] | None = None  # status, code, message
        if token and token not in TOKENS:
            refusal = 401, "", "Invalid credentials in Authorization header"
        elif repo is None:
            missing = 404, "RepoNotFound", "Repository not found"
            refusal = missing if token else (401, "", "Invalid username or password.")
        elif repo.gated and not token:
            refusal = 401, "GatedRepo", "Access is restricted. Please log in."
        elif repo.gated and token == OUTSIDE_TOKEN:
            refusal = 403, "GatedRepo", "You are not in the authorized list."
        elif repo.gated and token == NARROW_TOKEN:
            refusal = 403, "", "Please enable access to public gated repositories"
        elif revision not in ("main", repo.commit, *repo.history):
            refusal = 404, "RevisionNotFound", f"Invalid rev id: {revision}"
        if refusal is None:
            return False
        status, code, message = refusal
        self._send(status, b"", {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}))
        return True

    def _api(self, repo_id: str, revision: str) -> None:
        if self._refused(repo_id, revision):
            return None
        repo = self.hub.repos[repo_id]
        files = [{"rfilename": name} for name in repo.files]
        gated = "manual" if repo.gated else False
        return self._json({"id": repo_id, "sha": repo.commit, "gated": gated, "siblings": files})

    def _resolve(self, repo_id: str, revision: str, name: str, body: bool) -> None:
        if self._refused(repo_id, revision):
            return None
        repo = self.hub.repos[repo_id]
        commit, files = repo.at(revision)
        headers = {"X-Repo-Commit": commit}
        if name not in files:
            return self._send(404, b"", {**headers, "X-Error-Code": "EntryNotFound"})
        content = files[name]
        if name.endswith(LFS):
            headers |= {
                "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Linked-Size": str(len(content)),
                # another host, as the real one: the client keeps the headers above and drops the token
                "Location": f"{self.hub.url.replace('127.0.0.1', 'localhost')}/cdn/{repo_id}/{commit}/{name}",
            }
            return self._send(302, b"", headers)
        headers["ETag"] = f'"{hashlib.sha1(content).hexdigest()}"'
        return self._send(200, content, headers, send_body=body)

    def _send_range(self, content: bytes, body: bool) -> None:
        match = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(match[1]) if match else 0
        headers = {"Accept-Ranges": "bytes"}
        if match:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(206 if match else 200, content[start:], headers, send_body=body, cut_at=self.hub.cut_at)

    def _send(
        self,
        status: int,
        content: bytes,
        headers: dict[str, str] | None = None,
        *,
        send_body: bool = True,
        cut_at: int | None = None,
    ) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if send_body and self.command != "HEAD":
            self.wfile.write(content[:cut_at])
        if cut_at is not None:
            self.close_connection = True


@contextmanager
def serve() -> Iterator[FakeHub]:
    """Run a server on a free port of this machine until the block ends."""
    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

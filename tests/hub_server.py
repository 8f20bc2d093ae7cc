"""A hub on localhost: as much of the Hugging Face Hub's protocol as its client needs to create, push and download.

Use the fixture `hub` (``pytest_plugins = ["hub_server"]`` in a test module, and no import of this one). Everything is
in memory; the client's cache is in `tmp_path`; `hub.requests` lists what the client asked for.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

TOKEN = "hf_of_the_tests"
USER = "tester"


def is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".bin"))


def blob_id(content: bytes, lfs: bool) -> str:
    """The name of a content: its sha256 in large file storage, else that of a git blob."""
    if lfs:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.commit("main", {}, "initial commit")

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        self.messages.append(message)
        sha = hashlib.sha1(f"{branch} {len(self.messages)} {sorted(files)}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]


class Refusal(Exception):
    """An answer that is an error: status, the hub's code for it, further headers."""

    def __init__(self, status: int, code: str = "", message: str = "", headers: dict[str, str] | None = None):
        super().__init__(status, code)
        self.status, self.code, self.message, self.headers = status, code, message, headers or {}


class Hub(ThreadingHTTPServer):
    """The server, and all that it holds: repositories by name, contents of large files by sha256."""

    daemon_threads = True
    token, user = TOKEN, USER

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.storage_url = f"http://localhost:{self.server_port}"  # another host, as on the real hub
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.read_only: set[str] = set()  # repositories that take no commits
        self.requests: list[tuple[str, str]] = []
        self.user_agents: set[str] = set()

    def downloads(self) -> list[str]:
        """Paths of the files whose content was sent."""
        return [path for method, path in self.requests if method == "GET" and ("/resolve/" in path or "/lfs/" in path)]


class Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        url = urlsplit(self.path)
        self.query, path = parse_qs(url.query), url.path  # a quoted slash is part of a name
        self.body = self._read_body()
        self.server.requests.append((self.command, path))
        self.server.user_agents.add(self.headers.get("User-Agent", ""))
        try:
            for method, pattern, answer in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method.split():
                    return answer(self, **{name: unquote(part) for name, part in match.groupdict().items()})
            raise Refusal(404, message=f"no such route: {self.command} {path}")
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message, **refusal.headers}
            self._send(refusal.status, json.dumps({"error": refusal.message or refusal.code}).encode(), headers)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    # who may do what

    def _authorized(self) -> bool:
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {TOKEN}"):
            raise Refusal(401, message="Invalid credentials in Authorization header")
        return given is not None

    def _repo(self, repo_id: str, write: bool = False) -> Repo:
        authorized = self._authorized()
        repo = self.server.repos.get(repo_id)
        if repo is None or (repo.private and not authorized):
            raise Refusal(404 if authorized else 401, "RepoNotFound", "Repository not found")
        if write and not authorized:
            raise Refusal(401, message="Invalid username or password.")
        return repo

    def _files(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repo = self._repo(repo_id)
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repo.commits[sha]

    # what can be asked

    def whoami(self) -> None:
        if not self._authorized():
            raise Refusal(401, message="Invalid username or password.")
        self._json({"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})

    def create_repo(self) -> None:
        if not self._authorized():
            raise Refusal(401, message="Invalid username or password.")
        wanted = json.loads(self.body)
        repo_id = f"{wanted.get('organization') or USER}/{wanted['name']}"
        there = repo_id in self.server.repos
        if not there:
            self.server.repos[repo_id] = Repo(wanted.get("private") or wanted.get("visibility") == "private")
        self._json({"url": f"{self.server.url}/{repo_id}", "name": repo_id}, 409 if there else 200)

    def validate_yaml(self) -> None:
        """Refuses what the real hub refuses in a model card: bad YAML, and a base model that is no id."""
        front = re.match(r"---\r?\n(.*?)\r?\n---", json.loads(self.body)["content"], re.DOTALL)
        try:
            base = (yaml.safe_load(front[1]) or {}).get("base_model") if front else None
            errors = [] if base is None or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) else [f"not a model id: {base}"]
        except yaml.YAMLError as error:
            errors = [str(error)]
        answer = {"errors": [{"message": error} for error in errors], "warnings": []}
        self._json(answer, 400 if errors else 200)

    def preupload(self, repo_id: str, revision: str) -> None:
        self._repo(repo_id, write=True)
        _, there = self._files(repo_id, revision)
        files = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            oid = blob_id(there[path], is_lfs(path)) if path in there else None
            mode = "lfs" if is_lfs(path) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": files})

    def lfs_batch(self, repo_id: str) -> None:
        self._repo(repo_id, write=True)
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.server.lfs:
                entry["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{entry['oid']}"}}
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if blob_id(self.body, lfs=True) != oid:
            raise Refusal(400, message="content and sha256 differ")
        self.server.lfs[oid] = self.body
        self._send(200, b"")

    def lfs_get(self, oid: str) -> None:
        if "Authorization" in self.headers:
            raise Refusal(400, message="the token is not for this host")
        self._send(200, self.server.lfs[oid], {"ETag": f'"{oid}"'})

    def commit(self, repo_id: str, revision: str) -> None:
        repo = self._repo(repo_id, write=True)
        if repo_id in self.server.read_only:
            raise Refusal(403, message="You don't have the rights to commit here")
        _, there = self._files(repo_id, revision)
        files, message = dict(there), ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            match entry["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.server.lfs[value["oid"]]
                case "deletedFile":
                    if files.pop(value["path"], None) is None:
                        raise Refusal(404, "EntryNotFound", "A file with this name doesn't exist")
                case other:
                    raise Refusal(400, message=f"unknown operation {other}")
        pull = "create_pr" in self.query
        number = 1 + sum(branch.startswith("refs/pr/") for branch in repo.branches)
        sha = repo.commit(f"refs/pr/{number}" if pull else revision, files, message)
        page = f"{self.server.url}/{repo_id}"
        self._json(
            {
                "success": True,
                "commitOid": sha,
                "commitUrl": f"{page}/commit/{sha}",
                "pullRequestUrl": f"{page}/discussions/{number}" if pull else None,
            }
        )

    def branch(self, repo_id: str, name: str) -> None:
        repo = self._repo(repo_id, write=True)
        if name in repo.branches:
            raise Refusal(409, message="Reference already exists")
        repo.branches[name] = repo.branches["main"]
        self._json({})

    def info(self, repo_id: str, revision: str | None = None) -> None:
        sha, files = self._files(repo_id, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(files)]
        self._json({"id": repo_id, "sha": sha, "private": self._repo(repo_id).private, "siblings": siblings})

    def tree(self, repo_id: str, revision: str) -> None:
        _, files = self._files(repo_id, revision)
        self._json(
            [
                {"type": "file", "path": path, "size": len(content), "oid": blob_id(content, lfs=False)}
                for path, content in sorted(files.items())
            ]
        )

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        sha, files = self._files(repo_id, revision)
        headers = {"X-Repo-Commit": sha}
        if path not in files:
            raise Refusal(404, "EntryNotFound", "Entry not found", headers)
        content, lfs = files[path], is_lfs(path)
        oid = blob_id(content, lfs)
        if lfs:
            headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
            self._send(302, b"", {**headers, "Location": f"{self.server.storage_url}/lfs/{oid}"})
        else:
            self._send(200, content, {**headers, "ETag": f'"{oid}"'})


_REPO = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", Request.whoami),
    ("POST", "/api/repos/create", Request.create_repo),
    ("POST", "/api/validate-yaml", Request.validate_yaml),
    ("POST", f"/api/models/{_REPO}/preupload/(?P<revision>[^/]+)", Request.preupload),
    ("POST", f"/api/models/{_REPO}/commit/(?P<revision>[^/]+)", Request.commit),
    ("POST", f"/api/models/{_REPO}/branch/(?P<name>[^/]+)", Request.branch),
    ("GET", f"/api/models/{_REPO}", Request.info),
    ("GET", f"/api/models/{_REPO}/revision/(?P<revision>[^/]+)", Request.info),
    ("GET", f"/api/models/{_REPO}/tree/(?P<revision>[^/]+)", Request.tree),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", Request.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", Request.lfs_put),
    ("GET", "/lfs/(?P<oid>[0-9a-f]{64})", Request.lfs_get),
    ("HEAD GET", f"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Request.resolve),
]


def forget_sessions() -> None:
    """Before 1.0, huggingface_hub asks whether it may use the network when it makes a session, which it then keeps."""
    from huggingface_hub import utils

    getattr(utils, "reset_sessions", lambda: None)()


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    """A hub that huggingface_hub talks to, with its token stored and its cache empty."""
    from huggingface_hub import constants, file_download

    with Hub() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        address = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        for holder in (constants, file_download):  # before 1.0, the second has a name of its own for it
            monkeypatch.setattr(holder, "HUGGINGFACE_CO_URL_TEMPLATE", address, raising=holder is constants)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # another protocol, and another server
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # keeps the address it began with
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        forget_sessions()
        yield server
        server.shutdown()

"""A Hub in memory behind a real HTTP server, as far as its client asks it: repositories, commits, LFS, downloads.

What is not as the client expects fails as it would there, by status and `X-Error-Code`.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import yaml

TOKEN = "hf_of_a_test"


class FakeHub:
    """What the server knows.

    Attributes:
        repos: name -> commits, oldest first; each is files by name.
        stored: large files by SHA-256.
        asked: every request, `METHOD path`.
        private: names of repositories that need a token.
    """

    def __init__(self) -> None:
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.stored: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.private: set[str] = set()
        self.url = ""

    def oid(self, repo: str, index: int) -> str:
        return hashlib.sha1(f"{repo} {index}".encode()).hexdigest()

    def put(self, repo: str, **files: bytes) -> str:
        """A commit of `files`, dots in their names written as two underscores."""
        commits = self.repos.setdefault(repo, [])
        commits.append({**(commits[-1] if commits else {}), **{n.replace("__", "."): c for n, c in files.items()}})
        return self.oid(repo, len(commits) - 1)

    def at(self, repo: str, revision: str) -> int | None:
        """Which commit a revision names."""
        commits = self.repos[repo]
        named = {self.oid(repo, index): index for index in range(len(commits))}
        return named.get(revision, len(commits) - 1 if revision == "main" and commits else None)


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, content: Any = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", headers.get("Length", str(len(body))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, {"error": code}, X_Error_Code=code)

    def handle_any(self) -> None:
        path = self.path.split("?")[0]
        if self.command != "GET" or "/" in path.removeprefix("/api/"):  # what else it asks of its own accord
            self.hub.asked.append(f"{self.command} {path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        writes = self.command in ("POST", "PUT") and not path.startswith(("/lfs", "/api/validate-yaml"))
        given = self.headers.get("Authorization")
        if writes and given != f"Bearer {TOKEN}":
            self.answer(401 if given is None else 403, {"error": "token"})
        elif path.startswith("/lfs/"):
            self.large(path.rsplit("/", 1)[-1])
        elif path == "/api/validate-yaml":
            self.validate()
        elif path == "/api/repos/create":
            self.create()
        else:
            self.of_repository(path)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def validate(self) -> None:
        front = json.loads(self.body)["content"].split("---\n")[1]
        known = isinstance(yaml.safe_load(front), dict)
        self.answer(200 if known else 400, {"errors": [] if known else [{"message": "bad"}], "warnings": []})

    def create(self) -> None:
        asked = json.loads(self.body)
        repo = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.hub.url}/{repo}", "name": repo}
        if repo in self.hub.repos:
            self.answer(409, {"error": "You already created this model repo", **url})
            return
        self.hub.repos[repo] = []
        self.answer(200, url)

    def of_repository(self, path: str) -> None:
        words = path.removeprefix("/api/models").strip("/").split("/")
        repo, rest = "/".join(words[:2]).removesuffix(".git"), words[2:]
        hidden = repo in self.hub.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        if repo not in self.hub.repos or hidden:
            self.refuse(401 if hidden else 404, "RepoNotFound")
        elif path.endswith("/info/lfs/objects/batch"):
            self.batch()
        elif rest[:1] == ["preupload"]:
            sizes = {"regular": False, "lfs": True}
            modes = [(f["path"], f["path"].endswith(".safetensors")) for f in json.loads(self.body)["files"]]
            names = {large: mode for mode, large in sizes.items()}
            self.answer(200, {"files": [{"path": p, "uploadMode": names[x], "shouldIgnore": False} for p, x in modes]})
        elif rest[:1] == ["commit"]:
            self.commit(repo)
        elif rest[:1] == ["resolve"]:
            self.resolve(repo, rest[1], "/".join(rest[2:]))
        else:
            self.describe(repo)

    def batch(self) -> None:
        objects = [
            {**asked, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}"}}}
            for asked in json.loads(self.body)["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def large(self, oid: str) -> None:
        if self.command == "PUT":
            if hashlib.sha256(self.body).hexdigest() != oid:
                self.answer(400, {"error": "another SHA-256"})
                return
            self.hub.stored[oid] = self.body
            self.answer(200)
            return
        self.answer(200, self.hub.stored[oid], ETag=f'"{oid}"')

    def commit(self, repo: str) -> None:
        commits = self.hub.repos[repo]
        files = dict(commits[-1]) if commits else {}
        for item in map(json.loads, self.body.splitlines()):
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        commits.append(files)
        oid = self.hub.oid(repo, len(commits) - 1)
        self.answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})

    def resolve(self, repo: str, revision: str, name: str) -> None:
        index = self.hub.at(repo, revision)
        if index is None:
            self.refuse(404, "RevisionNotFound")
            return
        content, commit = self.hub.repos[repo][index].get(name), self.hub.oid(repo, index)
        if content is None:
            self.answer(404, {"error": "no file"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        oid = hashlib.sha256(content).hexdigest()
        self.hub.stored[oid] = content
        self.answer(
            302,
            Location=f"{self.hub.url}/lfs/{oid}".replace("127.0.0.1", "localhost"),  # large files lie elsewhere
            X_Repo_Commit=commit,
            X_Linked_Etag=f'"{oid}"',
            X_Linked_Size=str(len(content)),
        )

    def describe(self, repo: str) -> None:
        files = (self.hub.repos[repo] or [{}])[-1]
        front = files.get("README.md", b"---\n---\n").decode().split("---\n")[1]
        siblings = [{"rfilename": name} for name in files]
        self.answer(200, {"id": repo, "siblings": siblings, "cardData": yaml.safe_load(front) or {}, "tags": []})


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, cache: Path, token: str | None = TOKEN) -> Iterator[FakeHub]:
    """A Hub that the client takes for the only one, with an empty cache at `cache`."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    constants = huggingface_hub.constants
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
    here = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": template}
    for name, value in {**here, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()

"""A Hugging Face hub on loopback, as far as its client needs one: resolve, commits, LFS uploads, and some mischief.

What it must answer was read from huggingface_hub: ``X-Repo-Commit``, ``ETag`` and ``X-Error-Code`` headers, redirects
of large files to another path with ``X-Linked-*`` headers, relative redirects of renamed repositories, byte ranges.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test"


@dataclass
class Repo:
    """Files by commit; ``refs`` maps branches and tags to commits, oldest commit first."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False

    def commit(self, files: Mapping[str, bytes], *refs: str) -> str:
        parent = self.commits.get(self.refs.get("main", ""), {})
        tree = {**parent, **files}
        oid = hashlib.sha1(repr((len(self.commits), sorted(tree.items()))).encode()).hexdigest()
        self.commits[oid] = tree
        self.refs.update(dict.fromkeys(("main", *refs), oid))
        return oid


class Hub(ThreadingHTTPServer):
    """The server. Tests change its attributes between requests.

    ``large``: files served by redirect, as LFS files are. ``faults``: what goes wrong for a repository: ``"short"``
    (fewer bytes than announced beforehand), ``"hangup"`` (the connection breaks in the middle of the first answer),
    ``"down"`` (503), ``"strange"`` (a web page). ``answers``: headers, by repository, that replace those of one answer
    about a file after another; the last ones stay.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.storage = self.url.replace("127.0.0.1", "localhost")  # another host, or the client follows in its HEAD
        self.repos: dict[str, Repo] = {}
        self.renamed: dict[str, str] = {}
        self.faults: dict[str, str] = {}
        self.answers: dict[str, list[dict[str, str]]] = {}
        self.large: set[str] = set()
        self.uploads: dict[str, bytes] = {}
        self.log: list[str] = []

    def add(self, name: str, files: Mapping[str, bytes], *refs: str) -> str:
        return self.repos.setdefault(name, Repo()).commit(files, *refs)

    def requests(self, name: str) -> list[str]:
        """Lines ``METHOD path`` that concern a repository."""
        return [line for line in self.log if name in line]


@contextmanager
def running_hub():
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join(timeout=10)


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"
    timeout = 20

    def log_message(self, *args) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def error(self, status: int, code: str, **headers: str) -> None:
        self.answer(status, json.dumps({"error": code}).encode(), X_Error_Code=code, X_Error_Message=code, **headers)

    def json(self, value) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    # -- reading -----------------------------------------------------------------------------------------------

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.log.append(f"{self.command} {path}")
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(*found.groups())
        if found := re.fullmatch(r"/storage/([^/]+/[^/]+)/(\w+)/(.+)", path):
            name, commit, filename = found.groups()
            return self.send_file(name, self.server.repos[name].commits[commit][filename], {})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            repo = self.server.repos.get(found[1])
            if repo is None:
                return self.error(401, "RepoNotFound")
            return self.json({"id": found[1], "sha": repo.refs[found[2] or "main"], "siblings": []})
        return self.error(404, "NotFound")

    def resolve(self, name: str, revision: str, filename: str) -> None:
        if self.server.faults.get(name) == "down":
            return self.answer(503, b"maintenance")
        if self.server.faults.get(name) == "strange":
            return self.answer(200, b"<html>please log in</html>", Content_Type="text/html")
        if name in self.server.renamed:
            target = f"/{self.server.renamed[name]}/resolve/{revision}/{filename}"
            return self.answer(307, Location=target)
        repo = self.server.repos.get(name)
        if repo is None or repo.private and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.error(401, "RepoNotFound")
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            return self.error(404, "RevisionNotFound")
        data = repo.commits[commit].get(filename)
        replaced = self.server.answers.get(name, [{}])
        odd = replaced.pop(0) if len(replaced) > 1 else replaced[0]
        if data is None:
            return self.error(404, "EntryNotFound", **{"X_Repo_Commit": commit, **odd})
        headers = {"X_Repo_Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"', **odd}
        if filename not in self.server.large:
            return self.send_file(name, data, headers)
        linked = {"X_Linked_ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X_Linked_Size": str(len(data))}
        place = {"Location": f"{self.server.storage}/storage/{name}/{commit}/{filename}"}
        return self.answer(302, **{**linked, **place, **headers})

    def send_file(self, name: str, data: bytes, headers: dict[str, str]) -> None:
        fault = self.server.faults.get(name) if self.command == "GET" else None
        if fault == "short":
            return self.answer(200, data[: len(data) // 2], **headers)
        if fault == "hangup":
            del self.server.faults[name]
            self.answer(200, data[: len(data) // 2], Content_Length=str(len(data)), **headers)
            self.close_connection = True
            return None
        if start := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            at = int(start[1])
            return self.answer(206, data[at:], Content_Range=f"bytes {at}-{len(data) - 1}/{len(data)}", **headers)
        return self.answer(200, data, **headers)

    # -- writing -----------------------------------------------------------------------------------------------

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.log.append(f"PUT {self.path}")
        self.server.uploads[self.path.rsplit("/", 1)[1]] = data
        self.answer(200)

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        self.server.log.append(f"POST {path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.error(401, "Unauthorized")
        if path == "/api/repos/create":
            return self.create(json.loads(data))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", path):
            modes = {True: "lfs", False: "regular"}
            files = [file["path"] for file in json.loads(data)["files"]]
            plan = [{"path": f, "uploadMode": modes[f in self.server.large], "shouldIgnore": False} for f in files]
            return self.json({"files": plan})
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = json.loads(data)["objects"]
            for item in objects:
                item["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{found[1]}/{item['oid']}"}}
            return self.json({"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path):
            return self.commit(found[1], [json.loads(line) for line in data.splitlines()])
        return self.error(404, "NotFound")

    def create(self, request) -> None:
        name = f"{request['organization']}/{request['name']}"
        url = {"url": f"{self.server.url}/{name}", "name": name, "id": name}
        if name in self.server.repos:
            return self.answer(409, json.dumps({**url, "error": "You already created this model repo"}).encode())
        private = bool(request.get("private")) or request.get("visibility") == "private"
        self.server.repos[name] = Repo(private=private)
        return self.json(url)

    def commit(self, name: str, lines) -> None:
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                data = self.server.uploads[value["oid"]]
                assert hashlib.sha256(data).hexdigest() == value["oid"] and len(data) == value["size"]
                files[value["path"]] = data
        oid = self.server.repos[name].commit(files)
        return self.json({"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}"})

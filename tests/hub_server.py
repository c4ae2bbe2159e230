"""A stand-in for the Hugging Face Hub on this machine: repositories in memory, and of its protocol what
huggingface_hub uses to make a repository, commit to it, list it and load from it."""
import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_of_the_owner"


class Hub:
    "All repositories: {name: dict(private, refs={revision: commit}, commits={commit: {path: bytes}})}."
    def __init__(self):
        self.repos = {}
        self.blobs = {}  # {sha256: bytes} that were uploaded and belong to no commit yet
        self.requests = []

    def find(self, name, revision):
        "The commit of a revision and its files; None if there is none."
        repo = self.repos[name]
        commit = repo["refs"].get(revision, revision)
        return (commit, repo["commits"][commit]) if commit in repo["commits"] else None


def upload_mode(path):
    "Weights are uploaded by themselves (git-lfs), other files inside the commit."
    mode = "lfs" if path.endswith(".safetensors") else "regular"
    return dict(path=path, uploadMode=mode, shouldIgnore=False)


def make_handler(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def answer(self, status, content=b"", **headers):
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": len(content), **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def fail(self, status, code):
            self.answer(status, dict(error=code), X_Error_Code=code, X_Error_Message=code)

        def body(self):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        @property
        def is_owner(self):
            return self.headers.get("Authorization") == f"Bearer {TOKEN}"

        def repo(self, name):
            "The repository, or None after an error was sent: a private one does not exist for strangers."
            repo = hub.repos.get(name)
            if repo is None or repo["private"] and not self.is_owner:
                self.fail(404 if self.is_owner else 401, "RepoNotFound")
                return None
            return repo

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            hub.requests.append((self.command, self.path))
            path = self.path.partition("?")[0]
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
                found = self.repo(match[1]) and hub.find(match[1], match[2])
                if found:
                    files = [dict(type="file", path=p, size=len(d), oid="0"*40) for p, d in found[1].items()]
                    self.answer(200, files, Content_Type="application/json")
            elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                if self.repo(match[1]):
                    self.resolve(match[1], match[2], match[3])
            else:
                self.fail(404, "RepoNotFound")

        def resolve(self, name, revision, file):
            found = hub.find(name, revision)
            if found is None:
                self.fail(404, "RevisionNotFound")
            elif file not in found[1]:
                self.fail(404, "EntryNotFound")
            else:
                data = found[1][file]
                etag = f'"{hashlib.sha256(data).hexdigest()}"'
                self.answer(200, data, ETag=etag, X_Repo_Commit=found[0])

        def do_PUT(self):
            data = self.body()
            hub.blobs[hashlib.sha256(data).hexdigest()] = data
            self.answer(200)

        def do_POST(self):
            data = self.body()
            hub.requests.append((self.command, self.path))
            if not self.is_owner:
                self.fail(401, "Unauthorized")
            elif self.path == "/api/repos/create":
                self.create(json.loads(data))
            elif self.path == "/api/validate-yaml":
                self.answer(200, dict(errors=[], warnings=[]))
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", self.path):
                refs = hub.repos[match[1]]["refs"]
                refs.setdefault(match[2], refs["main"])
                self.answer(201, {})
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/([^?]+).*", self.path):
                self.answer(200, dict(files=[upload_mode(f["path"]) for f in json.loads(data)["files"]]))
            elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.path):
                self.lfs_batch(json.loads(data))
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^?]+).*", self.path):
                self.commit(match[1], match[2], data)
            else:
                self.fail(404, "RepoNotFound")

        def create(self, given):
            owner = given.get("organization") or "user"
            name = f"{owner}/{given['name']}"
            if owner != "user":
                self.fail(403, "Forbidden")
                return
            status = 409 if name in hub.repos else 200
            first = dict(private=given.get("visibility") == "private" or bool(given.get("private")),
                         refs=dict(main="0"*40), commits={"0"*40: {}})
            hub.repos.setdefault(name, first)
            self.answer(status, dict(url=f"{hub.address}/{name}"))

        def lfs_batch(self, given):
            rows = []
            for entry in given["objects"]:
                upload = dict(href=f"{hub.address}/lfs/{entry['oid']}")
                rows.append(dict(oid=entry["oid"], size=entry["size"], actions=dict(upload=upload)))
            self.answer(200, dict(transfer="basic", objects=rows),
                        Content_Type="application/vnd.git-lfs+json")

        def commit(self, name, revision, data):
            repo = hub.repos[name]
            files = dict(repo["commits"][repo["refs"][revision]])
            for line in data.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = hub.blobs[value["oid"]]
            commit = hashlib.sha1(data).hexdigest()
            repo["commits"][commit] = files
            repo["refs"][revision] = commit
            address = f"{hub.address}/{name}/commit/{commit}"
            self.answer(200, dict(success=True, commitOid=commit, commitUrl=address))

    return Handler


@contextmanager
def hub_server():
    "A hub that listens on a free port of this machine, as a `Hub` with its `address`."
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(hub))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

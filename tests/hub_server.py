"""
A server on this machine that speaks the Hub's protocol, as far as `huggingface_hub` needs it to push and to pull.

    with HubServer() as server:
        environment = {**os.environ, **server.environment(folder)}  # of processes that work against it
        server.files("me/model")  # {path: bytes} as they lie on the branch main

Repositories, commits and LFS objects lie in memory. `fail_after` cuts connections off, `heal` ends that.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

USER, TOKEN = "me", "hf_of_me"
MAIN = "main"
DATE = "2026-01-01T00:00:00.000Z"
TYPES = {"": "model", "datasets/": "dataset", "spaces/": "space"}
# The Hub keeps these, and whatever is large or not text, outside git.
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".parquet", ".arrow", ".mp4", ".wav", ".npy", ".zip", ".gz")
LFS_SIZE = 10_000_000
FLAVORS = ("cpu-basic", "a10g-small", "a100-large")
REPO_ID = r"[\w.-]+/[\w.-]+"


class HubError(Exception):
    """An answer that is an error: the status, the code that the client tells errors apart by, the message."""

    def __init__(self, status: int, code: str, message: str, **content):
        super().__init__(message)
        self.status, self.code, self.content = status, code, {"error": message, **content}


class CutOff(Exception):
    """The connection ends without an answer."""


@dataclass
class File:
    """A file of a commit. `oid` is git's, of the blob or of the LFS pointer; `sha256` is set for LFS files."""

    content: bytes
    sha256: str | None = None

    @property
    def oid(self) -> str:
        content = self.content
        if self.sha256 is not None:
            content = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(content)}\n"
            content = content.encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def entry(self, path: str) -> dict:
        entry = {"type": "file", "path": path, "oid": self.oid, "size": len(self.content)}
        if self.sha256 is not None:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": 130}
        return entry


@dataclass
class Commit:
    oid: str
    parent: str | None
    title: str
    files: dict[str, File]


@dataclass
class Repository:
    """`branches` and `tags` map names to commit ids."""

    type: str
    id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, title: str, files: dict[str, File]) -> Commit:
        parent = self.branches.get(branch)
        tree = sorted((path, file.oid) for path, file in files.items())
        oid = hashlib.sha1(json.dumps([self.type, self.id, parent, title, tree]).encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, files)
        self.branches[branch] = oid
        return self.commits[oid]

    def at(self, revision: str) -> Commit:
        """The commit that a branch, a tag or a commit id means."""
        revision = revision.removeprefix("refs/heads/")
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[oid]

    def history(self, revision: str) -> Iterator[Commit]:
        commit = self.at(revision)
        while commit is not None:
            yield commit
            commit = self.commits.get(commit.parent)


class HubServer:
    """
    The server and its state.

    Args:
        tokens: of each token, whose it is.

    Attributes:
        repositories: by (type, id).
        objects: the LFS objects that were uploaded, by their SHA-256.
        requests: "METHOD /path" of all that came, in order.
        jobs: what each job that was started is to run, by its id.
    """

    def __init__(self, tokens: dict[str, str] | None = None):
        self.tokens = {TOKEN: USER} if tokens is None else tokens
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.jobs: dict[str, dict] = {}
        self.lock = threading.RLock()
        self.stalled = threading.Event()
        self.heal()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._http.shutdown()
        self._http.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Variables of a process that takes this server for the Hub, logged in, its caches in the folder `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": next(iter(self.tokens)),
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }

    # ------------------------------------------------------------------------------------------------------- faults

    def fail_after(self, requests: int | None = None, received: int | None = None, answered: bool = True) -> None:
        """
        Cuts connections off from now on, until `heal`.

        Args:
            requests: after so many more requests; with `answered` False the last of these is acted on, but its answer
                is lost too.
            received: after so many more bytes of request bodies, in the middle of one.
        """
        with self.lock:
            self._requests_left, self._bytes_left, self._answered = requests, received, answered

    def stall_after(self, received: int) -> None:
        """After so many more bytes of request bodies, nothing is read any more; then `stalled` is set."""
        self.fail_after(received=received)
        self._stall = True
        self.stalled.clear()

    def heal(self) -> None:
        self.fail_after()
        self._stall = False

    def count_request(self) -> bool:
        """Whether the request is answered."""
        with self.lock:
            if self._requests_left is None:
                return True
            self._requests_left -= 1
            if self._requests_left < 0:
                raise CutOff
            return self._answered or self._requests_left > 0

    def count_bytes(self, count: int) -> int:
        """How many of the next `count` bytes of a body are read before the connection ends."""
        with self.lock:
            if self._bytes_left is None:
                return count
            count = min(count, self._bytes_left)
            self._bytes_left -= count
            return count

    # -------------------------------------------------------------------------------------------------------- state

    def repository(self, type: str, id: str, user: str | None) -> Repository:
        """A repository as `user` sees it: one that is private is none to others."""
        found = self.repositories.get((type, id))
        if found is None or (found.private and user != id.split("/")[0]):
            raise HubError(401 if user is None else 404, "RepoNotFound", "Repository not found")
        return found

    def address(self, type: str, id: str) -> str:
        return f"{self.url}/{'' if type == 'model' else f'{type}s/'}{id}"

    def files(self, id: str, type: str = "model", revision: str = MAIN) -> dict[str, bytes]:
        """What lies in a repository, but for the .gitattributes that it was made with."""
        files = self.repositories[type, id].at(revision).files
        return {path: file.content for path, file in files.items() if path != ".gitattributes"}

    def create(self, user: str, name: str, organization: str | None, type: str, private: bool) -> Repository:
        repo_id = f"{organization or user}/{name}"
        if organization not in (None, user):
            raise HubError(
                403, "", f'You don\'t have the rights to create a {type} under the namespace "{organization}"'
            )
        if (type, repo_id) in self.repositories:
            url = self.address(type, repo_id)
            raise HubError(409, "", f"You already created this {type} repo: {repo_id}", url=url)
        repository = self.repositories[type, repo_id] = Repository(type, repo_id, private)
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        repository.commit(MAIN, "initial commit", {".gitattributes": File(attributes.encode())})
        return repository

    def apply(self, repository: Repository, branch: str, lines: list[dict]) -> Commit:
        """One commit: a header, then the changes. All of it or, if anything is wrong, nothing."""
        if branch not in repository.branches:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {branch}")
        header, files = lines[0]["value"], dict(repository.at(branch).files)
        if header.get("parentCommit") not in (None, repository.branches[branch]):
            raise HubError(412, "", "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            value = line["value"]
            path = value["path"]
            if line["key"] == "file":
                files[path] = File(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    raise HubError(400, "", f"LFS pointer pointed to a file that does not exist: {path}")
                files[path] = File(self.objects[value["oid"]], value["oid"])
            elif line["key"] == "deletedFile" and path in files:
                del files[path]
            elif line["key"] == "deletedFolder" and any(name.startswith(path) for name in files):
                files = {name: file for name, file in files.items() if not name.startswith(path)}
            else:
                raise HubError(404, "EntryNotFound", f"A file with this name doesn't exist: {path}")
        return repository.commit(branch, header["summary"], files)


def check_card(content: str) -> dict:
    """What the Hub says of a card's metadata: `errors`, and `warnings` which do not stop a push."""
    match = re.match(r"---\s*\n(.*?)\n---", content, re.DOTALL)
    if match is None:
        return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
    try:
        metadata = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return {"errors": [{"message": f"Bad YAML: {error}"}], "warnings": []}
    bases = metadata.get("base_model") or []
    bases = [bases] if isinstance(bases, str) else bases
    errors = [f'"base_model" with value "{base}" is not valid.' for base in bases if not re.fullmatch(REPO_ID, base)]
    return {"errors": [{"message": message} for message in errors], "warnings": []}


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        answered = True
        try:
            self.hub.requests.append(f"{self.command} {self.path}")
            answered = self.hub.count_request()
            body = self.read_body()
            with self.hub.lock:
                answer = self.route(body)
        except HubError as error:
            headers = {"X-Error-Message": str(error), **({"X-Error-Code": error.code} if error.code else {})}
            answer = error.status, error.content, headers
        except (CutOff, ConnectionError):
            answered = False
        if answered:
            with suppress(ConnectionError):
                self.answer(*answer)
        else:
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.receive(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.receive(int(self.headers.get("Content-Length") or 0))

    def receive(self, size: int) -> bytes:
        allowed = self.hub.count_bytes(size)
        content = self.rfile.read(allowed)
        if allowed < size:
            if self.hub._stall:
                self.hub.stalled.set()
                threading.Event().wait()  # the thread ends with the process
            raise CutOff
        if len(content) < size:  # the client went away
            raise CutOff
        return content

    def answer(self, status: int, content: bytes | dict | list, headers: dict[str, str]) -> None:
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers = {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # ------------------------------------------------------------------------------------------------------ routing

    def user(self) -> str | None:
        """Who asks; None for nobody. A token that is not known is an error wherever it is sent."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise HubError(401, "", "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def writer(self) -> str:
        user = self.user()
        if user is None:
            raise HubError(401, "", "Invalid username or password.")
        return user

    def route(self, body: bytes) -> tuple[int, bytes | dict | list, dict[str, str]]:
        address = urlsplit(self.path)
        path = address.path
        self.query = parse_qs(address.query)
        if match := re.fullmatch(r"/lfs-objects/([0-9a-f]{64})", path):  # a signed address: no token
            if hashlib.sha256(body).hexdigest() != match[1]:
                raise HubError(400, "", "The content does not have this SHA-256")
            self.hub.objects[match[1]] = body
            return 200, b"", {}
        if match := re.fullmatch(rf"/(datasets/|spaces/|)({REPO_ID})\.git/info/lfs/(objects/batch|verify)", path):
            self.hub.repository(TYPES[match[1]], match[2], self.writer())
            return self.lfs(json.loads(body), path, match[3])
        if match := re.fullmatch(rf"/(datasets/|spaces/|)({REPO_ID})/resolve/([^/]+)/(.+)", path):
            repository = self.hub.repository(TYPES[match[1]], match[2], self.user())
            return self.resolve(repository.at(unquote(match[3])), unquote(match[4]))
        if match := re.fullmatch(
            rf"/api/(model|dataset|space)s/({REPO_ID})(?:/([\w-]+)(?:/([^/]+))?(?:/(.+))?)?", path
        ):
            repository = self.hub.repository(match[1], match[2], self.user())
            action, revision, rest = match[3], unquote(match[4] or MAIN), unquote(match[5] or "")
            return 200, self.of_repository(repository, action, revision, rest, body), {}
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": self.writer(), "auth": {"type": "access_token"}, "orgs": []}, {}
        if match := re.fullmatch(r"/api/jobs/([\w-]+)", path):
            return 200, self.start_job(match[1], json.loads(body)), {}
        if path == "/api/validate-yaml":
            answer = check_card(json.loads(body)["content"])
            return 400 if answer["errors"] else 200, answer, {}
        if path == "/api/repos/create":
            asked = json.loads(body)
            private = asked.get("visibility") == "private" or asked.get("private") is True
            kind = asked.get("type") or "model"
            repository = self.hub.create(self.writer(), asked["name"], asked.get("organization"), kind, private)
            return 200, {"url": self.hub.address(kind, repository.id), "name": repository.id}, {}
        raise HubError(404, "", f"Nothing at {path}")

    def start_job(self, namespace: str, asked: dict) -> dict:
        if self.writer() != namespace:
            raise HubError(403, "", f"You may not start jobs in the namespace {namespace}")
        if asked["flavor"] not in FLAVORS:
            raise HubError(400, "", f"Invalid flavor: {asked['flavor']}")
        id = f"{len(self.hub.jobs) + 1:024x}"
        self.hub.jobs[id] = asked
        shown = {key: value for key, value in asked.items() if key not in ("secrets", "timeoutSeconds")}
        owner = {"id": "1", "name": namespace, "type": "user"}
        return {"id": id, "createdAt": DATE, "status": {"stage": "SCHEDULING"}, "owner": owner, **shown}

    def lfs(self, asked: dict, path: str, action: str) -> tuple[int, bytes | dict, dict[str, str]]:
        if action == "verify":
            found = self.hub.objects.get(asked["oid"])
            if found is None or len(found) != asked["size"]:
                raise HubError(404, "", f"There is no object {asked['oid']} of {asked['size']} bytes")
            return 200, {}, {}
        verify = self.hub.url + path.replace("objects/batch", "verify")
        objects = []
        for wanted in asked["objects"]:
            actions = {"upload": {"href": f"{self.hub.url}/lfs-objects/{wanted['oid']}"}, "verify": {"href": verify}}
            objects.append({**wanted, **({} if wanted["oid"] in self.hub.objects else {"actions": actions})})
        return 200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}

    def resolve(self, commit: Commit, path: str) -> tuple[int, bytes, dict[str, str]]:
        headers = {"X-Repo-Commit": commit.oid}
        file = commit.files.get(path)
        if file is None:
            return 404, b"Entry not found", {**headers, "X-Error-Code": "EntryNotFound"}
        headers |= {"ETag": f'"{file.sha256 or file.oid}"', "Accept-Ranges": "bytes"}
        if file.sha256 is not None:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if match is None:
            return 200, file.content, headers
        size = len(file.content)
        start, end = int(match[1]), min(int(match[2] or size - 1), size - 1)
        if start >= size:
            return 416, b"", {**headers, "Content-Range": f"bytes */{size}"}
        return 206, file.content[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{size}"}

    def of_repository(self, repository: Repository, action: str | None, revision: str, rest: str, body: bytes):
        hub = self.hub
        if action in (None, "revision"):
            return self.info(repository, repository.at(revision))
        if action == "tree":
            return self.tree(repository.at(revision), rest)
        if action == "refs":
            names = {
                "branches": ("heads", repository.branches),
                "tags": ("tags", repository.tags),
                "converts": ("", {}),
            }
            return {
                kind: [{"name": name, "ref": f"refs/{place}/{name}", "targetCommit": oid} for name, oid in refs.items()]
                for kind, (place, refs) in names.items()
            }
        if action == "commits":
            return [
                {"id": commit.oid, "authors": [{"user": USER}], "date": DATE, "title": commit.title, "message": ""}
                for commit in repository.history(revision)
            ]
        if action == "paths-info":
            paths = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
            files = repository.at(revision).files
            entries = self.tree(repository.at(revision), "", recursive=True)
            folders = [entry for entry in entries if entry["type"] == "directory" and entry["path"] in paths]
            return [files[path].entry(path) for path in paths if path in files] + folders
        if self.writer() != repository.id.split("/")[0]:
            raise HubError(403, "", "You have read access but not the required permissions for this operation")
        asked = [json.loads(line) for line in body.splitlines()]
        if action == "preupload":
            files = repository.at(revision).files
            return {"files": [self.upload_mode(file, files.get(file["path"])) for file in asked[0]["files"]]}
        if action == "commit":
            commit = hub.apply(repository, revision, asked)
            url = f"{hub.address(repository.type, repository.id)}/commit/{commit.oid}"
            return {"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""}
        refs, name = (repository.tags, asked[0]["tag"]) if action == "tag" else (repository.branches, revision)
        if action in ("branch", "tag"):
            if name in refs:
                raise HubError(409, "", f"Reference already exists: {name}")
            start = revision if action == "tag" else asked[0].get("startingPoint", MAIN)
            refs[name] = repository.at(start).oid
            return {}
        raise HubError(404, "", f"Nothing at {self.path}")

    def upload_mode(self, file: dict, existing: File | None) -> dict:
        binary = b"\0" in base64.b64decode(file["sample"])
        lfs = binary or file["size"] > LFS_SIZE or file["path"].endswith(LFS_SUFFIXES)
        oid = None if existing is None else existing.sha256 or existing.oid
        return {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid}

    def info(self, repository: Repository, commit: Commit) -> dict:
        siblings = [{"rfilename": path, "size": len(file.content)} for path, file in sorted(commit.files.items())]
        return {
            "_id": repository.id,
            "id": repository.id,
            "modelId": repository.id,
            "author": repository.id.split("/")[0],
            "sha": commit.oid,
            "private": repository.private,
            "disabled": False,
            "gated": False,
            "lastModified": DATE,
            "createdAt": DATE,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": siblings,
        }

    def tree(self, commit: Commit, folder: str, recursive: bool | None = None) -> list[dict]:
        if recursive is None:
            recursive = self.query.get("recursive", ["False"])[0].lower() in ("true", "1")
        start = f"{folder.strip('/')}/" if folder else ""
        inside = {path: file for path, file in commit.files.items() if path.startswith(start)}
        if start and not inside:
            raise HubError(404, "EntryNotFound", f"{folder} does not exist")
        folders = {str(parent) for path in inside for parent in Path(path).parents} - {"."}
        entries = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
        entries = [entry for entry in entries if entry["path"].startswith(start)]
        entries += [file.entry(path) for path, file in sorted(inside.items())]
        return [entry for entry in entries if recursive or "/" not in entry["path"][len(start) :]]

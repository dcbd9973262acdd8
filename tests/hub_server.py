"""A Hub on the loopback interface, for the real huggingface_hub client: as much of it as sharing models needs.

Files are kept in memory. Large files live under another name and port, as they do on a storage host of the real Hub:
no token may reach that one. What it lacks: Xet, uploads in parts, `.gitignore`, pages of long listings, discussions.

    with loopback_hub() as hub:
        hub.fail("/commit/", status=500)
        subprocess.run([sys.executable, "push.py"], env=hub.environment(tmp_path, token="hf_secret"))
        assert "config.json" in hub.repositories["me/model"].files
        assert not hub.places_of("hf_secret")
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGE_FILES = ("bin", "gguf", "h5", "npy", "npz", "onnx", "pt", "pth", "safetensors", "zip")
GIT_ATTRIBUTES = "".join(f"*.{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in LARGE_FILES).encode()
# The usual ones of https://huggingface.co/docs/hub/repositories-licenses
LICENSES = ("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0")
LICENSES += ("gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "isc", "openrail", "llama3", "gemma", "unknown", "other")
RELATIONS = ("adapter", "merge", "quantized", "finetune")
FORBIDDEN = "You don't have the required permissions to perform this action"


class HubError(Exception):
    """An answer that tells the client what is wrong, with the headers from which it makes its exceptions."""

    def __init__(self, status: int, message: str, code: str | None = None, **more: Any):
        super().__init__(message)
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = Answer({"error": message, **more}, status, headers)


@dataclass
class Answer:
    content: Any = field(default_factory=dict)
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class File:
    """One version of a file; of a large one, git knows a pointer only."""

    content: bytes
    large: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def oid(self) -> str:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        stored = pointer.encode() if self.large else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    def describe(self, path: str) -> dict[str, Any]:
        lfs = {"lfs": {"oid": self.sha256, "size": len(self.content), "pointerSize": 134}} if self.large else {}
        return {"type": "file", "path": path, "size": len(self.content), "oid": self.oid, **lfs}


@dataclass(frozen=True)
class Commit:
    files: dict[str, File]
    parent: Commit | None = None
    title: str = "initial commit"
    message: str = ""
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ"))

    @cached_property
    def oid(self) -> str:
        parts = [self.parent.oid if self.parent else "", self.title, self.message, self.date]
        parts += [f"{path} {file.oid}" for path, file in sorted(self.files.items())]
        return hashlib.sha1("\n".join(parts).encode()).hexdigest()

    def history(self) -> list[Commit]:
        """This commit and all before it, newest first."""
        return [self, *(self.parent.history() if self.parent else [])]


@dataclass
class Repository:
    """A repository: `files` are those of its main branch; `references` are branches, tags and pull requests."""

    name: str
    private: bool = False
    gated: bool = False
    references: dict[str, Commit] = field(
        default_factory=lambda: {"refs/heads/main": Commit({".gitattributes": File(GIT_ATTRIBUTES)})}
    )

    @property
    def files(self) -> dict[str, bytes]:
        return self.files_at("main")

    def files_at(self, revision: str) -> dict[str, bytes]:
        return {path: file.content for path, file in self.commit(revision).files.items()}

    def commit(self, revision: str) -> Commit:
        """The commit that a branch, a tag, a pull request (`refs/pr/1`) or the start of a hash names."""
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in self.references:
                return self.references[name]
        for commit in self.all_commits():
            if len(revision) >= 7 and commit.oid.startswith(revision):
                return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def all_commits(self) -> list[Commit]:
        return list({commit.oid: commit for head in self.references.values() for commit in head.history()}.values())


@dataclass
class Request:
    """A request as it came; `status` is None where no whole answer went back, `storage` says that it came there."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes = b""
    status: int | None = None
    storage: bool = False

    @property
    def token(self) -> str | None:
        return self.headers["authorization"].removeprefix("Bearer ") if "authorization" in self.headers else None

    @property
    def options(self) -> dict[str, str]:
        return {name: values[-1] for name, values in parse_qs(urlsplit(self.path).query).items()}


@dataclass
class Fault:
    pattern: str
    method: str | None
    status: int | None
    headers: dict[str, str]
    drop_after: int | None
    lose_answer: bool
    times: int


@dataclass
class Hub:
    """A running Hub: what it holds, the requests that came, and the faults that were ordered."""

    user: str = "me"
    organizations: tuple[str, ...] = ("lab",)
    tokens: dict[str, str] = field(default_factory=lambda: {"hf_secret": "write", "hf_read_only": "read"})
    large_file_size: int = 10 * 2**20
    endpoint: str = ""
    storage: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def create(
        self, name: str, files: Mapping[str, bytes] | None = None, *, private: bool = False, gated: bool = False
    ) -> Repository:
        """Make a repository without a client, also another user's. A data set is `datasets/user/name`."""
        repository = self.repositories[name] = Repository(name, private, gated)
        if files:
            contents = {path: File(content, self.is_large(path, content)) for path, content in files.items()}
            self.objects |= {file.sha256: file.content for file in contents.values() if file.large}
            start = repository.commit("main")
            repository.references["refs/heads/main"] = Commit(start.files | contents, start, "files")
        return repository

    def fail(
        self,
        pattern: str,
        *,
        status: int | None = None,
        method: str | None = None,
        headers: dict[str, str] | None = None,
        drop_after: int | None = None,
        lose_answer: bool = False,
        times: int = 1,
    ) -> None:
        """Order a fault for the next requests whose path, with its query, a regular expression finds.

        Args:
            pattern: Large files are put to and got from `/storage/<sha256>`, others got from `/user/name/resolve/`.
            status: Answer with this, instead of doing what was asked (429 with `headers={"Retry-After": "0"}`).
            method: Only requests with this method.
            headers: More headers of that answer.
            drop_after: Break the connection after so many bytes of what is sent up, or of the answer to a GET.
            lose_answer: Do what was asked, and break the connection instead of saying so.
            times: How often.
        """
        self.faults.append(Fault(pattern, method, status, headers or {}, drop_after, lose_answer, times))

    def take_fault(self, request: Request) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and fault.method in (None, request.method) and re.search(fault.pattern, request.path):
                fault.times -= 1
                return fault
        return None

    def log(self, method: str | None = None, pattern: str = "") -> list[Request]:
        """The requests with this method whose path, with its query, a regular expression finds."""
        return [r for r in self.requests if method in (None, r.method) and re.search(pattern, r.path)]

    def places_of(self, token: str) -> list[str]:
        """Where a token lies or went, other than in the Authorization headers of requests to the Hub itself."""
        places = []
        for request in self.requests:
            headers = {name: value for name, value in request.headers.items() if name != "authorization"}
            if request.storage and request.token is not None:
                places.append(f"{request.method} {request.path}: Authorization, sent to the storage host")
            if token in request.path or token in str(headers) or token.encode() in request.body:
                places.append(f"{request.method} {request.path}: in its path, headers or body")
        for repository in self.repositories.values():
            for commit in repository.all_commits():
                texts = {"title": commit.title.encode(), "message": commit.message.encode()}
                texts |= {path: file.content for path, file in commit.files.items()}
                places += [f"{repository.name}: {name}" for name, text in texts.items() if token.encode() in text]
        return list(dict.fromkeys(places))

    def environment(self, home: str | os.PathLike, token: str | None = None) -> dict[str, str]:
        """Environment variables of a client's process: this Hub, an own cache, and no token but the given one."""
        prefixes = ("HF_", "HUGGINGFACE", "HUGGING_FACE", "TRANSFORMERS_")
        proxies = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
        kept = {n: v for n, v in os.environ.items() if not n.startswith(prefixes) and n.lower() not in proxies}
        own = {"HF_ENDPOINT": self.endpoint, "HF_HOME": os.fspath(home), "HF_HUB_OFFLINE": "0"}
        own |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1,localhost"}
        return kept | own | ({"HF_TOKEN": token} if token else {})

    def is_large(self, path: str, sample: bytes, size: int | None = None) -> bool:
        """Whether a file is kept beside git: for its name or its size, or because it is no text."""
        size = len(sample) if size is None else size
        return path.rsplit(".", 1)[-1] in LARGE_FILES or size > self.large_file_size or b"\0" in sample

    def owns(self, token: str | None, name: str) -> bool:
        return token in self.tokens and name.split("/")[-2] in (self.user, *self.organizations)

    def find(self, token: str | None, name: str) -> Repository:
        """A repository, if the bearer of a token may know of it."""
        repository = self.repositories.get(name.removeprefix("models/"))
        if repository is None or (repository.private and not self.owns(token, name)):
            status, message = (404, "Repository not found") if token else (401, "Invalid username or password.")
            raise HubError(status, message, "RepoNotFound")
        return repository

    def find_to_write(self, request: Request, name: str, propose: bool = False) -> Repository:
        """A repository that the bearer of a token may change, or may propose a change of."""
        repository, propose = self.find(request.token, name), propose or "create_pr" in request.options
        if self.tokens.get(request.token) != "write" or not (propose or self.owns(request.token, name)):
            raise HubError(403 if request.token else 401, FORBIDDEN)
        return repository


Route = Callable[..., Answer]
ROUTES: list[tuple[str, re.Pattern[str], Route]] = []
NAME = r"(?P<name>(?:models/|datasets/)[^/]+(?:/[^/]+)?)"
PLAIN_NAME = r"(?P<name>(?:datasets/)?[^/]+(?:/[^/]+?)?)"


def route(method: str, pattern: str) -> Callable[[Route], Route]:
    """Make a function answer a method and the paths that a pattern matches; it gets the pattern's groups."""

    def register(function: Route) -> Route:
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


@route("GET", "/api/whoami-v2")
def whoami(hub: Hub, request: Request) -> Answer:
    if request.token is None:
        raise HubError(401, "Invalid username or password.")
    organizations = [{"type": "org", "name": name, "roleInOrg": "write"} for name in hub.organizations]
    auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": hub.tokens[request.token]}}
    return Answer({"type": "user", "name": hub.user, "fullname": hub.user, "orgs": organizations, "auth": auth})


def named_in(hub: Hub, request: Request) -> tuple[dict[str, Any], str]:
    wanted = json.loads(request.body)
    prefix = "datasets/" if wanted.get("type") == "dataset" else ""
    return wanted, f"{prefix}{wanted.get('organization') or hub.user}/{wanted['name']}"


@route("POST", "/api/repos/create")
def create_repository(hub: Hub, request: Request) -> Answer:
    wanted, name = named_in(hub, request)
    if request.token is None:
        raise HubError(401, "Invalid username or password.")
    if hub.tokens[request.token] != "write" or not hub.owns(request.token, name):
        raise HubError(
            403, f'You don\'t have the rights to create a model under the namespace "{name.split("/")[-2]}"'
        )
    if name in hub.repositories:
        raise HubError(409, "You already created this model repo", url=f"{hub.endpoint}/{name}")
    hub.create(name, private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
    return Answer({"url": f"{hub.endpoint}/{name}", "name": name})


@route("DELETE", "/api/repos/delete")
def delete_repository(hub: Hub, request: Request) -> Answer:
    _, name = named_in(hub, request)
    del hub.repositories[hub.find_to_write(request, name).name]
    return Answer()


@route("POST", "/api/validate-yaml")
def validate_card(hub: Hub, request: Request) -> Answer:
    errors, warnings = check_card(json.loads(request.body)["content"])
    content = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    return Answer(content, 400 if errors else 200)


def read_metadata(card: str) -> Any:
    """The metadata of a model card, None if it has none."""
    block = re.match(r"\s*---\r?\n(.*?)\r?\n?---\s*?(\r?\n|$)", card, re.DOTALL)
    return yaml.safe_load(block[1]) if block else None


def check_card(card: str) -> tuple[list[str], list[str]]:
    """What the Hub says about a card's metadata: errors and warnings."""
    try:
        metadata = read_metadata(card)
    except yaml.YAMLError as error:
        return [f"YAML Metadata Error: {error}"], []
    if metadata is None or metadata == {}:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(metadata, dict):
        return ["YAML Metadata Error: the metadata must be a mapping"], []
    errors = []

    def expect(condition: object, message: str) -> None:
        if not condition:
            errors.append(message)

    for key in ("library_name", "pipeline_tag", "license_name", "license_link", "model_name"):
        expect(isinstance(metadata.get(key, ""), str), f'"{key}" must be a string')
    for key in ("tags", "datasets", "metrics", "language", "base_model", "license"):
        values = metadata.get(key, [])
        values = [values] if isinstance(values, str) and key != "tags" else values
        is_list = isinstance(values, list) and all(isinstance(value, str) for value in values)
        expect(is_list, f'"{key}" must be an array of strings')
        for value in values if is_list else []:
            if key == "license":
                expect(value in LICENSES, f'"license" must be one of [{", ".join(LICENSES)}]')
            if key in ("base_model", "datasets"):
                known = re.fullmatch(r"[\w.-]+(/[\w.-]+)?" if key == "datasets" else r"[\w.-]+/[\w.-]+", value)
                expect(known, f'"{key}" with value "{value}" is not valid. Use an id from https://hf.co/')
            if key == "language":
                expect(re.fullmatch(r"[a-z]{2,3}|code|multilingual", value), f'"language": "{value}" is no ISO code')
    relation = metadata.get("base_model_relation", "finetune")
    expect(relation in RELATIONS, f'"base_model_relation" must be one of [{", ".join(RELATIONS)}]')
    index = metadata.get("model-index", [])
    expect(isinstance(index, list), '"model-index" must be an array')
    for i, model in enumerate(index if isinstance(index, list) else []):
        expect(isinstance(model.get("name"), str), f'"model-index[{i}].name" must be a string')
        expect(isinstance(model.get("results"), list), f'"model-index[{i}].results" must be an array')
        for j, result in enumerate(model.get("results") or []):
            where = f"model-index[{i}].results[{j}]"
            expect(isinstance(result.get("task", {}).get("type"), str), f'"{where}.task.type" must be a string')
            for key in ("type", "name"):
                value = result.get("dataset", {}).get(key)
                expect(isinstance(value, str), f'"{where}.dataset.{key}" must be a string')
            expect(result.get("metrics"), f'"{where}.metrics" is required')
            for k, metric in enumerate(result.get("metrics") or []):
                expect(isinstance(metric.get("type"), str), f'"{where}.metrics[{k}].type" must be a string')
                expect(metric.get("value") is not None, f'"{where}.metrics[{k}].value" is required')
    return errors, []


@route("POST", f"/api/{NAME}/preupload/(?P<revision>.+)")
def choose_upload_modes(hub: Hub, request: Request, name: str, revision: str) -> Answer:
    present, files = hub.find_to_write(request, name).commit(revision).files, []
    for file in json.loads(request.body)["files"]:
        large = hub.is_large(file["path"], base64.b64decode(file["sample"]), file["size"])
        entry = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        before = present.get(file["path"])
        files.append(entry | ({"oid": before.sha256 if before.large else before.oid} if before else {}))
    return Answer({"files": files})


@route("POST", f"/{PLAIN_NAME}.git/info/lfs/objects/batch")
def start_large_uploads(hub: Hub, request: Request, name: str) -> Answer:
    hub.find_to_write(request, name, propose=True)
    objects = []
    for item in json.loads(request.body)["objects"]:
        upload = {"href": f"{hub.storage}/storage/{item['oid']}"}
        verify = {"href": f"{hub.endpoint}/{name}.git/info/lfs/objects/verify"}
        missing = {"actions": {"upload": upload, "verify": verify}} if item["oid"] not in hub.objects else {}
        objects.append({"oid": item["oid"], "size": item["size"], **missing})
    return Answer({"transfer": "basic", "objects": objects})


@route("PUT", "/storage/(?P<sha256>[0-9a-f]{64})")
def store_large_file(hub: Hub, request: Request, sha256: str) -> Answer:
    if hashlib.sha256(request.body).hexdigest() != sha256:
        raise HubError(400, "The content does not have the sha256 that was announced")
    hub.objects[sha256] = request.body
    return Answer(b"")


@route("POST", f"/{PLAIN_NAME}.git/info/lfs/objects/verify")
def verify_large_file(hub: Hub, request: Request, name: str) -> Answer:
    wanted = json.loads(request.body)
    if len(hub.objects.get(wanted["oid"], b"")) != wanted["size"]:
        raise HubError(404, "The object was not uploaded, or has another size")
    return Answer()


@route("GET", "/storage/(?P<sha256>[0-9a-f]{64})")
def get_large_file(hub: Hub, request: Request, sha256: str) -> Answer:
    if sha256 not in hub.objects:
        raise HubError(404, "No such object")
    return Answer(hub.objects[sha256], headers={"ETag": f'"{sha256}"'})


@route("POST", f"/api/{NAME}/commit/(?P<revision>.+)")
def commit(hub: Hub, request: Request, name: str, revision: str) -> Answer:
    repository, create_pr = hub.find_to_write(request, name), "create_pr" in request.options
    (header, *lines) = (json.loads(line) for line in request.body.splitlines() if line)
    base, parent = repository.commit(revision), header["value"].get("parentCommit")
    if parent and create_pr:
        base = repository.commit(parent)
    elif parent and not base.oid.startswith(parent):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    files = dict(base.files)
    for line in lines:
        change(hub, files, line["key"], line["value"])
    errors, _ = check_card(files["README.md"].content.decode()) if "README.md" in files else ([], [])
    if errors:
        raise HubError(400, "Invalid metadata in README.md: " + "; ".join(errors))
    number = sum(reference.startswith("refs/pr/") for reference in repository.references) + 1
    target = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
    if not create_pr and target not in repository.references:
        raise HubError(400, f"Not a branch: {revision}")
    made = Commit(files, base, header["value"]["summary"], header["value"].get("description", ""))
    repository.references[f"refs/pr/{number}" if create_pr else target] = made
    url = f"{hub.endpoint}/{repository.name}"
    content = {"success": True, "commitOid": made.oid, "commitUrl": f"{url}/commit/{made.oid}"}
    return Answer(content | ({"pullRequestUrl": f"{url}/discussions/{number}"} if create_pr else {}))


def change(hub: Hub, files: dict[str, File], key: str, value: dict[str, Any]) -> None:
    """Do one line of a commit to a tree of files."""
    path = value["path"]
    if key == "file":
        files[path] = File(base64.b64decode(value["content"]))
    elif key == "lfsFile":
        if value["oid"] not in hub.objects:
            raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
        files[path] = File(hub.objects[value["oid"]], large=True)
    elif key in ("deletedFile", "deletedFolder"):
        gone = [name for name in files if name == path or name.startswith(path.rstrip("/") + "/")]
        if not gone:
            raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
        for name in gone:
            del files[name]
    else:
        raise HubError(400, f"Unknown line in a commit: {key}")


@route("POST", f"/api/{NAME}/(?P<kind>branch|tag)/(?P<revision>.+)")
def create_reference(hub: Hub, request: Request, name: str, kind: str, revision: str) -> Answer:
    repository, wanted = hub.find_to_write(request, name), json.loads(request.body or b"{}")
    if kind == "branch":
        reference, start = f"refs/heads/{revision}", wanted.get("startingPoint") or "main"
    else:
        reference, start = f"refs/tags/{wanted['tag']}", revision
    if reference in repository.references:
        raise HubError(409, "Reference already exists")
    repository.references[reference] = repository.commit(start)
    return Answer()


@route("GET", f"/api/{NAME}(?:/revision/(?P<revision>.+))?")
def describe_repository(hub: Hub, request: Request, name: str, revision: str | None) -> Answer:
    repository = hub.find(request.token, name)
    head, plain = repository.commit(revision or "main"), repository.name.removeprefix("datasets/")
    metadata = read_metadata(head.files["README.md"].content.decode()) if "README.md" in head.files else None
    metadata = metadata or {}
    siblings = []
    for path, file in head.files.items():
        lfs = {"lfs": {"sha256": file.sha256, "size": len(file.content), "pointerSize": 134}} if file.large else {}
        blobs = {"size": len(file.content), "blobId": file.oid, **lfs} if "blobs" in request.options else {}
        siblings.append({"rfilename": path, **blobs})
    content = {"_id": "0", "id": plain, "modelId": plain, "author": plain.split("/")[0], "sha": head.oid}
    content |= {"private": repository.private, "gated": "auto" if repository.gated else False, "disabled": False}
    content |= {"downloads": 0, "likes": 0, "createdAt": head.history()[-1].date, "lastModified": head.date}
    content |= {"tags": list(metadata.get("tags", [])), "cardData": metadata, "siblings": siblings}
    content |= {key: metadata[key] for key in ("pipeline_tag", "library_name", "model-index") if key in metadata}
    return Answer(content)


@route("GET", f"/api/{NAME}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?")
def list_tree(hub: Hub, request: Request, name: str, revision: str, folder: str | None) -> Answer:
    files = hub.find(request.token, name).commit(unquote(revision)).files
    top = PurePosixPath(unquote(folder or ""))
    inside = {PurePosixPath(path): file for path, file in files.items() if top in PurePosixPath(path).parents}
    if folder and not inside:
        raise HubError(404, f"{unquote(folder)} does not exist on {revision!r}", "EntryNotFound")
    folders = {parent for path in inside for parent in path.parents if parent != top and top in parent.parents}
    entries = [{"type": "directory", "path": str(path), "size": 0, "oid": "0" * 40} for path in sorted(folders)]
    entries += [file.describe(str(path)) for path, file in inside.items()]
    if request.options.get("recursive", "false").lower() != "true":
        entries = [entry for entry in entries if PurePosixPath(entry["path"]).parent == top]
    return Answer(entries)


@route("POST", f"/api/{NAME}/paths-info/(?P<revision>.+)")
def describe_paths(hub: Hub, request: Request, name: str, revision: str) -> Answer:
    files = hub.find(request.token, name).commit(revision).files
    form = request.headers.get("content-type", "").startswith("application/json")
    paths = json.loads(request.body)["paths"] if form else parse_qs(request.body.decode()).get("paths", [])
    return Answer([files[path].describe(path) for path in paths if path in files])


@route("GET", f"/api/{NAME}/refs")
def list_references(hub: Hub, request: Request, name: str) -> Answer:
    content: dict[str, list] = {"branches": [], "tags": [], "pullRequests": [], "converts": []}
    kinds = {"refs/heads/": "branches", "refs/tags/": "tags", "refs/pr/": "pullRequests"}
    for reference, head in hub.find(request.token, name).references.items():
        prefix = next(prefix for prefix in kinds if reference.startswith(prefix))
        short = reference if prefix == "refs/pr/" else reference.removeprefix(prefix)
        content[kinds[prefix]].append({"name": short, "ref": reference, "targetCommit": head.oid})
    return Answer(content)


@route("GET", f"/api/{NAME}/commits/(?P<revision>.+)")
def list_commits(hub: Hub, request: Request, name: str, revision: str) -> Answer:
    history = hub.find(request.token, name).commit(revision).history()
    authors = [{"user": hub.user}]
    return Answer(
        [{"id": c.oid, "title": c.title, "message": c.message, "date": c.date, "authors": authors} for c in history]
    )


@route("GET", f"/{PLAIN_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def get_file(hub: Hub, request: Request, name: str, revision: str, path: str) -> Answer:
    repository = hub.find(request.token, name)
    if repository.gated and not hub.owns(request.token, name):
        message = f"Access to model {name} is restricted and you are not in the authorized list."
        raise HubError(403 if request.token else 401, message, "GatedRepo")
    head, path = repository.commit(unquote(revision)), unquote(path)
    if path not in head.files:
        error = HubError(404, "Entry not found", "EntryNotFound")
        error.answer.headers = {**error.answer.headers, "X-Repo-Commit": head.oid}
        raise error
    file = head.files[path]
    if not file.large:
        return Answer(file.content, headers={"X-Repo-Commit": head.oid, "ETag": f'"{file.oid}"'})
    linked = {"X-Linked-Size": str(len(file.content)), "X-Linked-ETag": f'"{file.sha256}"'}
    location = {"X-Repo-Commit": head.oid, "Location": f"{hub.storage}/storage/{file.sha256}"}
    return Answer(b"", 302, linked | location)


class _Handler(BaseHTTPRequestHandler):
    """Reads a request, does the ordered fault or what the route says, and answers."""

    protocol_version = "HTTP/1.1"
    # Else each answer waits 40 ms for the client's acknowledgement of its headers.
    disable_nagle_algorithm = True

    def __init__(self, hub: Hub, storage: bool, *arguments: Any):
        self.hub, self.storage = hub, storage
        super().__init__(*arguments)

    def log_message(self, *_: object) -> None:
        pass

    def handle_any(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers, storage=self.storage)
        with self.hub.lock:
            self.hub.requests.append(request)
            fault = self.hub.take_fault(request)
        length = int(headers.get("content-length", 0))
        if fault and fault.drop_after is not None and self.command not in ("GET", "HEAD"):
            request.body = self.rfile.read(min(length, fault.drop_after))
            return self.drop()
        request.body = self.rfile.read(length)
        if fault and fault.status is not None:
            answer = HubError(fault.status, "This fault was ordered by a test").answer
            answer.headers = {**answer.headers, **fault.headers}
        else:
            answer = self.find_answer(request)
        body = answer.content if isinstance(answer.content, bytes) else json.dumps(answer.content).encode()
        answer, body = part_of(answer, body, headers.get("range"))
        if fault and fault.lose_answer:
            return self.drop()
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if fault and fault.drop_after is not None:
            self.wfile.write(body[: fault.drop_after] if self.command == "GET" else b"")
            return self.drop()
        # Before the client knows, so that whoever has seen the answer finds it in the log.
        request.status = answer.status
        if self.command != "HEAD":
            self.wfile.write(body)

    def find_answer(self, request: Request) -> Answer:
        if not self.storage and request.token is not None and request.token not in self.hub.tokens:
            return HubError(401, "Invalid credentials in Authorization header").answer
        # Quoted slashes belong to the name of a revision or a folder; only file names have others.
        path = urlsplit(request.path).path
        method = "GET" if request.method == "HEAD" else request.method
        for wanted, pattern, function in ROUTES:
            match = pattern.fullmatch(path) if wanted == method else None
            if match and path.startswith("/storage/") == self.storage:
                groups = match.groupdict()
                if "revision" in groups and groups["revision"] and "path" not in groups and "folder" not in groups:
                    groups["revision"] = unquote(groups["revision"])
                with self.hub.lock:
                    try:
                        return function(self.hub, request, **groups)
                    except HubError as error:
                        return error.answer
        return HubError(404, f"Nothing here: {request.method} {path}").answer

    def drop(self) -> None:
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any


def part_of(answer: Answer, body: bytes, wanted: str | None) -> tuple[Answer, bytes]:
    """The part of an answer that a Range header asks for."""
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted or "")
    if not asked or answer.status != 200 or not isinstance(answer.content, bytes):
        return answer, body
    first, last = int(asked[1]), min(int(asked[2] or len(body)), len(body) - 1)
    if first > last:
        return Answer(b"", 416, {"Content-Range": f"bytes */{len(body)}"}), b""
    headers = {**answer.headers, "Content-Range": f"bytes {first}-{last}/{len(body)}"}
    return Answer(b"", 206, headers), body[first : last + 1]


class _Server(ThreadingHTTPServer):
    def handle_error(self, *arguments: Any) -> None:
        """A client that is gone is no error here."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(*arguments)


@contextmanager
def loopback_hub(**options: Any) -> Iterator[Hub]:
    """A running Hub, reached at its `endpoint`. Options are fields of `Hub`: user, organizations, tokens, ..."""
    hub = Hub(**options)
    servers = [_Server(("127.0.0.1", 0), partial(_Handler, hub, storage)) for storage in (False, True)]
    # Another name for the same host: clients send their token to every port of the host that they know.
    names = ("127.0.0.1", "localhost")
    hub.endpoint, hub.storage = (f"http://{n}:{server.server_port}" for n, server in zip(names, servers, strict=True))
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()

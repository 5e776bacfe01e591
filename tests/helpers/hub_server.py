"""A Hub on 127.0.0.1 for the real client: what `huggingface_hub` asks when it creates, uploads, lists and downloads.

Files lie in a folder; repositories, their commits and branches in memory, where a test can look at them. The client
has to be told by HF_ENDPOINT, and by HF_HUB_DISABLE_XET=1 that files go over plain HTTP, before it is imported.
"""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

USER, TOKEN, DATE = "tester", "hf_of_the_tests", "2026-01-01T00:00:00.000Z"
LARGE = 10_000_000  # bytes above which the Hub wants a file by LFS, whatever its name
BINARY = (".safetensors", ".parquet", ".bin", ".pt", ".arrow", ".png")  # and these, whatever their size


@dataclass(frozen=True)
class File:
    sha256: str  # under which the store has it
    oid: str  # that of git
    size: int
    lfs: bool


@dataclass
class Repo:
    id: str
    kind: str  # model or dataset
    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)  # branches and tags
    tags: list[str] = field(default_factory=list)  # which of them are tags

    def commit(self, branch: str, message: str, files: dict[str, File]) -> str:
        self.messages.append(message)
        sha = hashlib.sha1(f"{self.id} {len(self.commits)} {message}".encode()).hexdigest()
        self.commits[sha], self.refs[branch] = files, sha
        return sha

    def files(self, revision: str = "main") -> dict[str, File]:
        return self.commits[self.refs.get(revision, revision)]


class Refused(HTTPException):
    """An answer that the client turns into an error of its own, by the code in its header."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        given = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}
        super().__init__(status, message, given)


class Hub:
    """`repos` and `collections` by their names, and in `requests` all that was asked; `address` is for HF_ENDPOINT.

    `uploads_left` lets only so many large files through, and then breaks the upload off.
    """

    def __init__(self, folder: Path):
        self.store = folder
        self.repos: dict[str, Repo] = {}  # "models/user/name" or "datasets/user/name"
        self.collections: dict[str, dict[str, Any]] = {}
        self.requests: list[str] = []
        self.uploads_left: int | None = None
        self.address = ""
        repo = "/api/{kinds}/{user}/{name}"
        routes = [
            Route("/api/whoami-v2", self.whoami),
            Route("/uploads-left/{count:int}", self.limit_uploads, methods=["POST"]),
            Route("/api/validate-yaml", self.validate_yaml, methods=["POST"]),
            Route("/api/repos/create", self.create, methods=["POST"]),
            Route("/api/collections", self.create_collection, methods=["POST"]),
            Route("/api/collections/{user}/{slug}", self.collection),
            Route("/api/collections/{user}/{slug}/items", self.add_to_collection, methods=["POST"]),
            Route(repo, self.info),
            Route(repo + "/revision/{revision:path}", self.info),
            Route(repo + "/refs", self.refs),
            Route(repo + "/preupload/{revision}", self.preupload, methods=["POST"]),
            Route(repo + "/commit/{revision}", self.commit, methods=["POST"]),
            Route(repo + "/paths-info/{revision}", self.paths_info, methods=["POST"]),
            Route(repo + "/tree/{revision}", self.tree),
            Route(repo + "/tree/{revision}/{path:path}", self.tree),
            Route(repo + "/branch/{ref:path}", self.make_ref, methods=["POST"]),
            Route(repo + "/tag/{revision}", self.make_ref, methods=["POST"]),
            Route("/objects/{sha256}", self.object, methods=["GET", "PUT"]),
            *(Route(start + "/{user}/{name}.git/info/lfs/objects/batch", self.batch, methods=["POST"])
              for start in ("", "/{kinds}")),
            *(Route(start + "/{user}/{name}/resolve/{revision}/{path:path}", self.resolve)
              for start in ("/{kinds}", "")),
        ]  # fmt: skip
        self.app = Starlette(routes=routes, exception_handlers={HTTPException: self.refuse})

    # --- asking

    async def refuse(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    def signed_in(self, request: Request) -> bool:
        self.requests.append(f"{request.method} {request.url.path}")
        given = request.headers.get("authorization")
        if given not in (None, f"Bearer {TOKEN}"):
            raise Refused(401, "Invalid credentials in Authorization header")
        return given is not None

    def repo(self, request: Request, write: bool = False) -> Repo:
        """The one that the address names; whoever may not read it hears that it is not there."""
        known = self.signed_in(request)
        where = request.path_params
        repo = self.repos.get(f"{where.get('kinds', 'models')}/{where['user']}/{where['name']}")
        if repo is None or (repo.private and not known):
            raise Refused(404 if known else 401, "Repository not found", "RepoNotFound")
        if write and not known:
            raise Refused(401, "Sign in to write")
        return repo

    def sha(self, repo: Repo, revision: str) -> str:
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    async def whoami(self, request: Request) -> Response:
        if not self.signed_in(request):
            raise Refused(401, "Invalid username or password.")
        auth = {"type": "access_token", "accessToken": {"displayName": "tests", "role": "write"}}
        return JSONResponse({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": auth})

    async def info(self, request: Request) -> Response:
        repo = self.repo(request)
        sha = self.sha(repo, request.path_params.get("revision", "main"))
        siblings = [{"rfilename": path, "size": file.size} for path, file in repo.commits[sha].items()]
        known = {"id": repo.id, "sha": sha, "private": repo.private, "lastModified": DATE, "siblings": siblings}
        return JSONResponse({**known, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []})

    async def refs(self, request: Request) -> Response:
        repo = self.repo(request)
        kinds: dict[str, list[dict[str, str]]] = {"branches": [], "converts": [], "tags": []}
        for name, sha in repo.refs.items():
            kinds["tags" if name in repo.tags else "branches"].append({"name": name, "ref": name, "targetCommit": sha})
        return JSONResponse(kinds)

    async def tree(self, request: Request) -> Response:
        repo = self.repo(request)
        files = repo.commits[self.sha(repo, request.path_params["revision"])]
        start = request.path_params.get("path", "").strip("/")
        deep = request.query_params.get("recursive", "").lower() == "true"
        found = entries(files, start, deep)
        if start and not found:
            raise Refused(404, f"{start} does not exist", "EntryNotFound")
        return JSONResponse(found)

    async def paths_info(self, request: Request) -> Response:
        repo = self.repo(request)
        files = repo.commits[self.sha(repo, request.path_params["revision"])]
        asked = parse_qs((await request.body()).decode()).get("paths", [])
        everything = [entry for start in folders(files) for entry in entries(files, start, deep=False)]
        return JSONResponse([entry for entry in everything if entry["path"] in asked])

    async def resolve(self, request: Request) -> Response:
        repo, path = self.repo(request), request.path_params["path"]
        sha = self.sha(repo, request.path_params["revision"])
        headers = {"X-Repo-Commit": sha}
        file = repo.commits[sha].get(path)
        if file is None:
            raise Refused(404, "Entry not found", "EntryNotFound", **headers)
        if file.lfs:
            linked = {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
            # to another host: redirects within one are followed by the client, which then misses these headers
            storage = self.address.replace("127.0.0.1", "localhost")
            return RedirectResponse(f"{storage}/objects/{file.sha256}", 302, {**headers, **linked})
        return FileResponse(self.store / file.sha256, headers={**headers, "ETag": f'"{file.oid}"'})

    # --- writing

    async def limit_uploads(self, request: Request) -> Response:
        self.uploads_left = request.path_params["count"]
        return Response()

    async def validate_yaml(self, request: Request) -> Response:
        self.signed_in(request)
        return JSONResponse({"errors": [], "warnings": []})

    async def create(self, request: Request) -> Response:
        if not self.signed_in(request):
            raise Refused(401, "Sign in to write")
        asked = await request.json()
        kind, user = asked.get("type", "model"), asked["organization"] or USER
        if user != USER:
            raise Refused(403, f"You don't have the rights to create a {kind} under the namespace {user!r}")
        name = f"{user}/{asked['name']}"
        url = f"{self.address}/{'datasets/' if kind == 'dataset' else ''}{name}"
        if (key := f"{kind}s/{name}") in self.repos:
            return JSONResponse({"error": "You already created this repo", "url": url}, 409)
        private = asked.get("visibility") == "private" or asked.get("private", False)
        self.repos[key] = Repo(name, kind, private)
        self.repos[key].commit("main", "initial commit", {})
        return JSONResponse({"url": url, "name": name})

    async def preupload(self, request: Request) -> Response:
        repo = self.repo(request, write=True)
        there = repo.commits[self.sha(repo, request.path_params["revision"])]
        answers = []
        for asked in (await request.json())["files"]:
            path = asked["path"]
            large = asked["size"] > LARGE or path.endswith(BINARY)
            answer = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if path in there:  # what the client compares with its own file, to leave out what has not changed
                answer["oid"] = there[path].sha256 if there[path].lfs else there[path].oid
            answers.append(answer)
        return JSONResponse({"files": answers})

    async def batch(self, request: Request) -> Response:
        self.repo(request, write=True)
        objects = []
        for asked in (await request.json())["objects"]:
            upload = {"upload": {"href": f"{self.address}/objects/{asked['oid']}"}}
            objects.append(asked if (self.store / asked["oid"]).exists() else {**asked, "actions": upload})
        return JSONResponse({"transfer": "basic", "objects": objects})

    async def object(self, request: Request) -> Response:
        """The storage behind the Hub, which signs its addresses and so asks for no token."""
        name = request.path_params["sha256"]
        self.requests.append(f"{request.method} {request.url.path} {request.headers.get('range', '')}".rstrip())
        if request.method != "PUT":
            return FileResponse(self.store / name, headers={"ETag": f'"{name}"'})
        content = await request.body()
        if self.uploads_left is not None:
            if self.uploads_left == 0:
                raise Refused(400, "broken off, as the test asked")
            self.uploads_left -= 1
        if hashlib.sha256(content).hexdigest() != name:
            raise Refused(400, "not the file that was announced")
        (self.store / name).write_bytes(content)
        return Response()

    async def commit(self, request: Request) -> Response:
        repo, branch = self.repo(request, write=True), request.path_params["revision"]
        files, message = dict(repo.commits[self.sha(repo, branch)]), ""
        for line in (await request.body()).splitlines():
            key, value = (operation := json.loads(line))["key"], operation["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = self.keep(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if not (stored := self.store / value["oid"]).exists():
                    raise Refused(400, f"{value['path']} was not uploaded")
                pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{value['oid']}\n".encode()
                files[value["path"]] = File(value["oid"], git_oid(pointer), stored.stat().st_size, lfs=True)
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                files = {path: file for path, file in files.items() if not path.startswith(value["path"])}
        sha = repo.commit(branch, message, files)
        where = f"{self.address}/{repo.id}/commit/{sha}"
        return JSONResponse({"success": True, "commitOid": sha, "commitUrl": where, "hookOutput": ""})

    def keep(self, content: bytes) -> File:
        name = hashlib.sha256(content).hexdigest()
        (self.store / name).write_bytes(content)
        return File(name, git_oid(content), len(content), lfs=False)

    async def make_ref(self, request: Request) -> Response:
        repo, asked = self.repo(request, write=True), await request.json()
        name = request.path_params.get("ref") or asked["tag"]
        start = request.path_params.get("revision") or asked.get("startingPoint", "main")
        if name in repo.refs:
            raise Refused(409, f"Reference already exists: {name}")
        repo.refs[name] = self.sha(repo, start)
        repo.tags += [name] if "tag" in asked else []
        return JSONResponse({}, 201)

    # --- collections

    async def create_collection(self, request: Request) -> Response:
        if not self.signed_in(request):
            raise Refused(401, "Sign in to write")
        asked = await request.json()
        slug = f"{asked['namespace']}/{asked['title'].lower().replace(' ', '-')}-0123456789abcdef01234567"
        if slug in self.collections:
            return JSONResponse({"error": "exists", "slug": slug}, 409)
        owner = {"_id": "0", "name": USER, "fullname": USER, "type": "user", "isHf": False, "isPro": False,
                 "avatarUrl": ""}  # fmt: skip
        self.collections[slug] = {
            "slug": slug, "title": asked["title"], "owner": owner, "items": [], "lastUpdated": DATE, "position": 0,
            "private": asked["private"], "theme": "blue", "upvotes": 0, "isUpvotedByUser": False,
        }  # fmt: skip
        return JSONResponse(self.collections[slug])

    async def collection(self, request: Request) -> Response:
        self.signed_in(request)
        slug = "{user}/{slug}".format(**request.path_params)
        if slug not in self.collections:
            raise Refused(404, "Collection not found")
        return JSONResponse(self.collections[slug])

    async def add_to_collection(self, request: Request) -> Response:
        there = json.loads((await self.collection(request)).body)
        items, item = self.collections[there["slug"]]["items"], (await request.json())["item"]
        if any(other["id"] == item["id"] for other in items):
            raise Refused(409, "already in this collection")
        items.append({"_id": str(len(items)), "position": len(items), **item})
        return JSONResponse(self.collections[there["slug"]])


def git_oid(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def folders(files: dict[str, File]) -> set[str]:
    parents = {str(parent) for path in files for parent in Path(path).parents}
    return {"" if folder == "." else folder for folder in parents}


def entries(files: dict[str, File], start: str, deep: bool) -> list[dict[str, Any]]:
    """Files and folders below `start`, all of them or its own."""
    found: list[dict[str, Any]] = []
    for path, file in files.items():
        entry: dict[str, Any] = {"type": "file", "path": path, "size": file.size, "oid": file.oid}
        if file.lfs:
            entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 130}
        found.append(entry)
    found += [{"type": "directory", "path": folder, "oid": "0" * 40, "size": 0} for folder in folders(files) if folder]
    found = [entry for entry in found if entry["path"].startswith(f"{start}/" if start else "")]
    return found if deep else [entry for entry in found if "/" not in entry["path"].removeprefix(start).strip("/")]


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Hub]:
    """Runs a Hub in a thread, on a port that is free, as long as the context lasts."""
    hub = Hub(folder)
    server = uvicorn.Server(uvicorn.Config(hub.app, host="127.0.0.1", port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("The Hub for the tests did not start.")
        thread.join(0.01)
    hub.address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield hub
    finally:
        server.should_exit = True
        thread.join()

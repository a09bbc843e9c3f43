"""The JSON routes: who am I, repositories, listings, branches, tags, commits."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from tests.hub_server.store import (
    LFS_FROM_BYTES,
    LFS_SUFFIXES,
    Entry,
    Repository,
    git_sha1,
    lfs_entry,
)

if TYPE_CHECKING:
    from tests.hub_server.http import Handler


def whoami(http: Handler) -> None:
    if http.user is None:
        http.error(401, "", "Invalid username or password.")
        return
    token = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
    http.answer(document={"type": "user", "name": http.user, "orgs": [], "auth": token})


def create_repository(http: Handler) -> None:
    asked = http.body_json()
    if http.user is None:
        http.error(401, "", "Invalid username or password.")
        return
    name = f"{asked.get('organization') or http.user}/{asked['name']}"
    document = {"url": f"{http.server.url}/{name}", "name": name, "id": name}
    store = http.server.store
    with store.lock:
        if name in store.repositories:
            http.answer(409, {"error": "You already created this model repo", **document})
            return
        private = asked.get("private") or asked.get("visibility") == "private"
        store.create(name, private=bool(private))
    http.answer(document=document)


def information(http: Handler, name: str, revision: str | None = None) -> None:
    repository = http.repository(name)
    sha = repository and http.commit(repository, revision or "main")
    if repository and sha:
        http.answer(
            document={
                "_id": "0",
                "id": name,
                "modelId": name,
                "sha": sha,
                "private": repository.private,
                "gated": "auto" if repository.gated else False,
                "tags": [],
                "siblings": [{"rfilename": path} for path in repository.commits[sha].tree],
            }
        )


def tree(http: Handler, name: str, revision: str) -> None:
    repository = http.repository(name)
    sha = repository and http.commit(repository, revision)
    if repository and sha:
        entries = sorted(repository.commits[sha].tree.items())
        size = http.server.faults.list_page
        start = int(parse_qs(http.query).get("cursor", ["0"])[0])
        page = [entry.to_json(path) for path, entry in entries[start : start + size]]
        host = http.server.faults.lists_go_on_at or http.server.url
        address = f"{host}/api/models/{name}/tree/{revision}?cursor={start + size}"
        more = {"Link": f'<{address}>; rel="next"'} if start + size < len(entries) else {}
        http.answer(document=page, headers=more)


def paths_info(http: Handler, name: str, revision: str) -> None:
    paths = parse_qs(http.body().decode()).get("paths", [])
    repository = http.repository(name)
    sha = repository and http.commit(repository, revision)
    if repository and sha:
        files = repository.commits[sha].tree
        http.answer(document=[files[path].to_json(path) for path in paths if path in files])


def references(http: Handler, name: str) -> None:
    repository = http.repository(name)
    if repository:
        branches = {k: v for k, v in repository.branches.items() if not k.startswith("refs/pr/")}
        http.answer(
            document={
                "branches": _refs(branches, "refs/heads/"),
                "tags": _refs(repository.tags, "refs/tags/"),
                "converts": [],
                "pullRequests": [],
            }
        )


def _refs(refs: dict[str, str], prefix: str) -> list[dict]:
    return [{"name": k, "ref": prefix + k, "targetCommit": sha} for k, sha in refs.items()]


def create_branch(http: Handler, name: str, branch: str) -> None:
    asked = http.body_json()
    repository = http.repository(name)
    sha = repository and http.commit(repository, asked.get("startingPoint", "main"))
    if repository and sha:
        if branch in repository.branches:
            http.error(409, "", "Reference already exists")
            return
        repository.branches[branch] = sha
        http.answer()


def create_tag(http: Handler, name: str, revision: str) -> None:
    asked = http.body_json()
    repository = http.repository(name)
    sha = repository and http.commit(repository, revision)
    if repository and sha:
        if asked["tag"] in repository.tags:
            http.error(409, "", "Tag reference exists already")
            return
        repository.tags[asked["tag"]] = sha
        http.answer()


def preupload(http: Handler, name: str, revision: str) -> None:
    asked = http.body_json()["files"]
    repository = http.repository(name)
    sha = repository and http.commit(repository, revision)
    if repository and sha:
        files = repository.commits[sha].tree
        http.answer(document={"files": [_upload_mode(file, files) for file in asked]})


def _upload_mode(file: dict, files: dict[str, Entry]) -> dict:
    path = file["path"]
    in_lfs = path.endswith(LFS_SUFFIXES) or file["size"] >= LFS_FROM_BYTES
    there = {"oid": files[path].blob} if path in files else {}
    mode = "lfs" if in_lfs else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, **there}


def commit(http: Handler, name: str, revision: str) -> None:
    lines = [json.loads(line) for line in http.body().splitlines() if line.strip()]
    repository = http.repository(name)
    sha = repository and http.commit(repository, revision)
    if not repository or not sha:
        return
    if http.user is None:
        http.error(403, "", "You need write access")
        return
    header = next(line["value"] for line in lines if line["key"] == "header")
    with http.server.store.lock:
        if header.get("parentCommit") not in (None, repository.resolve(revision)):
            http.error(412, "", "A commit has happened since. Please refresh and try again.")
            return
        try:
            files = _changed(http, dict(repository.tree(revision)), lines)
        except FileNotFoundError as missing:
            http.error(400, "", f"LFS object {missing} was not uploaded")
            return
        document = _commit(http, repository, revision, files, header["summary"])
    http.answer(document=document)


def _commit(
    http: Handler, repository: Repository, revision: str, files: dict[str, Entry], title: str
) -> dict:
    from tests.hub_server.pulls import open_pull

    document = {}
    if "create_pr=1" in http.query:
        pull = open_pull(repository, title, http.user or "")
        revision = f"refs/pr/{pull.num}"
        url = f"{http.server.url}/{repository.name}/discussions/{pull.num}"
        document = {"pullRequestUrl": url}
    sha = repository.commit(revision, files, title)
    url = f"{http.server.url}/{repository.name}/commit/{sha}"
    return {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": "", **document}


def _changed(http: Handler, files: dict[str, Entry], lines: list[dict]) -> dict[str, Entry]:
    store, cas = http.server.store, http.server.cas
    for line in lines:
        value = line["value"]
        if line["key"] == "file":
            data = base64.b64decode(value["content"])
            store.path(git_sha1(data)).write_bytes(data)
            files[value["path"]] = Entry(len(data), git_sha1(data))
        elif line["key"] == "lfsFile":
            xet = cas.file_of(value["oid"]) if cas else None
            if xet is None and not store.path(value["oid"]).exists():
                raise FileNotFoundError(value["oid"])
            files[value["path"]] = lfs_entry(value["oid"], value["size"], xet)
        elif line["key"] == "deletedFile":
            del files[value["path"]]
    return files


def accept(http: Handler) -> None:
    http.body()
    http.answer(document={"errors": [], "warnings": []})


_NAME = r"([^/]+/[^/]+)"
_REVISION = r"(refs/pr/\d+|.+?)"
ROUTES = (
    (r"GET /api/whoami-v2", whoami),
    (r"POST /api/repos/create", create_repository),
    (r"(?:POST|GET|HEAD) /api/(?:telemetry|validate-yaml|agent-harnesses).*", accept),
    (rf"(?:GET|HEAD) /api/models/{_NAME}/revision/(.+)", information),
    (rf"(?:GET|HEAD) /api/models/{_NAME}/tree/{_REVISION}/?", tree),
    (rf"POST /api/models/{_NAME}/paths-info/(.+)", paths_info),
    (rf"POST /api/models/{_NAME}/preupload/(.+)", preupload),
    (rf"POST /api/models/{_NAME}/commit/(.+)", commit),
    (rf"POST /api/models/{_NAME}/branch/(.+)", create_branch),
    (rf"POST /api/models/{_NAME}/tag/(.+)", create_tag),
    (rf"(?:GET|HEAD) /api/models/{_NAME}/refs", references),
    (rf"(?:GET|HEAD) /api/models/{_NAME}", information),
)

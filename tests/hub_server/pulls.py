"""Pull requests: opened by a commit, listed, merged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.hub_server.store import PullRequest, Repository

if TYPE_CHECKING:
    from tests.hub_server.http import Handler

_WHEN = "2026-01-01T00:00:00.000Z"


def open_pull(repository: Repository, title: str, author: str) -> PullRequest:
    pull = PullRequest(len(repository.pulls) + 1, title, author, repository.head)
    repository.pulls.append(pull)
    repository.branches[f"refs/pr/{pull.num}"] = repository.head
    return pull


def listing(http: Handler, name: str) -> None:
    repository = http.repository(name)
    if repository:
        pulls = [_document(repository, pull) for pull in repository.pulls]
        http.answer(document={"discussions": pulls, "count": len(pulls), "start": 0})


def merge(http: Handler, name: str, num: str) -> None:
    http.body()
    repository = http.repository(name)
    if not repository:
        return
    pull = repository.pulls[int(num) - 1]
    if pull.status != "open":
        http.error(409, "", f"This pull request is {pull.status}")
        return
    with http.server.store.lock:
        repository.merge(pull)
    http.answer(document={})


def _document(repository: Repository, pull: PullRequest) -> dict:
    return {
        "num": pull.num,
        "title": pull.title,
        "status": pull.status,
        "isPullRequest": True,
        "author": {"name": pull.author},
        "createdAt": _WHEN,
        "repo": {"name": repository.name, "type": "model"},
        "changes": {"base": "refs/heads/main"},
    }


_NAME = r"([^/]+/[^/]+)"
ROUTES = (
    (rf"GET /api/models/{_NAME}/discussions", listing),
    (rf"POST /api/models/{_NAME}/discussions/(\d+)/merge", merge),
)

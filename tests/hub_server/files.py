"""Files: /org/name/resolve/revision/path, whole and by range."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tests.hub_server import xet
from tests.hub_server.store import Entry

if TYPE_CHECKING:
    from tests.hub_server.http import Handler

_PIECE = 1 << 18


def resolve(http: Handler, name: str, revision: str, path: str) -> None:
    repository = http.repository(name)
    if repository is None:
        return
    if repository.gated and http.user not in repository.granted:
        http.error(403, "GatedRepo", f"Access to model {name} is restricted")
        return
    sha = http.commit(repository, revision)
    if sha is None:
        return
    entry = repository.commits[sha].tree.get(path)
    if entry is None:
        http.error(404, "EntryNotFound", "Entry not found")
        return
    _send(http, name, sha, entry)


def _send(http: Handler, name: str, sha: str, entry: Entry) -> None:
    headers = {
        "X-Repo-Commit": sha,
        "Accept-Ranges": "bytes",
        "ETag": f'"{entry.blob}"',
        "Content-Type": "application/octet-stream",
    }
    if entry.sha256:
        headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": entry.size}
    if entry.xet:
        token = f"{http.server.url}/api/models/{name}/xet-read-token/{sha}"
        headers |= {"X-Xet-Hash": entry.xet, "Link": f'<{token}>; rel="xet-auth"'}
    stored = http.server.store.path(entry.blob)
    size = stored.stat().st_size if stored.exists() else entry.size
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", http.headers.get("Range", ""))
    start, end, status = 0, size, 200
    if asked and http.command == "GET" and not (http.fault and http.fault.whole):
        start = int(asked[1])
        if start >= size:
            http.answer(416, headers={"Content-Range": f"bytes */{size}"})
            return
        end = min(int(asked[2]) + 1, size) if asked[2] else size
        status = 206
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    http.send_response(status)
    for header, value in {**headers, "Content-Length": end - start}.items():
        http.send_header(header, str(value))
    http.end_headers()
    if http.command == "GET":
        _send_body(http, entry, start, end)


def _send_body(http: Handler, entry: Entry, start: int, end: int) -> None:
    fault = http.fault
    stop = end if fault is None or fault.cut is None else min(end, start + fault.cut)
    path = http.server.store.path(entry.blob)
    if not path.exists() and http.server.cas is not None and entry.xet:
        xet.materialise(entry.xet, entry.size, path, endpoint=http.server.url)
    with path.open("rb") as file:
        file.seek(start)
        at = start
        while at < stop:
            piece = bytearray(file.read(min(_PIECE, stop - at)))
            if fault and fault.flip is not None and at <= fault.flip < at + len(piece):
                piece[fault.flip - at] ^= 1
            http.wfile.write(piece)
            http.request_log.sent += len(piece)
            at += len(piece)
    if fault is not None and fault.cut is not None:
        http.wfile.flush()
        if fault.hang is not None:
            fault.hang.wait(30)
        http.close_connection = True


ROUTES = ((r"(?:GET|HEAD) /([^/]+/[^/]+)/resolve/(refs/pr/\d+|[^/]+)/(.+)", resolve),)

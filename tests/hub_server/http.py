"""The wire: one thread for each connection, routes by pattern, faults before routes."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tests.hub_server import api, files, lfs, pulls, xet
from tests.hub_server.faults import Fault, Faults, Request
from tests.hub_server.store import Repository, Store

ROUTES: tuple[tuple[str, Callable[..., None]], ...] = (
    *xet.ROUTES,
    *lfs.ROUTES,
    *pulls.ROUTES,
    *api.ROUTES,
    *files.ROUTES,
)


class HubServer(ThreadingHTTPServer):
    """A running Hub; a second one over the same store is another host with the same files."""

    daemon_threads = True

    def __init__(self, store: Store, *, with_xet: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.store = store
        self.cas = xet.Cas(store.folder / "cas") if with_xet else None
        self.faults = Faults()
        self.requests: list[Request] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fault(self, pattern: str, **what: object) -> None:
        self.faults.add(Fault(pattern, **what))

    def asked(self, pattern: str) -> list[Request]:
        """Return the requests whose "METHOD /path" matches."""
        return [r for r in self.requests if re.search(pattern, f"{r.method} {r.path}")]

    def sent(self, pattern: str) -> int:
        """Return how many bytes of files such requests were answered with."""
        return sum(request.sent for request in self.asked(pattern))

    def reset(self) -> None:
        self.faults.clear()
        self.requests.clear()
        self.store.clear()

    def handle_error(self, request, client_address) -> None:
        """Say nothing where a client has left: some tests kill theirs."""


@contextmanager
def serve(folder: Path, *, with_xet: bool = False) -> Generator[HubServer]:
    server = HubServer(Store(folder), with_xet=with_xet)
    with running(server):
        yield server


@contextmanager
def running(server: HubServer) -> Generator[HubServer]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for the client's kernel
    server: HubServer

    def log_message(self, *_: object) -> None:
        """Keep quiet; `HubServer.requests` is the log."""

    def handle_any(self) -> None:
        self.fault: Fault | None = None
        url = urlsplit(self.path)
        self.query = url.query
        path = unquote(url.path)
        token = self.headers.get("Authorization", "")
        self.request_log = Request(self.command, path, self.headers.get("Range", ""), token)
        self.server.requests.append(self.request_log)
        self.fault = self.server.faults.take(f"{self.command} {path}")
        if self.fault and self._answer_fault(self.fault):
            return
        known = token.removeprefix("Bearer ") in self.server.store.users
        if token and not known and not path.startswith("/_cas/"):
            self.body()
            self.error(401, "", "Invalid credentials in Authorization header")
            return
        for pattern, answer in ROUTES:
            found = re.fullmatch(pattern, f"{self.command} {path}")
            if found:
                answer(self, *found.groups())
                return
        self.body()
        self.error(404, "", f"no such route: {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815

    @property
    def user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return self.server.store.users.get(token)

    def repository(self, name: str) -> Repository | None:
        """Return a repository that this user may see, or answer as the Hub does."""
        found = self.server.store.repositories.get(name)
        if found is None or (found.private and self.user is None):
            self.body()
            self.error(404 if self.user else 401, "RepoNotFound", "Repository not found")
            return None
        return found

    def commit(self, repository: Repository, revision: str) -> str | None:
        sha = repository.resolve(unquote(revision))
        if sha is None:
            self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def body_json(self) -> dict:
        return json.loads(self.body() or b"{}")

    def answer(
        self,
        status: int = 200,
        document: object = None,
        *,
        headers: Mapping[str, object] | None = None,
        data: bytes | None = None,
        kind: str = "application/json",
    ) -> None:
        if data is None:
            data = b"" if document is None else json.dumps(document).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": len(data),
            **(headers or {}),
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def error(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.answer(status, {"error": message}, headers=headers)

    def _answer_fault(self, fault: Fault) -> bool:
        """Answer with the fault, unless it is one of the body of a file."""
        if fault.redirect:
            self.body()
            self.answer(302, headers={"Location": fault.redirect + self.path})
        elif fault.status is not None:
            self.body()
            self.answer(fault.status, {"error": "injected"}, headers=fault.headers)
        elif fault.body is not None:
            self.body()
            self.answer(data=fault.body, kind="text/html")
        else:
            return False
        return True

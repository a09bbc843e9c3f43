"""The Hub as this package uses it: pin a revision to a commit, list it, stream a file's bytes.

The API calls are huggingface_hub's, and so are the session (proxies, HF_HUB_OFFLINE) and the
token. Streaming is done here because a file must go on from where it was cut; streaming and
listing, whose next page is wherever the last one says, because the token must stay with the host
that it is for.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import cast
from urllib.parse import quote, urljoin, urlsplit

import httpx2
from huggingface_hub import HfApi, constants, get_session, get_token, hf_hub_url

from kimi_convert import __version__
from kimi_convert.checkpoints.messages import sized
from kimi_convert.errors import HubError, VerificationError
from kimi_convert.hub.failures import RetryPolicy, StatusError, call
from kimi_convert.hub.listing import RemoteFile, files_of, senseless
from kimi_convert.hub.reference import Reference

DEFAULT_POLICY = RetryPolicy()
_LIBRARY = "kimi-convert"
_MAX_REDIRECTS = 5
_MAX_PAGES = 1000  # of 1000 entries each
_OK = 200
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_TIMEOUT = httpx2.Timeout(10.0, read=constants.HF_HUB_DOWNLOAD_TIMEOUT)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All files of one commit."""

    reference: Reference
    commit: str
    files: Mapping[str, RemoteFile]

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.reference.repository}@{self.commit[:12]}"


@dataclass(frozen=True, slots=True)
class Remote:
    """A Hub: the one of HF_ENDPOINT, or huggingface.co."""

    endpoint: str
    policy: RetryPolicy = DEFAULT_POLICY

    @property
    def api(self) -> HfApi:
        """Return huggingface_hub's client; the token is the environment's or the stored one."""
        return HfApi(endpoint=self.endpoint, library_name=_LIBRARY, library_version=__version__)

    def pin(self, reference: Reference) -> Snapshot:
        """Look up which commit a revision is now, and what it holds.

        Raises:
            HubError: no network, no such repository or revision, or no right to read it.
            InputError: the listing does not make sense.
        """
        repository, revision = reference.repository, reference.revision
        what = f"{repository} at {revision}"
        info = call(
            lambda: self.api.repo_info(repository, revision=revision),
            what=what,
            policy=self.policy,
        )
        commit = info.sha
        if not isinstance(commit, str) or not constants.REGEX_COMMIT_OID.fullmatch(commit):
            raise HubError("the Hub names no commit", where=what, hint="Check HF_ENDPOINT.")
        return Snapshot(reference, commit, self.listing(repository, commit))

    def listing(self, repository: str, revision: str) -> dict[str, RemoteFile]:
        """Return the files of a revision by path.

        Raises:
            HubError: see `pin`.
            InputError: a size or a hash in it does not make sense.
        """
        what = f"{repository} at {revision}"
        path = f"/api/models/{repository}/tree/{quote(revision, safe='')}?recursive=true"
        url: str | None = self.endpoint + path
        entries: list[object] = []
        seen: set[str] = set()
        while url is not None:
            if url in seen or len(seen) == _MAX_PAGES:
                raise HubError("the Hub's list has no end", where=what, hint="Check HF_ENDPOINT.")
            seen.add(url)
            page, url = call(partial(self._page, url, what), what=what, policy=self.policy)
            entries += page
        return files_of(entries, where=repository)

    def _page(self, url: str, what: str) -> tuple[list[object], str | None]:
        """Return one page of a list, and where the next one is."""
        with self._follow(url, self._headers(url), what=what) as response:
            if response.status_code != _OK:
                raise StatusError(response)
            data = response.read()
            next_page = response.links.get("next", {}).get("url")
        try:
            found: object = json.loads(data)
        except ValueError as error:
            raise senseless(what, error) from error
        if not isinstance(found, list):
            raise senseless(what, type(found).__name__)
        next_url = urljoin(url, next_page) if next_page else None
        if next_url and not _as_safe(next_url, url):
            raise HubError(
                "the Hub's list goes on at an address that is not safe",
                where=what,
                expected="https, or as HF_ENDPOINT",
                found=ascii(next_url)[:120],
                hint="Check HF_ENDPOINT and the proxy.",
            )
        return cast("list[object]", found), next_url

    @contextmanager
    def stream(
        self, snapshot: Snapshot, file: RemoteFile, *, start: int = 0, stop: int | None = None
    ) -> Generator[httpx2.Response]:
        """Ask for a file's bytes from `start` on; the answer has been checked to be these.

        Raises:
            StatusError: the answer is an error.
            HubError: it is a web page, or leads in circles.
            VerificationError: it is of another size than the repository lists.
        """
        url = hf_hub_url(
            snapshot.reference.repository,
            file.path,
            revision=snapshot.commit,
            endpoint=self.endpoint,
        )
        # Offsets and hashes are of the plain bytes: nothing may compress them.
        headers = self._headers(url) | {"Accept-Encoding": "identity"}
        if start or stop is not None:
            headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        with self._follow(url, headers, what=f"{snapshot.name}: {file.path}") as response:
            _check(response, file, start=start, stop=stop, where=f"{snapshot.name}: {file.path}")
            yield response

    def _headers(self, url: str) -> dict[str, str]:
        """Return what is sent to an address; the token to the Hub's own host alone."""
        headers = {"User-Agent": f"{_LIBRARY}/{__version__}"}
        token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
        if token and _origin(url) == _origin(self.endpoint):
            headers["Authorization"] = f"Bearer {token}"
        return headers

    @contextmanager
    def _follow(
        self, url: str, headers: dict[str, str], *, what: str
    ) -> Generator[httpx2.Response]:
        """Send a GET and follow redirects; the token goes to the Hub's own host alone."""
        for _ in range(_MAX_REDIRECTS):
            with get_session().stream(
                "GET", url, headers=headers, follow_redirects=False, timeout=_TIMEOUT
            ) as response:
                if not response.has_redirect_location:
                    yield response
                    return
                target = urljoin(url, response.headers["Location"])
            if _origin(target) != _origin(url):
                headers = {k: v for k, v in headers.items() if k.lower() != "authorization"}
            if not _as_safe(target, url):
                break
            url = target
        raise HubError(
            "the Hub sends from one address to the next",
            where=what,
            expected=f"at most {_MAX_REDIRECTS} redirects, none from https to http",
            hint="Check HF_ENDPOINT and the proxy.",
        )


def connect() -> Remote:
    """Return the Hub that HF_ENDPOINT names; nothing is sent yet.

    Raises:
        HubError: HF_ENDPOINT is not an address.
    """
    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise HubError(
            "HF_ENDPOINT is not the address of a Hub", expected="such as https://huggingface.co"
        )
    return Remote(endpoint, DEFAULT_POLICY)


def _check(
    response: httpx2.Response, file: RemoteFile, *, start: int, stop: int | None, where: str
) -> None:
    """Check that an answer is the file, or the asked part of it, before a byte is used."""
    if response.status_code not in (200, 206):
        raise StatusError(response)
    kind = response.headers.get("Content-Type", "")
    if kind.startswith("text/html") and not file.path.endswith((".html", ".htm")):
        raise HubError(
            "a web page came instead of the file",
            where=where,
            found=kind,
            hint="A proxy or a login page is in between: check the network and HF_ENDPOINT.",
        )
    size: int | None = None
    if response.status_code == 206:
        found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if found is None or int(found[1]) != start:
            raise HubError(
                "the server sent another part of the file than was asked for",
                where=where,
                expected=f"bytes from {start} on",
                found=response.headers.get("Content-Range", "")[:80],
                hint="Check HF_ENDPOINT and the proxy.",
            )
        size = int(found[3])
    elif response.headers.get("Content-Length", "").isdecimal():
        size = int(response.headers["Content-Length"])
    if size is not None and size != file.nbytes:
        raise VerificationError(
            "file has another size than the repository lists",
            where=where,
            expected=sized(file.nbytes),
            found=sized(size),
            hint="Check HF_ENDPOINT and the proxy, and run again.",
        )


def _as_safe(target: str, url: str) -> bool:
    """Tell whether an address that was named by another is at least as safe."""
    return _origin(target)[0] in ("https", _origin(url)[0])


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    default = {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or default

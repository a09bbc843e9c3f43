"""Xet uploads: a content-addressed store of chunks, as hf_xet speaks to it.

A shard (not a file of weights: xet's word) says of which chunks of which xorbs a file is made.
See xet-core for the formats.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tests.hub_server.http import Handler

_CHUNK_HEADER = 8
_ROW = 48  # bytes of every record of a shard
_END = b"\xff" * 32
_WITH_VERIFICATION, _WITH_METADATA = 0x80000000, 0x40000000


class Cas:
    """Xorbs on disk, and which file is made of what."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._terms: dict[str, list[tuple[str, int, int]]] = {}  # file -> (xorb, first, past last)
        self._file_of: dict[str, str] = {}  # SHA-256 -> file
        folder.mkdir(parents=True, exist_ok=True)

    def file_of(self, sha256: str) -> str | None:
        return self._file_of.get(sha256)

    def add_shard(self, data: bytes) -> None:
        at = _ROW
        while data[at : at + 32] != _END:
            file = _hex(data[at : at + 32])
            flags, count = _u32(data, at + 32), _u32(data, at + 36)
            rows = [data[at + _ROW * (1 + k) :][:_ROW] for k in range(count)]
            self._terms[file] = [(_hex(r[:32]), _u32(r, 40), _u32(r, 44)) for r in rows]
            at += _ROW * (1 + count * (2 if flags & _WITH_VERIFICATION else 1))
            if flags & _WITH_METADATA:
                self._file_of[_hex(data[at : at + 32])] = file
                at += _ROW

    def terms(self, file: str) -> list[tuple[str, int, int]] | None:
        return self._terms.get(file)

    def chunks(self, xorb: str, past_last: int) -> list[Chunk]:
        """Return where the first chunks of a xorb lie and how long they are unpacked."""
        data, at, found = (self.folder / xorb).read_bytes(), 0, []
        for _ in range(past_last):
            end = at + _CHUNK_HEADER + int.from_bytes(data[at + 1 : at + 4], "little")
            found.append(Chunk(at, end, int.from_bytes(data[at + 5 : at + 8], "little")))
            at = end
        return found


class Chunk(NamedTuple):
    """One chunk of a xorb: its bytes there, its header included, and its size unpacked."""

    start: int
    end: int
    unpacked: int


def materialise(file: str, size: int, path: Path, *, endpoint: str) -> None:
    """Write a file from its chunks, which only hf_xet can unpack."""
    import hf_xet

    until = int(time.time()) + 3600
    session = hf_xet.XetSession()
    with session.new_file_download_group(
        endpoint=f"{endpoint}/_cas", token="xet", token_expiry_unix_secs=until
    ) as group:
        group.start_download_file(hf_xet.XetFileInfo(file, size), str(path))


def reconstruction(http: Handler, file: str) -> None:
    """Say which chunks make up a file, or a range of it, and where to fetch them."""
    cas = http.server.cas
    terms = cas.terms(file)
    if terms is None:
        http.error(404, "", "no such file")
        return
    asked = re.fullmatch(r"bytes=(\d+)-(\d+)", http.headers.get("Range", ""))
    first, past_last = (int(asked[1]), int(asked[2]) + 1) if asked else (0, 1 << 62)
    at, skipped, parts, fetch = 0, None, [], {}
    for xorb, begin, end in terms:
        chunks, wanted = cas.chunks(xorb, end), []
        for number in range(begin, end):
            if at + chunks[number].unpacked > first and at < past_last:
                wanted.append(number)
                skipped = first - at if skipped is None else skipped
            at += chunks[number].unpacked
        if wanted:
            span = {"start": wanted[0], "end": wanted[-1] + 1}
            unpacked = sum(chunks[number].unpacked for number in wanted)
            parts.append({"hash": xorb, "unpacked_length": unpacked, "range": span})
            place = {"start": chunks[wanted[0]].start, "end": chunks[wanted[-1]].end - 1}
            url = f"{http.server.url}/_cas/raw/{xorb}"
            fetch.setdefault(xorb, []).append({"range": span, "url": url, "url_range": place})
    if first >= at > 0:
        http.answer(416, {})
        return
    http.answer(
        document={"offset_into_first_range": skipped or 0, "terms": parts, "fetch_info": fetch}
    )


def raw(http: Handler, xorb: str) -> None:
    data = (http.server.cas.folder / xorb).read_bytes()
    asked = re.fullmatch(r"bytes=(\d+)-(\d+)", http.headers.get("Range", ""))
    if not asked:
        http.answer(data=data)
        return
    first, last = int(asked[1]), int(asked[2])
    headers = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
    http.answer(206, data=data[first : last + 1], headers=headers)


def token(http: Handler, _name: str, _kind: str, _revision: str) -> None:
    if http.server.cas is None:
        http.error(404, "", "xet is off")
        return
    until = int(time.time()) + 3600
    headers = {
        "X-Xet-Cas-Url": f"{http.server.url}/_cas",
        "X-Xet-Access-Token": "xet",
        "X-Xet-Token-Expiration": until,
    }
    document = {"casUrl": f"{http.server.url}/_cas", "accessToken": "xet", "exp": until}
    http.answer(document=document, headers=headers)


def put_xorb(http: Handler, xorb: str) -> None:
    (http.server.cas.folder / xorb).write_bytes(http.body())
    http.answer(document={"was_inserted": True})


def put_shard(http: Handler) -> None:
    with http.server.store.lock:
        http.server.cas.add_shard(http.body())
    http.answer(document={"result": 1})


def _hex(digest: bytes) -> str:
    """Return a hash as xet writes it: four little-endian words."""
    return "".join(f"{int.from_bytes(digest[k : k + 8], 'little'):016x}" for k in range(0, 32, 8))


def _u32(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "little")


ROUTES = (
    (r"GET /api/models/([^/]+/[^/]+)/xet-(read|write)-token/(.+)", token),
    (r"POST /_cas/v1/xorbs/default/(\w+)", put_xorb),
    (r"POST /_cas/v1/shards", put_shard),
    (r"GET /_cas/v1/reconstructions/(\w+)", reconstruction),
    (r"GET /_cas/raw/(\w+)", raw),
)

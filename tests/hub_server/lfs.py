"""LFS uploads: a batch says where to, then one PUT, or several parts and a completion."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.hub_server.http import Handler

PART_BYTES = 16 << 20


def batch(http: Handler, _name: str) -> None:
    objects = [
        _where_to(http, asked["oid"], asked["size"]) for asked in http.body_json()["objects"]
    ]
    http.answer(document={"transfer": "basic", "objects": objects})


def _where_to(http: Handler, oid: str, size: int) -> dict:
    document = {"oid": oid, "size": size}
    if http.server.store.path(oid).exists():
        return document  # nothing to upload
    base = f"{http.server.url}/_lfs/{oid}"
    upload = {"href": base, "header": {}}
    if size > PART_BYTES:
        parts = range(1, -(-size // PART_BYTES) + 1)
        header = {"chunk_size": str(PART_BYTES), **{str(n): f"{base}/part/{n}" for n in parts}}
        upload = {"href": f"{base}/complete", "header": header}
    verify = {"href": f"{base}/verify", "header": {}}
    return {**document, "actions": {"upload": upload, "verify": verify}}


def put(http: Handler, oid: str) -> None:
    _keep(http, oid, http.body())


def put_part(http: Handler, oid: str, number: str) -> None:
    data = http.body()
    http.server.store.path(f"{oid}.part{number}").write_bytes(data)
    http.answer(headers={"ETag": f'"{hashlib.md5(data).hexdigest()}"'})


def complete(http: Handler, oid: str) -> None:
    numbers = [part["partNumber"] for part in http.body_json()["parts"]]
    parts = [http.server.store.path(f"{oid}.part{number}") for number in numbers]
    _keep(http, oid, b"".join(part.read_bytes() for part in parts))


def verify(http: Handler, oid: str) -> None:
    http.body()
    there = http.server.store.path(oid).exists()
    http.answer(200 if there else 404, {})


def _keep(http: Handler, oid: str, data: bytes) -> None:
    if hashlib.sha256(data).hexdigest() != oid:
        http.error(400, "", "sha256 mismatch")
        return
    if http.fault is not None and http.fault.flip is not None:
        data = bytearray(data)
        data[http.fault.flip] ^= 1  # a store that damages what it was given
    http.server.store.path(oid).write_bytes(data)
    http.answer(document={})


ROUTES = (
    (r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch", batch),
    (r"PUT /_lfs/(\w+)", put),
    (r"PUT /_lfs/(\w+)/part/(\d+)", put_part),
    (r"POST /_lfs/(\w+)/complete", complete),
    (r"POST /_lfs/(\w+)/verify", verify),
)

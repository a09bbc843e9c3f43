"""Signatures of checkpoint folders by the OpenSSF Model Signing format, with a local key.

What is signed is every file of the folder but the card and what belongs to tools; the signature
itself says what was left out. Other programs verify it too: `model_signing verify key`. Needs the
package model-signing, which is loaded when it is first used.

Format: https://github.com/sigstore/model-transparency
"""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from kimi_convert.checkpoints.disk import disk_errors
from kimi_convert.checkpoints.manifest import (
    CARD_FILE,
    SIGNATURE_FILE,
    HashedFile,
)
from kimi_convert.checkpoints.messages import quoted
from kimi_convert.checkpoints.regular_file import open_regular, read_exactly
from kimi_convert.checkpoints.strict_json import MAX_JSON_BYTES, as_object, parse_object
from kimi_convert.errors import CheckpointError, UsageError, VerificationError

# The card may be edited on the Hub; the others are no part of the model.
_NEVER_SIGNED = (CARD_FILE, SIGNATURE_FILE, ".cache", ".git", ".gitattributes", ".gitignore")


def sign_folder(folder: Path, private_key: Path, *, leave_out: Iterable[str] = ()) -> None:
    """Write model.sig into a folder, unless it has one by the same key of the same files.

    Args:
        folder: what to sign.
        private_key: PEM of a key on a NIST curve, without a password.
        leave_out: names of files of the folder that are not part of the checkpoint.

    Raises:
        UsageError: the key cannot be used, or model-signing is not installed.
        ResourceError: the folder cannot be written.
    """
    signing = _module("model_signing.signing")
    with _usable_key(private_key), _public_part(private_key) as public_key:
        if (folder / SIGNATURE_FILE).exists() and _holds(folder, public_key):
            return
        ignored = [folder / name for name in (*_NEVER_SIGNED, *leave_out)]
        config = signing.Config().use_elliptic_key_signer(private_key=private_key)
    config.set_hashing_config(_hashing().set_ignored_paths(paths=ignored, ignore_git_paths=False))
    fresh = folder / f".{SIGNATURE_FILE}.fresh"
    with disk_errors(fresh, doing="write the signature"):
        try:
            config.sign(folder, fresh)
            fresh.replace(folder / SIGNATURE_FILE)
        finally:
            fresh.unlink(missing_ok=True)


def check_signature(folder: Path, public_key: Path) -> int:
    """Check that the folder is as somebody with the private key has signed it.

    Returns:
        How many files the signature covers.

    Raises:
        UsageError: the key cannot be used, or model-signing is not installed.
        VerificationError: there is no signature, it is by another key, or of other files.
    """
    path = folder / SIGNATURE_FILE
    if not path.exists():
        raise VerificationError(
            "folder is not signed",
            where=folder,
            expected=SIGNATURE_FILE,
            hint="Get the signature from where the checkpoint comes from.",
        )
    with _usable_key(public_key):
        _module("model_signing.verifying").Config().use_elliptic_key_verifier(
            public_key=public_key
        )
    try:
        _verify(folder, public_key)
    except Exception as error:  # any failure of the library means that nothing is proven
        raise VerificationError(
            "signature does not hold",
            where=path,
            expected=f"a signature of these files by the owner of {public_key}",
            found=quoted(str(error) or type(error).__name__),
            hint="Do not use the checkpoint before you know why.",
        ) from error
    return len(signed_hashes(path))


def signed_hashes(path: Path) -> dict[str, str]:
    """Return which files a signature is about, with their SHA-256, without checking whose it is.

    Raises:
        CheckpointError: it is not understood.
    """
    try:
        envelope = as_object(_parsed(path).get("dsseEnvelope")) or {}
        statement = parse_object(
            base64.b64decode(str(envelope.get("payload")), validate=True), where=path
        )
        predicate = as_object(statement.get("predicate")) or {}
        resources = cast("list[dict[str, str]]", predicate["resources"])
        return {entry["name"]: entry["digest"] for entry in resources}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError("signature is not understood", where=path, found=error) from error


def is_of(path: Path, files: Iterable[HashedFile]) -> bool:
    """Tell whether a signature covers each of these files as it is."""
    signed = signed_hashes(path)
    return all(signed.get(file.name) == file.sha256 for file in files)


def _holds(folder: Path, public_key: Path) -> bool:
    try:
        _verify(folder, public_key)
    except Exception:  # by another key, or of other files: it is made anew
        return False
    return True


def _verify(folder: Path, public_key: Path) -> None:
    config = _module("model_signing.verifying").Config().set_hashing_config(_hashing())
    config = config.use_elliptic_key_verifier(public_key=public_key)
    config.verify(folder, folder / SIGNATURE_FILE)


def _hashing() -> Any:  # noqa: ANN401  (the library's class)
    """Return how files are hashed: each by SHA-256, through links, as all are in the Hub's cache."""
    config = _module("model_signing.hashing").Config()
    return config.use_file_serialization(hashing_algorithm="sha256").set_allow_symlinks(True)


@contextmanager
def _usable_key(key: Path) -> Generator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(
            "key cannot be used",
            where=key,
            expected="PEM of a key on the curve secp256r1, secp384r1 or secp521r1, no password",
            found=quoted(str(error)),
            hint="Make one: openssl ecparam -name prime256v1 -genkey -noout -out key.pem; "
            "openssl ec -in key.pem -pubout -out key.pub",
        ) from error


@contextmanager
def _public_part(private_key: Path) -> Generator[Path]:
    """Give a temporary file with the public key that belongs to a private one."""
    serialization = _module("cryptography.hazmat.primitives.serialization")
    loaded = serialization.load_pem_private_key(private_key.read_bytes(), None)
    text: bytes = loaded.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    with tempfile.NamedTemporaryFile(suffix=".pub") as file:
        file.write(text)
        file.flush()
        yield Path(file.name)


def _module(name: str) -> ModuleType:
    """Import a module of the extra packages.

    Raises:
        UsageError: they are not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise UsageError(
            "signatures need packages that are not installed",
            found=str(error),
            hint="pip install 'kimi-convert[sign]'",
        ) from error


def _parsed(path: Path) -> dict[str, object]:
    with open_regular(path) as descriptor:
        size = min(path.stat().st_size, MAX_JSON_BYTES + 1)
        return parse_object(read_exactly(descriptor, size, offset=0, path=path), where=path)

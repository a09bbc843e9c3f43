"""Signatures by a local key, and what they do not let through."""

from __future__ import annotations

import subprocess
import sys

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from kimi_convert.checkpoints.manifest import content_files, hash_files
from kimi_convert.checkpoints.signing import check_signature, is_of, sign_folder, signed_hashes
from kimi_convert.errors import CheckpointError, UsageError, VerificationError
from tests.tiny import tiny_config, write_tiny_checkpoint


def write_keys(folder, private):
    pem = serialization.Encoding.PEM
    (folder / "key.pem").write_bytes(
        private.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    public = private.public_key().public_bytes(
        pem, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    (folder / "key.pub").write_bytes(public)
    return folder / "key.pem", folder / "key.pub"


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return write_keys(tmp_path_factory.mktemp("keys"), ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture
def folder(tmp_path, keys):
    folder = write_tiny_checkpoint(tmp_path / "tiny", tiny_config("kimi_linear"))
    (folder / "README.md").write_text("card", encoding="ascii")
    sign_folder(folder, keys[0])
    return folder


def test_signature_holds_for_what_was_signed(folder, keys):
    assert check_signature(folder, keys[1]) == 4
    names = content_files(folder)
    assert set(signed_hashes(folder / "model.sig")) == set(names)
    assert is_of(folder / "model.sig", hash_files(folder, names).values())


def test_signing_again_changes_nothing(folder, keys):
    before = (folder / "model.sig").read_bytes()
    sign_folder(folder, keys[0])
    assert (folder / "model.sig").read_bytes() == before


def test_changed_files_are_signed_anew(folder, keys):
    (folder / "config.json").write_text("{}", encoding="ascii")
    sign_folder(folder, keys[0])
    assert check_signature(folder, keys[1]) == 4


def test_card_may_be_edited(folder, keys):
    (folder / "README.md").write_text("other words", encoding="ascii")
    assert check_signature(folder, keys[1]) == 4


def test_folder_may_have_another_name_and_be_links(folder, keys, tmp_path):
    linked = tmp_path / "snapshots" / "abc"
    linked.mkdir(parents=True)
    for path in folder.iterdir():
        (linked / path.name).symlink_to(path)
    assert check_signature(linked, keys[1]) == 4


def test_other_programs_verify_it(folder, keys):
    arguments = ["verify", "key", folder, "--signature", folder / "model.sig"]
    done = subprocess.run(
        [sys.executable, "-m", "model_signing", *arguments, "--public_key", keys[1]],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def flip(folder):
    path = folder / "model-00002-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def add(folder):
    (folder / "modeling.py").write_text("evil", encoding="ascii")


def remove(folder):
    (folder / "config.json").unlink()


def cut_signature(folder):
    path = folder / "model.sig"
    path.write_bytes(path.read_bytes()[:-100])


def forge_signature(folder):
    path = folder / "model.sig"
    path.write_text(path.read_text("ascii").replace('"sig":"M', '"sig":"N'), encoding="ascii")


@pytest.mark.parametrize("harm", [flip, add, remove, cut_signature])
def test_harm_is_found(folder, keys, harm):
    harm(folder)
    with pytest.raises(VerificationError, match="does not hold"):
        check_signature(folder, keys[1])


def test_other_key_is_not_enough(folder, tmp_path):
    other = write_keys(tmp_path, ec.generate_private_key(ec.SECP384R1()))
    with pytest.raises(VerificationError, match="does not hold"):
        check_signature(folder, other[1])


def test_unsigned_folder_is_said_to_be_that(folder, keys):
    (folder / "model.sig").unlink()
    with pytest.raises(VerificationError, match="not signed"):
        check_signature(folder, keys[1])


def test_key_of_another_kind_is_refused(folder, keys, tmp_path):
    private, public = write_keys(tmp_path, rsa.generate_private_key(65537, 2048))
    for use, key in ((sign_folder, private), (check_signature, public), (sign_folder, keys[1])):
        with pytest.raises(UsageError, match="key cannot be used") as caught:
            use(folder, key)
        assert "openssl" in caught.value.hint


def test_missing_key_is_refused(folder, tmp_path):
    with pytest.raises(UsageError, match="key cannot be used"):
        sign_folder(folder, tmp_path / "none.pem")


@pytest.mark.parametrize("text", ["", "{}", '{"dsseEnvelope": {"payload": "!!"}}'])
def test_signature_that_is_none_is_not_understood(tmp_path, text):
    (tmp_path / "model.sig").write_text(text, encoding="ascii")
    with pytest.raises(CheckpointError):
        signed_hashes(tmp_path / "model.sig")


def test_missing_package_is_said_with_how_to_get_it(folder, keys, monkeypatch):
    monkeypatch.setitem(sys.modules, "model_signing.verifying", None)
    with pytest.raises(UsageError, match="not installed") as caught:
        check_signature(folder, keys[1])
    assert "kimi-convert[sign]" in caught.value.hint

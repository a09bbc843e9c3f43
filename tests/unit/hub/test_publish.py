"""What a publication sends, in which order it shows, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from kimi_convert.checkpoints.manifest import content_files, hash_files
from kimi_convert.config.recipe import Recipe
from kimi_convert.conversion.engine import convert_checkpoint
from kimi_convert.errors import HubError, OutputError, UsageError, VerificationError
from kimi_convert.hub import PublishOptions, download_checkpoint, publish_checkpoint
from kimi_convert.validation import ValidationOptions, validate_checkpoint
from kimi_convert.validation.options import Check
from kimi_convert.validation.record import write_record
from tests.hub_server import Repository
from tests.hub_server.fixtures import *  # noqa: F403
from tests.integration.command_line import run_here
from tests.tiny import tiny_config, write_tiny_checkpoint

NAME = "tester/hybrid"

# huggingface_hub 2.4 hands LFS uploads to httpx2 in a way that httpx2 2.16 would like otherwise.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def validated(tmp_path_factory):
    """A converted and validated checkpoint; made once, copied for each test."""
    source = write_tiny_checkpoint(tmp_path_factory.mktemp("in"), tiny_config("deepseek_v3"))
    folder = tmp_path_factory.mktemp("out") / "hybrid"
    convert_checkpoint(source, folder, recipe=Recipe(), max_shard_bytes=400_000)
    checks = frozenset({Check.VALUES, Check.HASHES})
    write_record(validate_checkpoint(folder, options=ValidationOptions(checks=checks)), folder)
    return folder


@pytest.fixture
def folder(validated, tmp_path):
    return Path(shutil.copytree(validated, tmp_path / "hybrid"))


def shown(repository, revision="main"):
    return {path: repository.read(path, revision) for path in repository.tree(revision)}


def local(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def shard_of(folder):
    return max(folder.glob("*.safetensors")).name


def test_publication_is_the_folder_byte_for_byte(hub, folder, tmp_path):
    result = publish_checkpoint(folder, NAME, options=PublishOptions(tag="v1"))
    repository = hub.store.repositories[NAME]
    assert shown(repository) == local(folder)
    assert result.merged
    assert result.commit == repository.head == repository.tags["v1"]
    download_checkpoint(f"{NAME}@v1", local_dir=tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / ".cache")
    assert local(tmp_path / "again") == local(folder)


def test_manifest_is_what_sha256sum_writes(hub, folder):
    publish_checkpoint(folder, NAME)
    lines = (folder / "SHA256SUMS").read_text("ascii").splitlines()
    hashes = {
        name: file.sha256 for name, file in hash_files(folder, content_files(folder)).items()
    }
    assert dict(line.split("  ")[::-1] for line in lines) == hashes
    assert set(local(folder)) - set(hashes) == {"README.md", "SHA256SUMS", "validation.json"}


def test_main_never_shows_a_part(hub, folder):
    """Whenever a file has gone up, main is still empty; it is whole at once."""
    seen = []
    publish_checkpoint(
        folder,
        NAME,
        on_progress=lambda _: seen.append(
            len(hub.store.repositories[NAME].tree()) if NAME in hub.store.repositories else 0
        ),
    )
    assert len(seen) > len(local(folder))
    assert set(seen) == {0}
    assert len(hub.store.repositories[NAME].tree()) == len(local(folder))


def test_plan_is_told_before_anything_is_sent(hub, folder):
    sent = []
    publish_checkpoint(
        folder, NAME, on_plan=lambda plan: sent.append((len(plan.upload), hub.asked("PUT ")))
    )
    assert sent == [(len(local(folder)), [])]


def test_second_publication_sends_nothing(hub, folder):
    first = publish_checkpoint(folder, NAME)
    hub.requests.clear()
    again = publish_checkpoint(folder, NAME)
    assert again.commit == first.commit
    assert not hub.asked("PUT |POST .*/(commit|merge|create)")


def test_changed_folder_sends_what_changed_and_removes_stale_weights(hub, folder, tmp_path):
    publish_checkpoint(folder, NAME)
    (folder / "LICENSE").write_text("terms\n", encoding="ascii")
    repository = hub.store.repositories[NAME]
    repository.seed({"model.safetensors": b"old weights", "notes.txt": b"keep"})
    result = publish_checkpoint(folder, NAME, options=PublishOptions(force=True))
    sent = {file.name for file in result.plan.upload}
    assert sent == {"LICENSE", "README.md", "SHA256SUMS"}
    assert result.plan.remove == ("model.safetensors", "validation.json")
    assert set(repository.tree()) == {*local(folder), "notes.txt"} - {"validation.json"}


def test_interrupted_publication_goes_on(hub, folder):
    shard = shard_of(folder)
    hub.fault("POST .*/commit/", status=500)
    with pytest.raises(HubError):
        publish_checkpoint(folder, NAME)
    assert shown(hub.store.repositories[NAME]) == {}
    hub.requests.clear()
    publish_checkpoint(folder, NAME)
    assert hub.asked("POST .*objects/batch")
    assert not hub.asked("PUT ")
    assert hub.store.repositories[NAME].read(shard) == (folder / shard).read_bytes()


def test_open_pull_request_of_an_earlier_run_is_taken_up(hub, folder):
    hub.fault("POST .*/merge", status=500)
    with pytest.raises(HubError):
        publish_checkpoint(folder, NAME)
    repository = hub.store.repositories[NAME]
    assert shown(repository) == {}
    publish_checkpoint(folder, NAME)
    assert [pull.status for pull in repository.pulls] == ["merged"]
    assert shown(repository) == local(folder)


def test_pull_request_stays_open_for_review(hub, folder):
    result = publish_checkpoint(folder, NAME, options=PublishOptions(pull_request=True))
    repository = hub.store.repositories[NAME]
    assert (result.pull_request, result.merged) == (1, False)
    assert shown(repository) == {}
    assert shown(repository, "refs/pr/1") == local(folder)
    again = publish_checkpoint(folder, NAME, options=PublishOptions(pull_request=True))
    assert again.pull_request == 1


def test_branch_leaves_main_alone(hub, folder):
    result = publish_checkpoint(folder, NAME, options=PublishOptions(branch="fitted", tag="v2"))
    repository = hub.store.repositories[NAME]
    assert shown(repository) == {}
    assert shown(repository, "fitted") == local(folder)
    assert repository.tags["v2"] == result.commit


def test_branch_is_made_where_its_contents_are_those_of_main(hub, folder):
    publish_checkpoint(folder, NAME)
    publish_checkpoint(folder, NAME, options=PublishOptions(branch="release"))
    assert shown(hub.store.repositories[NAME], "release") == local(folder)


def test_listing_that_lags_behind_the_merge_is_waited_for(hub, folder, monkeypatch):
    merged = []

    def lagging(repository, pull):
        before = repository.head
        merge(repository, pull)
        merged.append(repository.head)
        repository.branches["main"] = before

    def catch_up(_):
        hub.store.repositories[NAME].branches["main"] = merged[-1]

    merge = Repository.merge
    monkeypatch.setattr(Repository, "merge", lagging)
    monkeypatch.setattr("kimi_convert.hub.publication.time.sleep", catch_up)
    assert publish_checkpoint(folder, NAME).commit == merged[-1]


def test_store_that_damages_a_file_keeps_main_as_it_was(hub, folder, monkeypatch):
    """The listing shows another hash: nothing is merged, the exit code is that of verification."""
    from tests.hub_server import api

    def damaged(sha256, size, xet=None):
        return lfs_entry("0" * 64, size, xet)

    lfs_entry = api.lfs_entry
    monkeypatch.setattr(api, "lfs_entry", damaged)
    with pytest.raises(VerificationError, match="not what was sent") as caught:
        publish_checkpoint(folder, NAME)
    assert shard_of(folder) in caught.value.found
    assert shown(hub.store.repositories[NAME]) == {}


def test_commit_of_somebody_else_in_between_is_not_overwritten(hub, folder):
    repository = hub.store.create(NAME)

    def meddle(event):
        if event.stage == "uploading" and event.done == event.total:
            repository.branches["fitted"] = repository.seed({"theirs": b"1"})

    with pytest.raises(HubError, match="has changed since"):
        publish_checkpoint(
            folder, NAME, options=PublishOptions(branch="fitted"), on_progress=meddle
        )
    assert set(repository.tree("fitted")) == {"theirs"}


def test_dry_run_changes_nothing_here_or_there(hub, folder):
    before = local(folder)
    result = publish_checkpoint(folder, NAME, dry_run=True)
    assert local(folder) == before
    assert NAME not in hub.store.repositories
    assert {file.name for file in result.plan.upload} == {*before, "README.md", "SHA256SUMS"}
    assert json.dumps(result.to_json())


def test_folder_without_validation_is_refused(hub, folder):
    (folder / "validation.json").unlink()
    with pytest.raises(VerificationError, match="not validated as it is"):
        publish_checkpoint(folder, NAME)
    assert NAME not in hub.store.repositories
    assert not publish_checkpoint(folder, NAME, options=PublishOptions(force=True)).validated


def test_folder_that_changed_after_validation_is_refused(hub, folder):
    (folder / "generation_config.json").write_text("{}", encoding="ascii")
    with pytest.raises(VerificationError) as caught:
        publish_checkpoint(folder, NAME)
    assert "other files" in caught.value.found


def test_files_that_lie_there_by_chance_stay_here(hub, folder):
    (folder / ".env").write_text("SECRET=1", encoding="ascii")
    (folder / "notes.txt").write_text("mine", encoding="ascii")
    result = publish_checkpoint(folder, NAME)
    assert result.plan.left_out == (".env", "notes.txt")
    assert not {".env", "notes.txt"} & set(hub.store.repositories[NAME].tree())


def test_own_card_is_kept(hub, folder):
    (folder / "README.md").write_text("my words", encoding="ascii")
    publish_checkpoint(folder, NAME)
    assert hub.store.repositories[NAME].read("README.md") == b"my words"


def test_private_is_not_published_into_a_public_repository(hub, folder):
    hub.store.create(NAME)
    with pytest.raises(OutputError, match="public"):
        publish_checkpoint(folder, NAME, options=PublishOptions(private=True))
    assert not hub.asked("PUT ")


def test_private_repository_is_made_private(hub, folder):
    publish_checkpoint(folder, NAME, options=PublishOptions(private=True))
    assert hub.store.repositories[NAME].private


def test_tag_of_something_else_is_refused_before_the_upload(hub, folder):
    repository = hub.store.create(NAME)
    repository.tags["v1"] = repository.head
    with pytest.raises(OutputError, match="this tag"):
        publish_checkpoint(folder, NAME, options=PublishOptions(tag="v1"))
    assert not hub.asked("PUT ")


@pytest.mark.parametrize(
    ("pattern", "status", "message"),
    [
        ("GET /api/whoami", 401, "does not accept the token"),
        ("POST /api/repos/create", 403, "does not give the right"),
        ("POST .*objects/batch", 403, "does not give the right"),
        ("PUT /_lfs", 403, "does not give the right"),
        ("POST .*/commit/", 412, "has changed since"),
        ("POST .*/commit/", 500, "has a problem"),
        ("POST .*/merge", 409, "a conflict"),
    ],
)
def test_refusal_is_one_error_without_the_token(hub, folder, pattern, status, message):
    headers = {"X-Error-Message": f"no, {TOKEN}"}  # noqa: F405
    hub.fault(pattern, times=99, status=status, headers=headers)
    done = run_here("publish", folder, NAME, "--json", "--verbose")
    assert done.returncode == HubError.exit_code
    assert message in json.loads(done.stdout)["error"]["message"]
    assert TOKEN not in done.stdout + done.stderr  # noqa: F405
    assert NAME not in hub.store.repositories or not hub.store.repositories[NAME].tree()


def test_without_login_nothing_is_hashed(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    events = []
    with pytest.raises(HubError, match="nobody is logged in"):
        publish_checkpoint(folder, NAME, on_progress=events.append)
    assert events == []


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    private = ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    (folder / "key.pem").write_bytes(
        private.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    (folder / "key.pub").write_bytes(
        private.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return folder / "key.pem", folder / "key.pub"


def signature_of(folder, key):
    report = validate_checkpoint(
        folder, public_key=key, options=ValidationOptions(checks=frozenset())
    )
    return report.passed, report.signed_files


def test_signature_holds_for_what_is_downloaded(hub, folder, keys, tmp_path):
    (folder / "notes.txt").write_text("mine", encoding="ascii")
    publish_checkpoint(folder, NAME, options=PublishOptions(sign_key=keys[0]))
    signed = len(local(folder)) - len(["README.md", "model.sig", "notes.txt"])
    for place in (tmp_path / "again", None):
        result = download_checkpoint(NAME, local_dir=place)
        assert signature_of(result.folder, keys[1]) == (True, signed)
    assert signature_of(folder, keys[1]) == (True, signed)
    again = publish_checkpoint(folder, NAME, options=PublishOptions(sign_key=keys[0]))
    assert again.plan.is_done


def test_signature_is_asked_for_on_the_command_line(hub, folder, keys):
    done = run_here("publish", folder, NAME, "--sign-key", keys[0], "--json")
    assert done.returncode == 0, done.stderr
    done = run_here("validate", folder, "--verify-signature", keys[1])
    assert done.returncode == 0, done.stdout
    assert "holds for" in done.stdout
    (folder / "LICENSE").write_text("other terms", encoding="ascii")
    done = run_here("validate", folder, "--verify-signature", keys[1])
    assert done.returncode == 6
    assert "signature does not hold" in done.stdout


def test_changed_download_fails_the_signature(hub, folder, keys, tmp_path):
    publish_checkpoint(folder, NAME, options=PublishOptions(sign_key=keys[0]))
    download_checkpoint(NAME, local_dir=tmp_path / "again")
    (tmp_path / "again" / "generation_config.json").write_text("{}", encoding="ascii")
    assert signature_of(tmp_path / "again", keys[1]) == (False, None)


def test_signature_of_other_files_is_not_published(hub, folder, keys):
    publish_checkpoint(folder, NAME, options=PublishOptions(sign_key=keys[0]))
    (folder / "LICENSE").write_text("terms", encoding="ascii")
    with pytest.raises(VerificationError, match="signature is of other files"):
        publish_checkpoint(folder, NAME, options=PublishOptions(force=True))


@pytest.mark.parametrize(
    "options",
    [
        {"pull_request": True, "branch": "x"},
        {"pull_request": True, "tag": "v1"},
        {"branch": "../x"},
        {"tag": "-v"},
    ],
)
def test_options_that_contradict_themselves_are_refused(options):
    with pytest.raises(UsageError):
        PublishOptions(**options)


def test_pull_request_of_somebody_else_with_more_in_it_is_not_merged(hub, folder):
    """The title and the contents are no secret: what else it changes counts."""
    hub.fault("POST .*/merge", status=500)
    with pytest.raises(HubError):
        publish_checkpoint(folder, NAME)
    repository = hub.store.repositories[NAME]
    repository.seed({"modeling.py": b"evil"}, branch="refs/pr/1")
    publish_checkpoint(folder, NAME)
    assert shown(repository) == local(folder)
    assert [pull.status for pull in repository.pulls] == ["open", "merged"]

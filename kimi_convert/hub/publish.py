"""Publish a checkpoint so that nobody ever sees half of it.

    check the folder -> hash it -> card and SHA256SUMS -> compare with the repository
    -> upload contents (seen by nobody yet) -> one commit, as a pull request or on a branch
    -> the listing must have every hash -> merge -> tag

A run that ends anywhere can be given again: contents that are there are not sent again, and an
open pull request of the same contents is taken up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from kimi_convert.checkpoints.disk import disk_errors
from kimi_convert.checkpoints.manifest import (
    ABOUT_FILES,
    CARD_FILE,
    RECORD_FILE,
    SIGNATURE_FILE,
    SUMS_FILE,
    HashedFile,
    content_files,
    hash_files,
    sums_text,
)
from kimi_convert.checkpoints.signing import is_of, sign_folder
from kimi_convert.config.huggingface import read_config
from kimi_convert.config.progress import ProgressCallback, ignore_progress
from kimi_convert.errors import OutputError, UsageError, VerificationError
from kimi_convert.hub.card import MARK, CardFacts, card_text, read_conversion
from kimi_convert.hub.publication import Publication
from kimi_convert.hub.publish_plan import PublishPlan, plan_publication
from kimi_convert.hub.reference import DEFAULT_REVISION, Reference, parse_reference
from kimi_convert.hub.remote import connect
from kimi_convert.validation.record import Record, read_record


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishOptions:
    """Where a folder goes and how."""

    private: bool = False  # of a repository that is made for it
    branch: str = DEFAULT_REVISION
    pull_request: bool = False  # leave it open for somebody to review
    tag: str | None = None
    force: bool = False  # also what no validation covers
    sign_key: Path | None = None  # PEM of the private key to sign with

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        if self.pull_request and self.branch != DEFAULT_REVISION:
            raise UsageError("--pull-request goes to main: it cannot have a --branch")
        if self.pull_request and self.tag:
            raise UsageError(
                "--tag marks what is published, and a pull request is not yet",
                hint="Tag it when it has been merged.",
            )
        for name in (self.branch, self.tag):
            if name is not None:
                parse_reference("a/b", revision=name)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishResult:
    """What was published, or with a dry run would be."""

    repository: str
    branch: str
    plan: PublishPlan
    validated: bool
    dry_run: bool
    commit: str | None = None  # where it can be seen; None in a dry run
    pull_request: int | None = None
    merged: bool = False
    tag: str | None = None

    def to_json(self) -> dict[str, object]:
        """Return the document that `publish --json` prints."""
        return {
            "repository": self.repository,
            "branch": self.branch,
            "commit": self.commit,
            "pull_request": self.pull_request,
            "merged": self.merged,
            "tag": self.tag,
            "dry_run": self.dry_run,
            "validated": self.validated,
            "files": [
                {
                    "name": file.name,
                    "size": file.nbytes,
                    "sha256": file.sha256,
                    "change": str(self.plan.changes[file.name]),
                }
                for file in self.plan.files.values()
            ],
            "removed": list(self.plan.remove),
            "left_out": list(self.plan.left_out),
        }


def ignore_plan(plan: PublishPlan) -> None:
    """Take a plan and do nothing: the default callback."""


_DEFAULTS = PublishOptions()


def publish_checkpoint(
    folder: str | Path,
    repository: str,
    *,
    options: PublishOptions = _DEFAULTS,
    dry_run: bool = False,
    on_plan: Callable[[PublishPlan], None] = ignore_plan,
    on_progress: ProgressCallback = ignore_progress,
) -> PublishResult:
    """Put a checkpoint folder on the Hub: whole, checked there, and only then to be seen.

    The folder gets a card, README.md, unless it has one of its own, SHA256SUMS, and a signature if
    there is a key.

    Args:
        folder: a checkpoint; what lies in it beside one stays here.
        repository: `org/name`; made if there is none.
        options: where it goes and how.
        dry_run: only say what would be done; nothing is written, here or there.
        on_plan: told what will be done, before anything is sent.
        on_progress: told of bytes hashed and uploaded.

    Raises:
        UsageError: the options contradict each other, or not the name of a repository.
        VerificationError: the folder was not validated as it is, or did not pass; or what the
            repository lists in the end is not what was sent. main is as it was.
        ConfigError, CheckpointError: the folder is not one whole checkpoint.
        OutputError: the repository, or a tag in it, is not as asked for.
        HubError: no network, no login, or no right to write.
    """
    folder, reference = Path(folder), parse_reference(repository)
    if reference.revision != DEFAULT_REVISION:
        raise UsageError("a revision cannot be published to", hint="Give --branch instead.")
    read_config(folder)
    names = content_files(folder)
    publication = Publication(connect(), reference.repository, options.branch)
    publication.check_login()
    state = publication.look()
    if state is not None and options.private and not state.is_private:
        raise OutputError(
            "repository is there already, and public",
            where=reference.repository,
            expected="a private one, or none",
            hint="Make it private on its page, choose another name, or leave out --private.",
        )
    content = hash_files(folder, names, on_progress=on_progress)
    record = _record(folder, content, force=options.force)
    signed = options.sign_key is not None or (folder / SIGNATURE_FILE).exists()
    texts = _texts(folder, reference, content, record, is_signed=signed)
    if not dry_run:
        for name, text in texts.items():
            _write(folder / name, text)
        if options.sign_key is not None:
            sign_folder(folder, options.sign_key, leave_out=_strangers(folder, content))
    _check_signature(folder, content, options.sign_key)
    hashed = {**content, **_about(folder, texts, record)}
    plan = plan_publication(folder, hashed, state.files if state else {}, texts=texts)
    result = PublishResult(
        repository=reference.repository,
        branch=options.branch,
        plan=plan,
        validated=record is not None,
        dry_run=dry_run,
    )
    if dry_run:
        return result
    if state is None:
        state = publication.create(private=options.private)
        plan = plan_publication(folder, hashed, state.files, texts=texts)
    on_plan(plan)
    publication.check_tag(options.tag, plan, state)
    done = publication.run(
        folder, plan, state, merge=not options.pull_request, on_progress=on_progress
    )
    if options.tag:
        publication.tag(options.tag, done.commit)
    return replace(
        result,
        plan=plan,
        commit=done.commit,
        pull_request=done.pull_request,
        merged=done.merged,
        tag=options.tag,
    )


def _record(folder: Path, content: dict[str, HashedFile], *, force: bool) -> Record | None:
    """Return the record of a validation that passed on these very bytes.

    Raises:
        VerificationError: there is none.
    """
    record = read_record(folder)
    if record is not None and record.passed and record.covers(content):
        return record
    if force:
        return None
    if record is None:
        found = "no validation.json"
    elif not record.passed:
        found = "a validation that failed"
    else:
        found = "a validation of other files"
    raise VerificationError(
        "folder is not validated as it is",
        where=folder,
        expected="validation.json of a validation that passed on these files",
        found=found,
        hint="Run `kimi-convert validate FOLDER --record`, or publish it with --force all the same.",
    )


def _texts(
    folder: Path,
    reference: Reference,
    content: dict[str, HashedFile],
    record: Record | None,
    *,
    is_signed: bool,
) -> dict[str, str]:
    """Return the files that a publication adds to the folder: hashes, and a card."""
    texts = {SUMS_FILE: sums_text(content)}
    if _may_write_card(folder / CARD_FILE):
        facts = CardFacts(
            reference.repository,
            read_conversion(folder),
            None if record is None else record.report,
            is_signed=is_signed,
        )
        texts[CARD_FILE] = card_text(facts)
    return texts


def _about(folder: Path, texts: dict[str, str], record: Record | None) -> dict[str, HashedFile]:
    """Return the files about the content: card, hashes, the record if it holds, a signature."""
    made = {name: _of_text(name, text) for name, text in texts.items()}
    wanted = [CARD_FILE, SIGNATURE_FILE, *([RECORD_FILE] if record is not None else [])]
    there = [name for name in wanted if name not in made and (folder / name).exists()]
    return {**made, **hash_files(folder, there)}


def _strangers(folder: Path, content: dict[str, HashedFile]) -> list[str]:
    """Return what lies in the folder and is not published."""
    return [
        p.name for p in folder.iterdir() if p.name not in content and p.name not in ABOUT_FILES
    ]


def _check_signature(folder: Path, content: dict[str, HashedFile], key: Path | None) -> None:
    """Refuse a signature of other files than these, which would help nobody.

    Raises:
        VerificationError: the folder has one.
    """
    path = folder / SIGNATURE_FILE
    if key is None and path.exists() and not is_of(path, content.values()):
        raise VerificationError(
            "signature is of other files",
            where=path,
            hint="Sign anew with --sign-key, or remove it.",
        )


def _may_write_card(path: Path) -> bool:
    """Tell whether the card is absent or was generated: nobody's own words are replaced."""
    return not path.exists() or MARK in path.read_text("utf-8", errors="replace")


def _write(path: Path, text: str) -> None:
    data = text.encode()
    with disk_errors(path, doing="complete the folder", nbytes=len(data)):
        if not path.exists() or path.read_bytes() != data:
            fresh = path.with_name(f".{path.name}.fresh")
            fresh.write_bytes(data)
            fresh.replace(path)


def _of_text(name: str, text: str) -> HashedFile:
    data = text.encode()
    return HashedFile(name, len(data), hashlib.sha256(data).hexdigest())

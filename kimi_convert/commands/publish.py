"""`kimi-convert publish`: put a checkpoint on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kimi_convert.commands._numbers import bytes_text, files_text
from kimi_convert.commands._options import JsonOpt, QuietOpt, VerboseOpt
from kimi_convert.commands._output import Output
from kimi_convert.commands._report import Facts, Report, Section, Sentence, Table

if TYPE_CHECKING:
    from kimi_convert.hub import PublishResult
    from kimi_convert.hub.publish_plan import PublishPlan

EXAMPLE = "kimi-convert publish ./hybrid my-org/Moonlight-KDA --private --tag v1"

FolderArg = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="Checkpoint to publish.", show_default=False)
]
RepositoryArg = Annotated[
    str,
    typer.Argument(metavar="REPO", help="org/name; made if there is none.", show_default=False),
]
PrivateOpt = Annotated[
    bool, typer.Option("--private", help="Make a private repository; refuse a public one.")
]
BranchOpt = Annotated[
    str, typer.Option("--branch", metavar="NAME", help="Branch to publish to; made if need be.")
]
PullRequestOpt = Annotated[
    bool, typer.Option("--pull-request", help="Leave it as an open pull request.")
]
TagOpt = Annotated[
    str | None,
    typer.Option("--tag", metavar="NAME", help="Tag what was published.", show_default=False),
]
SignKeyOpt = Annotated[
    Path | None,
    typer.Option(
        "--sign-key",
        metavar="FILE",
        help="Private key (PEM, elliptic curve) to sign the files with.",
        show_default=False,
    ),
]
ForceOpt = Annotated[bool, typer.Option("--force", help="Also publish what no validation covers.")]
DryRunOpt = Annotated[bool, typer.Option("--dry-run", help="Show what would be published.")]


def publish(
    folder: FolderArg,
    repository: RepositoryArg,
    private: PrivateOpt = False,
    branch: BranchOpt = "main",
    pull_request: PullRequestOpt = False,
    tag: TagOpt = None,
    sign_key: SignKeyOpt = None,
    force: ForceOpt = False,
    dry_run: DryRunOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Put a validated checkpoint on the Hub; it is checked there before anybody sees it.

    A card and SHA256SUMS are added to the folder. The token is that of `hf auth login` or HF_TOKEN.
    """
    from kimi_convert.hub import PublishOptions, publish_checkpoint

    output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
    options = PublishOptions(
        private=private,
        branch=branch,
        pull_request=pull_request,
        tag=tag,
        force=force,
        sign_key=sign_key,
    )
    with output.progress() as on_progress:
        result = publish_checkpoint(
            folder,
            repository,
            options=options,
            dry_run=dry_run,
            on_plan=lambda plan: output.note(_announcement(plan)),
            on_progress=on_progress,
        )
    output.show(result, lambda: publish_report(result))


def publish_report(result: PublishResult) -> Report:
    """Return what `publish` shows."""
    plan = result.plan
    uploaded = sum(file.nbytes for file in plan.upload)
    facts = [
        ("repository", f"{result.repository}, {result.branch}"),
        ("to upload" if result.dry_run else "uploaded", _count(len(plan.upload), uploaded)),
        ("there already", files_text(len(plan.files) - len(plan.upload))),
        ("removed there", ", ".join(plan.remove) or "nothing"),
        ("stays here", ", ".join(plan.left_out) or "nothing"),
    ]
    if result.commit:
        facts.append(("commit", result.commit))
    if result.pull_request is not None:
        state = "merged" if result.merged else "open"
        facts.append(("pull request", f"{result.pull_request}, {state}"))
    if result.tag:
        facts.append(("tag", result.tag))
    title = "Would publish" if result.dry_run else "Published"
    rows = tuple(
        (file.name, bytes_text(file.nbytes), str(plan.changes[file.name]))
        for file in plan.files.values()
    )
    sections: list[Section] = [
        Facts(title, tuple(facts)),
        Table("Files", ("file", "size", "change"), rows, right=("size",)),
    ]
    if not result.validated:
        sections.append(Sentence("No validation covers these files (--force).", warns=True))
    return sections


def _announcement(plan: PublishPlan) -> str:
    """Say in one line what is about to be done."""
    size = _count(len(plan.upload), sum(file.nbytes for file in plan.upload))
    removed = f"; to remove there: {', '.join(plan.remove)}" if plan.remove else ""
    stays = f"; stays here: {', '.join(plan.left_out)}" if plan.left_out else ""
    return f"to upload: {size}{removed}{stays}"


def _count(count: int, nbytes: int) -> str:
    return f"{files_text(count)}, {bytes_text(nbytes)}"

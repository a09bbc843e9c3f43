"""`kimi-convert download`: fetch a checkpoint from the Hugging Face Hub."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kimi_convert.commands._numbers import bytes_text, files_text
from kimi_convert.commands._options import JsonOpt, QuietOpt, VerboseOpt
from kimi_convert.commands._output import Output
from kimi_convert.commands._report import Facts, Report, Section, Table

if TYPE_CHECKING:
    from kimi_convert.hub import DownloadResult

EXAMPLE = "kimi-convert download moonshotai/Moonlight-16B-A3B --local-dir ./Moonlight-16B-A3B"

RepositoryArg = Annotated[
    str,
    typer.Argument(metavar="REPO", help="org/name or org/name@revision.", show_default=False),
]
RevisionOpt = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit; by default main.", show_default=False),
]
LocalDirOpt = Annotated[
    Path | None,
    typer.Option(
        "--local-dir",
        metavar="DIR",
        help="Folder for the files; by default the Hub's cache, shared with other programs.",
        show_default=False,
    ),
]
IncludeOpt = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN", help="Files to fetch instead of the default.", show_default=False
    ),
]
ExcludeOpt = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Files not to fetch.", show_default=False),
]
MaxWorkersOpt = Annotated[
    int, typer.Option("--max-workers", min=1, help="Files that are fetched at a time.")
]
DryRunOpt = Annotated[bool, typer.Option("--dry-run", help="Show what would be fetched.")]


def download(
    repository: RepositoryArg,
    revision: RevisionOpt = None,
    local_dir: LocalDirOpt = None,
    include: IncludeOpt = None,
    exclude: ExcludeOpt = None,
    max_workers: MaxWorkersOpt = 8,
    dry_run: DryRunOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Fetch a checkpoint from the Hub; goes on where it was cut, and checks every hash.

    By default weights in safetensors format, configuration, tokenizer and terms: no pickle, no code.
    """
    from kimi_convert.hub import download_checkpoint

    output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
    with output.progress() as on_progress:
        result = download_checkpoint(
            repository,
            revision=revision,
            local_dir=local_dir,
            include=include or (),
            exclude=exclude or (),
            max_workers=max_workers,
            dry_run=dry_run,
            on_progress=on_progress,
        )
    output.show(result, lambda: download_report(result))


def download_report(result: DownloadResult) -> Report:
    """Return what `download` shows."""
    missing = [file for file in result.files if not file.was_there]
    count = files_text(len(missing))
    facts = (
        ("commit", result.commit),
        ("folder", str(result.folder)),
        ("all files", f"{files_text(len(result.files))}, {bytes_text(result.nbytes)}"),
        (
            "to fetch" if result.dry_run else "fetched",
            f"{count}, {bytes_text(result.fetched_bytes)}",
        ),
    )
    title = "Would download" if result.dry_run else "Downloaded"
    sections: list[Section] = [Facts(f"{title} {result.reference}", facts)]
    if result.dry_run and missing:
        rows = tuple((file.path, bytes_text(file.nbytes)) for file in missing)
        sections.append(Table("To fetch", ("file", "size"), rows, right=("size",)))
    if result.left_out:
        reasons = Counter(why for _, why in result.left_out)
        rows = tuple((str(count), why) for why, count in reasons.items())
        sections.append(Table("Left out", ("files", "why"), rows, right=("files",)))
    return sections

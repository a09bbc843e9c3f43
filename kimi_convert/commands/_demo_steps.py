"""The steps of `demo`: every job of the command line on the example that comes with the package."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import join
from typing import TYPE_CHECKING

from kimi_convert.commands._continuation import Continuation, Request, continue_text
from kimi_convert.commands._demo_folder import DemoFolder, open_demo_folder
from kimi_convert.commands._output import Output
from kimi_convert.commands._report import Heading, Report, Sentence
from kimi_convert.commands.convert import conversion_report
from kimi_convert.commands.export import export_report
from kimi_convert.commands.inspect import checkpoint_report
from kimi_convert.commands.plan import brief_plan
from kimi_convert.commands.validate import brief_report

if TYPE_CHECKING:
    from kimi_convert.conversion import ConversionPlan, ConversionResult
    from kimi_convert.exporters.safetensors import ExportResult
    from kimi_convert.model.summary import CheckpointSummary
    from kimi_convert.validation import ValidationReport
    from kimi_convert.validation.report import Scores

# A fifth of the default text: a demo is to end within three minutes.
RECIPE = """\
[calibration]
tokens = 24576
search_tokens = 6144
validation_tokens = 4096
"""
KIL_RECIPE = f"""\
[init]
method = "kil"  # copied projections, one constant decay
[layers]
keep = "released"
{RECIPE}"""
_SEQUENCE_LENGTH = 512
_TOKENS_PER_KIND = 4096
_EXPORT_SHARD_SIZE = "8MB"
_PROMPT = "The history of"
_NEW_TOKENS = 48
_QUALITY_ALONE = frozenset({"quality"})


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """What each step gave."""

    folder: Path
    summary: CheckpointSummary
    conversion: ConversionResult
    validation: ValidationReport
    export: ExportResult
    baselines: Mapping[str, Scores]  # what other starts are worth, by name
    continuations: tuple[Continuation, ...]  # the teacher's and the hybrid's
    seconds: Mapping[str, float]  # of each step

    def to_json(self) -> dict[str, object]:
        """Return the document that `demo --json` prints."""
        return {
            "output": str(self.folder),
            "inspect": self.summary.to_json(),
            "convert": self.conversion.to_json(),
            "validate": self.validation.to_json(),
            "baselines": {name: asdict(scores) for name, scores in self.baselines.items()},
            "export": self.export.to_json(),
            "generate": [continuation.to_json() for continuation in self.continuations],
            "seconds": {step: round(seconds, 3) for step, seconds in self.seconds.items()},
        }


def run_demo(folder: Path, *, output: Output) -> DemoResult:
    """Run every step into a folder, and show each as it ends.

    Raises:
        OutputError: the folder holds files that an earlier demo did not make.
    """
    from kimi_convert.checkpoints.examples import example_checkpoint

    demo = _Demo(open_demo_folder(folder), example_checkpoint(), output)
    if demo.folder.replaced:
        output.note(f"replaced the output of an earlier demo in {folder}")
    summary = demo.inspect()
    demo.plan()
    return DemoResult(
        folder=folder,
        summary=summary,
        conversion=demo.convert(),
        validation=demo.validate(),
        baselines=demo.baselines(),
        export=demo.export(),
        continuations=(demo.generate(demo.source), demo.generate(demo.hybrid)),
        seconds=demo.seconds,
    )


class _Demo:
    """The folders, and what each step does in them."""

    def __init__(self, folder: DemoFolder, source: Path, output: Output) -> None:
        self.folder = folder
        self.source = source
        self.hybrid = folder.path / "hybrid"
        self.exported = folder.path / "exported"
        self.output = output
        self.seconds: dict[str, float] = {}

    def inspect(self) -> CheckpointSummary:
        from kimi_convert.model.summary import summarize_checkpoint

        with self._step("inspect", self.source):
            summary = summarize_checkpoint(self.source)
        self._show(checkpoint_report(summary)[:1])
        return summary

    def plan(self) -> ConversionPlan:
        from kimi_convert.config.recipe import load_recipe
        from kimi_convert.conversion import plan_conversion

        with self._step("plan", self.source):
            plan = plan_conversion(self.source, load_recipe(None))
        self._show(brief_plan(plan))
        return plan

    def convert(self) -> ConversionResult:
        result = self._convert("hybrid", RECIPE)
        self._show(conversion_report(result))
        return result

    def baselines(self) -> Mapping[str, Scores]:
        """Convert the other ways, and score them on the same text."""
        others = {"copied, KIL's decay": ("kil", KIL_RECIPE), "copied, no text": ("copy", None)}
        found: dict[str, Scores] = {}
        for label, (name, recipe) in others.items():
            self._convert(name, recipe)
            quality = self._validate(self.folder.path / name, checks=_QUALITY_ALONE).quality
            assert quality is not None
            found[label] = quality.student.overall
        return found

    def _convert(self, name: str, recipe: str | None) -> ConversionResult:
        """Convert the example by a recipe, or without text."""
        from kimi_convert.config.recipe import load_recipe, without_text
        from kimi_convert.conversion import convert_checkpoint
        from kimi_convert.conversion.fitted import work_folder

        output = self.folder.path / name
        if recipe is None:
            options, chosen = ("--no-text",), without_text(load_recipe(None))
        else:
            path = self.folder.path / f"{name}.toml"
            with self.folder.making(path):
                path.write_text(recipe, encoding="utf-8")
            options, chosen = ("--recipe", str(path)), load_recipe(path)
        making = self.folder.making(output, work_folder(output))
        step = self._step("convert", self.source, output, *options)
        with making, step, self.output.progress() as progress:
            return convert_checkpoint(self.source, output, recipe=chosen, on_progress=progress)

    def validate(self) -> ValidationReport:
        report = self._validate(self.hybrid)
        self._show(brief_report(report))
        return report

    def _validate(
        self, checkpoint: Path, checks: frozenset[str] | None = None
    ) -> ValidationReport:
        from kimi_convert.checkpoints.examples import heldout_text
        from kimi_convert.validation import ValidationOptions, validate_checkpoint
        from kimi_convert.validation.options import Check

        text = heldout_text()
        options = ValidationOptions(
            checks=frozenset(Check) if checks is None else frozenset(map(Check, checks)),
            sequence_length=_SEQUENCE_LENGTH,
            max_tokens_per_kind=_TOKENS_PER_KIND,
        )
        limits = ("--max-tokens-per-kind", _TOKENS_PER_KIND)
        arguments = (checkpoint, "--teacher", self.source, "--text", text, *limits)
        with self._step("validate", *arguments), self.output.progress() as progress:
            return validate_checkpoint(
                checkpoint, teacher=self.source, text=text, options=options, on_progress=progress
            )

    def export(self) -> ExportResult:
        from kimi_convert.checkpoints.byte_size import parse_byte_size
        from kimi_convert.exporters.safetensors import export_safetensors

        options = ("--dtype", "float32", "--max-shard-size", _EXPORT_SHARD_SIZE)
        step = self._step("export safetensors", self.hybrid, self.exported, *options)
        with self.folder.making(self.exported), step, self.output.progress() as progress:
            result = export_safetensors(
                self.hybrid,
                self.exported,
                max_shard_bytes=parse_byte_size(_EXPORT_SHARD_SIZE),
                dtype="float32",
                on_progress=progress,
            )
        self._show(export_report(result))
        return result

    def generate(self, checkpoint: Path) -> Continuation:
        request = Request(prompt=_PROMPT, max_new_tokens=_NEW_TOKENS, temperature=0.7)
        options = ("--prompt", _PROMPT, "--max-new-tokens", _NEW_TOKENS, "--temperature", 0.7)
        with self._step("generate", checkpoint, *options):
            made = continue_text(checkpoint, request, show="".join)
        lines = f"{made.request.prompt}{made.text}".splitlines()
        self._show([Sentence("\n".join(f"  {line}" for line in lines))])
        return made

    @contextmanager
    def _step(self, command: str, *arguments: object) -> Generator[None]:
        """Show the command that does the same, and take the time."""
        shown = join(map(str, arguments))
        self._show([Heading(f"$ kimi-convert {command} {shown}")])
        started = time.perf_counter()
        yield
        self.seconds[command] = self.seconds.get(command, 0.0) + time.perf_counter() - started

    def _show(self, report: Report) -> None:
        self.output.report(report)

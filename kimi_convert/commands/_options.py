"""Arguments and options that several commands share, each defined once."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kimi_convert.config.output_format import MtpLayers, TargetDtype


class Dtype(StrEnum):
    """The dtypes that weights are written in and models run in; the names are torch's."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class EngineName(StrEnum):
    """What runs the jobs of a conversion."""

    LOCAL = "local"
    RAY = "ray"


class CheckName(StrEnum):
    """The parts of a validation that can be left out; the names are `Check`'s."""

    VALUES = "values"
    HASHES = "hashes"
    CONSISTENCY = "consistency"
    QUALITY = "quality"
    ABLATION = "ablation"
    REPLACEMENT = "replacement"
    PROBES = "probes"
    GREEDY = "greedy"


class BackendName(StrEnum):
    """The implementations of the kernels that models run on."""

    TORCH = "torch"
    TRITON = "triton"


SourceArg = Annotated[
    Path,
    typer.Argument(
        metavar="SOURCE",
        help="The MLA checkpoint to convert: a folder, or org/name[@revision] on the Hub.",
        show_default=False,
    ),
]
CheckpointArg = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a checkpoint.", show_default=False)
]
NamedCheckpointArg = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A folder, or org/name[@revision] on the Hub.",
        show_default=False,
    ),
]
OutputArg = Annotated[
    Path,
    typer.Argument(metavar="OUTPUT", help="Folder to write; new or empty.", show_default=False),
]
RecipeOpt = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        metavar="FILE",
        help="Recipe in TOML; every field has a default.",
        show_default=False,
    ),
]
CalibrationOpt = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        help="Text to fit the new mixers to: .jsonl or .txt; by default one that is bundled.",
        show_default=False,
    ),
]
DeviceOpt = Annotated[
    str, typer.Option("--device", metavar="DEVICE", help="Where models run: cpu, cuda, cuda:1.")
]
BackendOpt = Annotated[
    BackendName | None,
    typer.Option(
        "--backend",
        help="Kernels of KDA, convolutions and norms; by default triton on a GPU, else torch.",
        show_default=False,
    ),
]
ModelDtypeOpt = Annotated[
    Dtype, typer.Option(help="Of weights and activations; a narrower one takes less memory.")
]
MaxShardSizeOpt = Annotated[
    str, typer.Option("--max-shard-size", metavar="SIZE", help="Largest file of weights to write.")
]
EngineOpt = Annotated[
    EngineName,
    typer.Option(
        "--engine",
        help="What writes the files: this machine, or a Ray cluster with shared storage.",
    ),
]
ResumeOpt = Annotated[
    bool,
    typer.Option("--resume", help="Go on from the files that an interrupted run has finished."),
]
DtypeOpt = Annotated[
    TargetDtype,
    typer.Option(
        "--dtype",
        help="What feed-forward weights are stored in: as the source says, or FP8 blocks.",
    ),
]
MtpOpt = Annotated[
    MtpLayers,
    typer.Option("--mtp", help="Whether multi-token-prediction layers are carried over."),
]
JobsOpt = Annotated[
    int,
    typer.Option(
        "--jobs", metavar="N", min=1, help="How many files are written at once, in processes."
    ),
]
JsonOpt = Annotated[
    bool, typer.Option("--json", help="Print one JSON document, for results and errors alike.")
]
QuietOpt = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
VerboseOpt = Annotated[
    bool, typer.Option("--verbose", "-v", help="Print the log, and the traceback of a bug.")
]

DEFAULT_MAX_SHARD_SIZE = "5GB"

"""`kimi-convert doctor`: what this machine and this installation can do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kimi_convert.commands._numbers import bytes_text
from kimi_convert.commands._options import JsonOpt, QuietOpt, VerboseOpt
from kimi_convert.commands._output import Output
from kimi_convert.commands._report import Facts, Report, Table

if TYPE_CHECKING:
    from kimi_convert.commands._environment import Environment

EXAMPLE = "kimi-convert doctor"


def doctor(as_json: JsonOpt = False, quiet: QuietOpt = False, verbose: VerboseOpt = False) -> None:
    """Show versions, devices, free disk and memory, and what is missing for which feature."""
    from kimi_convert.commands._environment import read_environment

    output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
    environment = read_environment()
    output.show(environment, lambda: _report(environment))


def _report(environment: Environment) -> Report:
    machine = (
        ("Python", environment.python),
        ("system", environment.system),
        ("CPU threads", str(environment.cpu_threads)),
        ("free memory", _known(environment.free_memory_bytes)),
        ("free disk here", f"{_known(environment.free_disk_bytes)} in {environment.folder}"),
        *(("device", device) for device in environment.devices),
    )
    packages = tuple(
        (package.name, package.version or "not installed") for package in environment.packages
    )
    features = tuple(
        (feature.name, "yes" if feature.available else "no", feature.get)
        for feature in environment.features
    )
    return (
        Facts(f"kimi-convert {environment.version}", machine),
        Table("Packages", ("package", "version"), packages),
        Table("Features", ("feature", "available", "to get it"), features),
    )


def _known(nbytes: int | None) -> str:
    return "unknown" if nbytes is None else bytes_text(nbytes)

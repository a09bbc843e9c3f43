"""The sink: which stream carries what in each of the three forms."""

from __future__ import annotations

import json
import logging
import math

import pytest

from kimi_convert.commands._output import Output
from kimi_convert.commands._report import Sentence
from kimi_convert.config.progress import ProgressEvent

EVENT = ProgressEvent("working", 1, 1, "layers")


class Result:
    def __init__(self, **document):
        self.document = document

    def to_json(self):
        return self.document


def use(output):
    """Print one of everything."""
    output.note("a note")
    with output.progress() as on_progress:
        on_progress(EVENT)
    output.report([Sentence("a part")])
    output.show(Result(answer=42), lambda: [Sentence("a result")])


def test_human_results_go_to_stdout_and_the_rest_to_stderr(capsys):
    use(Output())
    told = capsys.readouterr()
    assert told.out == "a part\na result\n"
    assert told.err == "a note\nworking: 100% (1 of 1 layers)\n"


def test_json_prints_one_document_on_stdout(capsys):
    use(Output(as_json=True))
    told = capsys.readouterr()
    assert json.loads(told.out) == {"answer": 42}
    assert told.err == "a note\nworking: 100% (1 of 1 layers)\n"


def test_quiet_prints_nothing(capsys):
    use(Output(quiet=True))
    told = capsys.readouterr()
    assert told.out + told.err == ""


def test_quiet_json_prints_only_the_document(capsys):
    use(Output(as_json=True, quiet=True))
    told = capsys.readouterr()
    assert json.loads(told.out) == {"answer": 42}
    assert told.err == ""


def test_json_result_does_not_build_the_report():
    Output(as_json=True).show(Result(), lambda: pytest.fail("built"))


def test_numbers_that_json_lacks_become_null(capsys):
    Output(as_json=True).show(
        Result(loss=math.nan, rows=[{"kl": math.inf}], pair=(1.5, -math.inf)), list
    )
    assert json.loads(capsys.readouterr().out) == {
        "loss": None,
        "rows": [{"kl": None}],
        "pair": [1.5, None],
    }


@pytest.mark.parametrize("quiet", [False, True], ids=["human", "quiet"])
def test_streamed_text_is_printed_as_it_comes(capsys, quiet):
    seen = []

    def pieces():
        for piece in ("To ", "be"):
            yield piece
            seen.append(capsys.readouterr().out)

    assert Output(quiet=quiet).stream(pieces()) == "To be"
    assert seen == ["To ", "be"]


def test_streamed_text_is_kept_for_the_document(capsys):
    assert Output(as_json=True).stream(iter(["To ", "be"])) == "To be"
    assert capsys.readouterr().out == ""


def test_generated_text_cannot_steer_the_terminal(capsys):
    Output().stream(iter(["a\x1b[2Jb\n\tc"]))
    assert capsys.readouterr().out == "a\\x1b[2Jb\n\tc\n"


@pytest.mark.parametrize(
    ("options", "levels"),
    [
        ({}, ["warning", "error"]),
        ({"verbose": True}, ["info", "warning", "error"]),
        ({"quiet": True}, ["error"]),
    ],
    ids=["human", "verbose", "quiet"],
)
def test_library_log_shows_on_stderr_by_level(capsys, options, levels):
    Output(**options)
    log = logging.getLogger("kimi_convert.checkpoints.index")
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        log.log(level, "%s", "said")
    told = capsys.readouterr()
    assert told.err.splitlines() == [f"{level}: said" for level in levels]
    assert told.out == ""

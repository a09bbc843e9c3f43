"""What is said about the worth of converted mixers."""

from __future__ import annotations

import math

import pytest

from kimi_convert.commands._scores import models_table, worth
from kimi_convert.validation.report import ModelScores, QualityReport, Scores


def scored(loss, kl=None):
    scores = Scores(
        tokens=10, loss=loss, perplexity=math.exp(loss), kl=kl, top1_agreement=kl and 0.5
    )
    return ModelScores(overall=scores, by_kind={}, by_position=())


def quality(student, ablated, teacher=None):
    return QualityReport(student=student, teacher=teacher, ablated=ablated, layers=())


@pytest.mark.parametrize(
    ("student", "ablated", "help_"),
    [
        pytest.param(scored(9.0, kl=1.0), scored(8.0, kl=2.0), True, id="kl-decides"),
        pytest.param(scored(7.0, kl=2.5), scored(8.0, kl=2.0), False, id="kl-worse"),
        pytest.param(scored(7.0, kl=2.0), scored(8.0, kl=2.0), False, id="equal-is-no-help"),
        pytest.param(scored(7.0, kl=math.nan), scored(8.0, kl=2.0), False, id="nan-is-no-help"),
        pytest.param(scored(7.0), scored(8.0), True, id="loss-without-kl"),
        pytest.param(scored(8.5), scored(8.0), False, id="worse-loss-without-kl"),
    ],
)
def test_worth_compares_with_mixers_switched_off(student, ablated, help_):
    sentence = worth(quality(student, ablated))
    assert sentence.text.startswith(
        "The converted mixers help:" if help_ else "The converted mixers do not help yet:"
    )
    assert sentence.warns != help_


def test_worth_gives_both_numbers():
    text = worth(quality(scored(9.0, kl=1.234), scored(8.0, kl=2.345))).text
    assert "1.234" in text
    assert "2.345" in text


def test_worth_says_nothing_without_the_ablation():
    assert worth(quality(scored(7.0, kl=1.0), None)) is None


def test_models_table_has_a_row_for_each_measured_model_and_dashes_for_what_is_absent():
    table = models_table(quality(scored(2.0, kl=1.0), scored(3.0, kl=2.0), teacher=scored(1.0)))
    assert [row[0] for row in table.rows] == [
        "teacher",
        "this checkpoint",
        "converted mixers switched off",
    ]
    assert table.rows[0][-2:] == ("-", "-")
    assert [row[2] for row in models_table(quality(scored(2.0), None)).rows] == ["2.0000"]

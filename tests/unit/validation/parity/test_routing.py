from __future__ import annotations

import torch

from kimi_convert.validation.parity.routing import explained_choices


def dense(scores, count=2):
    best = scores.topk(count, -1)
    return torch.zeros_like(scores).scatter(-1, best.indices, best.values)


def explained(found, expected):
    return explained_choices(
        found, dense(found), expected_scores=expected, expected_weights=dense(expected)
    ).tolist()


def test_equal_choices_need_no_explanation():
    scores = torch.tensor([[0.9, 0.5, 0.4, 0.1]])
    assert explained(scores, scores) == [False]


def test_scores_closer_than_the_runs_are_explain_another_choice():
    expected = torch.tensor([[0.9, 0.500, 0.499, 0.1]])
    found = torch.tensor([[0.9, 0.4995, 0.4996, 0.1]])
    assert explained(found, expected) == [True]


def test_another_choice_from_the_same_scores_is_not_explained():
    scores = torch.tensor([[0.9, 0.5, 0.4, 0.1]])
    wrong = dense(scores).roll(1, -1)
    found = explained_choices(
        scores, wrong, expected_scores=scores, expected_weights=dense(scores)
    )
    assert found.tolist() == [False]


def test_a_group_goes_with_all_its_experts():
    expected = torch.tensor([[0.9, 0.5, 0.2, 0.1, 0.701, 0.7, 0.1, 0.1]])  # groups 1.400, 1.401
    found = expected.clone()
    found[0, 1] += 0.002

    def chosen(scores, group):
        return dense(scores * torch.tensor([[group == 0] * 4 + [group == 1] * 4]))

    before, after = chosen(expected, 1), chosen(found, 0)
    for groups, tied in ((2, True), (1, False)):
        result = explained_choices(
            found, after, expected_scores=expected, expected_weights=before, groups=groups
        )
        assert result.tolist() == [tied]

"""Near ties between experts: where rounding decides which expert a token goes to.

Two experts that score almost alike change places with the last bit, and the values of that token
then differ by per cents, though nothing is wrong. A choice that differs is explained if the scores
that changed places are no further apart than the scores of the two runs are. What is explained is
followed (the run takes the reference's experts for that token) or left out of the comparison, and
counted; what is not explained stays, and shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from kimi_convert.config.architecture import ModelConfig, TopkMethod
from kimi_convert.model.moe import Router, Routing
from kimi_convert.validation.parity.probes import expert_weights

# Scores that are equal to the last bit but one are a tie, whatever the other run rounded to.
_LAST_BITS = 4.0


@dataclass(slots=True)
class Follower:
    """Has a router's near ties decided as in the reference; a forward hook."""

    scores: torch.Tensor  # [N, E], the reference's
    weights: torch.Tensor  # [N, E], the reference's
    groups: int = 1  # of experts, that are ruled out by the sum of their two best
    followed: int = field(default=0)  # tokens

    def __call__(
        self, router: nn.Module, inputs: tuple[torch.Tensor, ...], found: Routing
    ) -> Routing:
        """Stand in for the result of a router."""
        assert isinstance(router, Router)
        _, scores = router.scores(inputs[0])
        mine = expert_weights(found, scores.shape[-1])
        tied = explained_choices(
            scores,
            mine,
            expected_scores=self.scores,
            expected_weights=self.weights,
            groups=self.groups,
        )
        self.followed += int(tied.sum())
        experts = self.weights.topk(found.experts.shape[-1], -1).indices
        weights = self.weights.gather(-1, experts).to(found.weights.dtype)
        return Routing(
            torch.where(tied[:, None], weights, found.weights),
            torch.where(tied[:, None], experts, found.experts),
        )


def explained_choices(
    scores: torch.Tensor,
    weights: torch.Tensor,
    *,
    expected_scores: torch.Tensor,
    expected_weights: torch.Tensor,
    groups: int = 1,
) -> torch.Tensor:
    """Tell which tokens chose other experts than the reference, because of a near tie.

    Args:
        scores: [..., E], what experts were chosen by.
        weights: [..., E], 0 where an expert was not chosen.
        expected_scores: the reference's.
        expected_weights: the reference's.
        groups: of experts; the choice is limited to the best by the sum of their two best scores.

    Returns:
        [...] bool.
    """
    chosen, expected = weights != 0, expected_weights != 0
    lost, won = expected & ~chosen, chosen & ~expected
    moved = (scores - expected_scores).abs().amax(-1)
    ulp = torch.finfo(expected_scores.dtype).eps * expected_scores.abs().amax(-1)
    room = 2 * moved + _LAST_BITS * ulp
    # Every expert that was lost lies above every one that was won, so all must be near.
    near = (
        _extreme(expected_scores, lost, most=True) - _extreme(expected_scores, won, most=False)
        <= room
    )
    if groups > 1:
        best = expected_scores.unflatten(-1, (groups, -1)).topk(2, -1).values.sum(-1)
        of_group = best.repeat_interleave(expected_scores.shape[-1] // groups, -1)
        # With a group, its experts go at once, however they score themselves.
        gap = _extreme(of_group, lost, most=False) - _extreme(of_group, won, most=True)
        near |= gap <= 2 * room
    return lost.any(-1) & near


def _extreme(scores: torch.Tensor, among: torch.Tensor, *, most: bool) -> torch.Tensor:
    """Return the largest or smallest score [...] among some experts, infinite if there are none."""
    if most:
        return scores.masked_fill(~among, float("-inf")).amax(-1)
    return scores.masked_fill(~among, float("inf")).amin(-1)


def groups_of(config: ModelConfig) -> int:
    """Return how many groups limit the choice of experts; 1 if none do."""
    moe = config.moe
    limited = moe is not None and moe.topk_method is TopkMethod.NOAUX_TC
    return moe.num_groups if moe is not None and limited else 1

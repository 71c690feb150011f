"""What a credit rule reads and what it gives: rollouts of one group in, credits for their calls out.

A rule says what each call is worth and with whom it is compared; how much better than those it is, is computed from that by
the objective (`algorithms.advantage`), the same way for every rule.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Protocol

from msgspec import Struct

from lightning_rl.episode import Call, Episode


class Rollout(Struct, frozen=True, kw_only=True):
    """One counted episode of a group, as a rule sees it: see `credit.rollouts.rollout_of`."""

    episode: Episode
    calls: list[Call]
    """What the learner did, in order of arrival. Calls of others are left out."""
    agents: dict[str, str]
    """By call id: the name of the agent that made it, "" if nobody knows."""
    earned: dict[str, float]
    """By call id: the weighted sum of the rewards at the call (see `credit.placement`); every call of `calls` has an entry."""
    outcome: float
    """The weighted sum of all other rewards: those of the episode as a whole, and those at calls of others."""
    values: dict[str, list[float]] = {}
    """By call id: the critic's value of the state before each sampled token. Empty where no critic is trained."""

    @property
    def id(self) -> str:
        return self.episode.id

    @property
    def ret(self) -> float:
        """R, the episode's return."""
        return math.fsum([*self.earned.values(), self.outcome])

    def earned_at(self, k: int) -> float:
        """What the k-th call earned, counted from 0; 0 where the rollout had ended."""
        return self.earned[self.calls[k].id] if k < len(self.calls) else 0.0


Scope = Hashable
"""Who is compared with whom: names one set of points, `Credits.scopes[scope]`."""


class Term(Struct, frozen=True, kw_only=True):
    """A part of a call's advantage: weight · (value − baseline of the scope) / scale of the scope."""

    value: float
    scope: Scope
    weight: float = 1.0
    centred: bool = False
    """Whether the value is a difference already, from which no baseline is taken; it is still divided by the scope's scale."""


class Credits(Struct, frozen=True, kw_only=True):
    """What a rule makes of one group."""

    returns: dict[str, float]
    """By call id: what the rule gives the call, as people see it. A rule that preserves sums gives each rollout's R in all."""
    terms: dict[str, list[Term]] = {}
    """By call id: what its advantage is the sum of. A call without terms gets no credit (`Mask.NO_CREDIT`)."""
    scopes: dict[Scope, dict[str, float]] = {}
    """By scope and rollout id: one point a rollout, however many calls it made. Baseline and scale are over these."""
    alone: frozenset[str] = frozenset()
    """Ids of calls that the rule can compare with nobody: not trained on, whatever the objective's baseline
    (`Mask.GROUP_OF_ONE`). For terms that are not centred that is found from the scopes."""
    token_advantages: dict[str, list[float]] = {}
    """By call id, instead of terms: advantages of its sampled tokens that need no baseline (of rules with a critic)."""
    value_targets: dict[str, list[float | None]] = {}
    """By call id: what the critic should have said before each sampled token; None where it is not asked."""


class CreditRule(Protocol):
    """A rule's function. Its parameters, if any, are keywords with defaults; a recipe sets them by name."""

    def __call__(self, group: Sequence[Rollout]) -> Credits | Mapping[str, float]:
        """Pure. A mapping is short for `compared_in_group(group, mapping)`."""
        ...


GROUP: Scope = "group"
"""The scope of whole rollouts."""
OUTCOME: Scope = "outcome"
"""The scope of outcomes, beside which calls have scopes of their own."""


def compared_in_group(group: Sequence[Rollout], returns: Mapping[str, float]) -> Credits:
    """Each call's return is compared with the other rollouts', of which each counts as the mean of its calls' returns."""
    points = {
        rollout.id: math.fsum(returns[call.id] for call in rollout.calls) / len(rollout.calls)
        for rollout in group
        if rollout.calls
    }
    return Credits(
        returns=dict(returns),
        terms={call.id: [Term(value=returns[call.id], scope=GROUP)] for r in group for call in r.calls},
        scopes={GROUP: points},
    )

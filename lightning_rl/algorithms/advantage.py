"""How much better a return is than what its company earned.

The company is a scope of a credit rule, by default the group: the rollouts of one task under one policy. Each rollout is one
point of it, however many calls it made: a baseline over calls would lean towards the longer rollouts.

With R_1 … R_G the points of a scope, R̄ their mean and s their unbiased standard deviation:

    group_mean              A_i = R_i − R̄                     Dr. GRPO, arXiv 2503.20783
    group_mean, std         A_i = (R_i − R̄) / (s + 1e-4)       GRPO, arXiv 2402.03300
    leave_one_out           A_i = G/(G−1) (R_i − R̄)            RLOO, arXiv 2402.14740
    none                    A_i = R_i                          REINFORCE

A rule may give the calls of one rollout values of their own in one scope. Then the spread of those around the rollout's point
belongs to s, too, each rollout weighing the same: else such values would be divided by the spread of means that may be all equal.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

from msgspec import Struct

from lightning_rl.algorithms.settings import AdvantageSettings
from lightning_rl.credit.records import Credits, Scope, Term

EPSILON = 1e-4
"""Added to the standard deviation, as TRL does."""


class Estimate(Struct, frozen=True, kw_only=True):
    """Of one call."""

    advantage: float
    alone: bool = False
    """Whether there was nobody to compare it with: so says the rule, or a baseline is asked for and no other rollout has a point in
    its scopes."""


def estimate(credits: Credits, settings: AdvantageSettings, rollout_of: Mapping[str, str]) -> dict[str, Estimate]:
    """By call id, for the calls with terms and those that are alone. `rollout_of`: call id -> rollout id."""
    within = _within(credits, rollout_of)
    scales = {
        scope: scale([*points.values()], settings, within.get(scope, 0.0)) for scope, points in credits.scopes.items()
    }

    def of(terms: Sequence[Term], rollout: str) -> Estimate:
        alone = settings.baseline != "none" and not any(
            term.centred or _has_company(credits.scopes[term.scope], rollout) for term in terms
        )
        parts = [
            term.weight * _difference(term, credits.scopes[term.scope], settings, rollout) / scales[term.scope]
            for term in terms
        ]
        return Estimate(advantage=0.0 if alone else math.fsum(parts), alone=alone)

    found = {call_id: of(terms, rollout_of[call_id]) for call_id, terms in credits.terms.items() if terms}
    return found | {call_id: Estimate(advantage=0.0, alone=True) for call_id in credits.alone}


def _has_company(points: Mapping[str, float], rollout: str) -> bool:
    return len(points) > (rollout in points)


def _difference(term: Term, points: Mapping[str, float], settings: AdvantageSettings, rollout: str) -> float:
    """0 for what nobody can be compared with, and for what is rounding only."""
    if settings.baseline == "none" and not term.centred:
        return term.value
    if term.centred:
        difference = term.value
    elif not _has_company(points, rollout):
        return 0.0
    else:
        others = [value for id, value in points.items() if id != rollout or settings.baseline == "group_mean"]
        difference = term.value - statistics.fmean(others)
    rounding = 1e-9 * max(map(abs, points.values()), default=0.0) + 1e-12
    return 0.0 if abs(difference) <= rounding else difference


def scale(values: Sequence[float], settings: AdvantageSettings, within: float = 0.0) -> float:
    """`std`: the unbiased standard deviation + 1e-4. `none`: 1, which does not favour tasks that nearly always or nearly never
    succeed. `within`: the mean over rollouts of the mean square of their calls' values around the rollout's point."""
    if settings.normalise == "none" or len(values) < 2:
        return 1.0
    mean = statistics.fmean(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance + within) + EPSILON


def _within(credits: Credits, rollout_of: Mapping[str, str]) -> dict[Scope, float]:
    """By scope: see `scale`. 0 where every call has the value of its rollout's point."""
    squares: dict[Scope, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for call_id, terms in credits.terms.items():
        for term in terms:
            rollout = rollout_of[call_id]
            if not term.centred and (point := credits.scopes[term.scope].get(rollout)) is not None:
                squares[term.scope][rollout].append((term.value - point) ** 2)
    return {
        scope: math.fsum(map(statistics.fmean, by_rollout.values())) / len(credits.scopes[scope])
        for scope, by_rollout in squares.items()
    }

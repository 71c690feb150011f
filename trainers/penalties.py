"""What an objective takes from rewards: for length, and for leaving the reference policy.

With k_t what token t costs (`algorithms.kl.penalties`):

    place `reward`         r_call ← r_call − Σ_t k_t        over the call's tokens; it goes through credit and baseline
    place `token_reward`   A_t ← A_t − Σ_{u ≥ t} k_u        over the tokens of the rollout's calls of the learner, in order

The second is the return-to-go of REINFORCE++ (arXiv 2501.03262): a penalty counts for every token up to it, and for none after. No
baseline is taken from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from msgspec import structs

from lightning_rl.algorithms.kl import penalties
from lightning_rl.algorithms.settings import Kl, Settings
from lightning_rl.algorithms.shaping import overlong
from lightning_rl.episode import Call
from lightning_rl.scores import CallScores
from lightning_rl.transition import Transition, mean


def call_shaping(
    calls: Iterable[Call], settings: Settings, max_tokens: int, scores: Mapping[str, CallScores]
) -> dict[str, float]:
    """By call id: what is added to the reward of each of the calls; calls that nothing is added to may be left out.

    `max_tokens` is `sampling.max_tokens`. Tokens without scores, which are beyond a row, cost nothing.
    """
    shaping = {}
    for call in calls:
        parts = []
        if settings.overlong is not None:
            parts.append(overlong(len(call.sampled_ids), settings.overlong, max_tokens))
        if settings.kl is not None and settings.kl.place == "reward":
            parts += [-penalty for penalty in _penalties(settings.kl, scores.get(call.id))]
        if parts:
            shaping[call.id] = math.fsum(parts)
    return shaping


def token_penalised(
    transitions: Sequence[Transition],
    settings: Settings,
    calls_of: Mapping[str, Sequence[Call]],
    scores: Mapping[str, CallScores],
) -> list[Transition]:
    """The transitions with the penalties of the place `token_reward`. `calls_of`: rollout id -> the learner's calls in order.

    Masked transitions stay as they are, but their tokens count for those before them: the policy did sample them.
    """
    if settings.kl is None or settings.kl.place != "token_reward":
        return list(transitions)
    to_go: dict[str, list[float]] = {}
    for calls in calls_of.values():
        rest = 0.0
        for call in reversed(calls):
            costs = _penalties(settings.kl, scores.get(call.id))
            own = [rest] * len(call.sampled_ids)
            for t in reversed(range(len(costs))):
                rest += costs[t]
                own[t] = rest
            to_go[call.id] = own

    def penalised(transition: Transition) -> Transition:
        if transition.masked is not None or not transition.sampled_ids:
            return transition
        tokens = [a - k for a, k in zip(transition.advantages, to_go[transition.call_id], strict=True)]
        return structs.replace(transition, advantage=mean(tokens), token_advantages=tokens)

    return [penalised(transition) for transition in transitions]


def _penalties(kl: Kl, scores: CallScores | None) -> list[float]:
    return penalties(kl, scores.old, scores.reference) if scores else []

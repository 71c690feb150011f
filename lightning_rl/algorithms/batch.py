"""Advantages compared over the whole step.

    mean    A ← A − mean over the rollouts
    std     A ← (A − mean over the tokens) / sqrt(variance over the tokens + 1e-8)

`mean`: the baseline of REINFORCE. Each rollout is one point of it, the mean over its tokens that are trained on, however many calls
it made. `std`: REINFORCE++ (arXiv 2501.03262), which counts each token that is trained on once, so that a rollout weighs as many
times as it has tokens. The variance is that of the tokens as they are (divided by their number).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from msgspec import structs

from lightning_rl.algorithms.settings import Batch
from lightning_rl.transition import Transition, mean

EPSILON = 1e-8
"""Added to the variance, as verl does: a spread far below 1e-4 is noise of a penalty, and stays small."""


def over_batch(
    transitions: Sequence[Transition], kind: Batch, kept: Mapping[str, int] | None = None
) -> list[Transition]:
    """The transitions with their advantages compared over the step.

    Masked transitions stay as they are and count in nothing, nor do tokens that are cut: `kept` is how many sampled tokens of a
    call have a loss, where that is fewer than all (by call id). Advantages that are the mean up to rounding become exactly 0.
    """
    by_rollout: dict[str, list[float]] = defaultdict(list)
    for transition in transitions:
        if transition.masked is None:
            count = (kept or {}).get(transition.call_id, len(transition.sampled_ids))
            by_rollout[transition.episode_id] += transition.advantages[:count]
    rollouts = [own for own in by_rollout.values() if own]
    if kind == "none" or not rollouts:
        return list(transitions)
    tokens = [advantage for own in rollouts for advantage in own]
    middle = mean(tokens) if kind == "std" else mean([mean(own) for own in rollouts])
    scale = math.sqrt(mean([(token - middle) ** 2 for token in tokens]) + EPSILON) if kind == "std" else 1.0
    rounding = 1e-9 * max(map(abs, tokens)) + 1e-12

    def compared(advantage: float) -> float:
        difference = advantage - middle
        return 0.0 if abs(difference) <= rounding else difference / scale

    def moved(transition: Transition) -> Transition:
        if transition.masked is not None:
            return transition
        own = [compared(advantage) for advantage in transition.token_advantages]
        return structs.replace(
            transition, advantage=mean(own) if own else compared(transition.advantage), token_advantages=own
        )

    return [moved(transition) for transition in transitions]

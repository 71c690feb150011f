"""What each token's loss is multiplied by, so that the loss of a step is a plain sum over its tokens.

The weights are computed once, over all transitions of a step. Micro-batches, packed rows and ranks then only add up:
how a step is split cannot change its gradient. Transitions whose advantage was estimated as zero count in the means, as
they would if they had been computed; those that no estimate exists for (greedy, aborted, groups of one) do not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from lightning_rl.transition import ESTIMATED_AS_ZERO, Transition

Aggregation = Literal["token", "sequence", "rollout"]


def token_weights(
    transitions: Sequence[Transition], aggregation: Aggregation, kept: Mapping[str, int] | None = None
) -> dict[str, float]:
    """By call id: the weight of each of its sampled tokens, for the calls that have a loss.

    - `token`: 1 / (all tokens); the mean over tokens, DAPO (arXiv 2503.14476).
    - `sequence`: 1 / (calls · tokens of the call); the mean over calls of their tokens' mean, GRPO (arXiv 2402.03300).
    - `rollout`: 1 / (rollouts · tokens of the rollout); each rollout weighs the same, however many and long its calls.

    `kept` is how many sampled tokens of a call have a loss, where that is fewer than all (by call id). The weight of a
    call that has none left is 0.
    """
    kept = kept or {}
    tokens = {
        transition.call_id: kept.get(transition.call_id, len(transition.sampled_ids))
        for transition in transitions
        if transition.masked is None or transition.masked in ESTIMATED_AS_ZERO
    }
    counted = [transition for transition in transitions if tokens.get(transition.call_id)]
    by_rollout: Counter[str] = Counter()
    for transition in counted:
        by_rollout[transition.episode_id] += tokens[transition.call_id]

    def weight(transition: Transition) -> float:
        match aggregation:
            case "token":
                return 1 / sum(by_rollout.values())
            case "sequence":
                return 1 / (len(counted) * tokens[transition.call_id])
            case "rollout":
                return 1 / (len(by_rollout) * by_rollout[transition.episode_id])

    trained = [transition for transition in transitions if transition.masked is None]
    return {t.call_id: weight(t) if tokens[t.call_id] else 0.0 for t in trained}


def kept_tokens(transitions: Sequence[Transition], max_tokens: int) -> dict[str, int]:
    """By call id: how many sampled tokens `token_tree.build_tree` keeps when it cuts sequences after `max_tokens`."""
    return {t.call_id: max(0, min(len(t.sampled_ids), max_tokens - len(t.prompt_ids))) for t in transitions}

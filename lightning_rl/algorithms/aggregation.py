"""What each token's loss is multiplied by, so that the loss of a step is a plain sum over its tokens.

The weights are computed once, over all transitions of an optimiser step. Micro-batches, packed rows and ranks then only add up:
how a step is split cannot change its gradient. Transitions whose advantage was estimated as zero count in the means, as
they would if they had been computed; those that no estimate exists for (greedy, aborted, groups of one) do not. Dynamic sampling
leaves groups without signal out of the batch: their transitions are not given here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from lightning_rl.algorithms.settings import Aggregation
from lightning_rl.transition import ESTIMATED_AS_ZERO, Transition


def token_weights(
    transitions: Sequence[Transition],
    aggregation: Aggregation,
    kept: Mapping[str, int] | None = None,
    *,
    length: int = 1,
) -> dict[str, float]:
    """By call id: the weight of each of its sampled tokens, for the calls that have a loss.

    - `token`: 1 / (all tokens); the mean over tokens, DAPO (arXiv 2503.14476).
    - `sequence`: 1 / (calls · tokens of the call); the mean over calls of their tokens' mean.
    - `rollout`: 1 / (rollouts · tokens of the rollout); each rollout weighs the same, however many and long its calls: GRPO
      (arXiv 2402.03300), whose outputs are rollouts of one call.
    - `fixed`: 1 / (calls · `length`); no longer call is pushed less for being long, Dr. GRPO (arXiv 2503.20783).

    Under all but `rollout`, a rollout of more calls (`token` and `fixed`: of more tokens) weighs more.

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

    in_all = sum(by_rollout.values())

    def weight(transition: Transition) -> float:
        match aggregation:
            case "token":
                return 1 / in_all
            case "sequence":
                return 1 / (len(counted) * tokens[transition.call_id])
            case "rollout":
                return 1 / (len(by_rollout) * by_rollout[transition.episode_id])
            case "fixed":
                return 1 / (len(counted) * length)

    trained = [transition for transition in transitions if transition.masked is None]
    return {t.call_id: weight(t) if tokens[t.call_id] else 0.0 for t in trained}


def kept_tokens(transitions: Sequence[Transition], max_tokens: int) -> dict[str, int]:
    """By call id: how many sampled tokens `token_tree.build_tree` keeps when it cuts sequences after `max_tokens`."""
    return {t.call_id: max(0, min(len(t.sampled_ids), max_tokens - len(t.prompt_ids))) for t in transitions}

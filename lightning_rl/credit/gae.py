"""Generalised advantage estimation over actions (arXiv 1506.02438, equations 11 to 16), and where rollouts keep what it needs.

    δ_t = r_t + γ V_{t+1} − V_t,    A_t = δ_t + γ λ A_{t+1},    target_t = A_t + V_t

t counts actions: tokens that the policy sampled, or its calls. What it read between two of them is no step. The next value
is that of the next action's state, however many tokens of an observation lie before it; behind the last action it is 0.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_rl.credit.records import Rollout
from lightning_rl.episode import Call
from lightning_rl.errors import CreditError


def gae(
    rewards: Sequence[float], values: Sequence[float], discount: float, lam: float
) -> tuple[list[float], list[float]]:
    """Advantages and the critic's targets, one for each action. Raises ValueError if rewards and values differ in number."""
    advantages: list[float] = []
    next_value = next_advantage = 0.0
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        next_advantage = reward + discount * next_value - value + discount * lam * next_advantage
        next_value = value
        advantages.append(next_advantage)
    advantages.reverse()
    return advantages, [advantage + value for advantage, value in zip(advantages, values, strict=True)]


def acting(rollout: Rollout) -> tuple[list[Call], list[float]]:
    """The calls for whose first token there is a value, in order of arrival, with the reward of each.

    A call without one is no action here: nothing was sampled, or not from a distribution, or all of it lies beyond the row
    limit. What it earned goes to the acting call before it; before the first of them it is nobody's, for it was earned before
    any of them acted. The outcome is the last one's. Raises CreditError if the rollout has no values at all.
    """
    if rollout.calls and not rollout.values:
        raise CreditError(
            f"this credit rule needs a critic's values, and there are none of the calls of episode {rollout.id}",
            hint="a store holds no values; they come from the critic while it is trained (train.critic)",
        )
    calls: list[Call] = []
    rewards: list[float] = []
    for call in rollout.calls:
        earned = rollout.earned[call.id]
        if rollout.values.get(call.id):
            calls.append(call)
            rewards.append(earned)
        elif rewards:
            rewards[-1] += earned
    if rewards:
        rewards[-1] += rollout.outcome
    return calls, rewards

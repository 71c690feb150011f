"""From the episodes of a group to transitions: one per call, with the advantage that its tokens are trained with.

The baseline is taken over rollouts, each counted once, never over calls. A transition that cannot or should not be
trained on keeps its place with the reason why, so that the ledger can account for its tokens.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from enum import StrEnum

from msgspec import Struct

from lightning_rl.algorithms.advantage import Normalise, group_baseline
from lightning_rl.episode import Call, Episode


class Mask(StrEnum):
    """Why a transition is not trained on."""

    GROUP_OF_ONE = "group_of_one"
    """No other rollout of the task to compare with."""
    NO_SIGNAL = "no_signal"
    """All returns of the group are equal."""
    ZERO_ADVANTAGE = "zero_advantage"
    """The return is exactly the group's mean: the gradient would be zero."""
    GREEDY = "greedy"
    """Not sampled from a distribution (temperature 0)."""
    ABORTED = "aborted"
    """The agent hung up before the call was done, and never saw its end."""


ESTIMATED_AS_ZERO = (Mask.NO_SIGNAL, Mask.ZERO_ADVANTAGE)
"""Masks of transitions whose gradient was estimated and is zero. They still count in the objective's means."""


class Transition(Struct, frozen=True, kw_only=True):
    """LightningRL's unit: the input, the output and the credit of one call."""

    episode_id: str
    call_id: str
    prompt_ids: list[int]
    sampled_ids: list[int]
    logprobs: list[float]
    """Behaviour log-probs, as in the call."""
    versions: list[int]
    temperature: float
    ret: float
    """The return that the credit rule gave to the call."""
    advantage: float
    """0 when masked."""
    masked: Mask | None = None


def group_transitions(group: Sequence[Episode], returns: Mapping[str, float], normalise: Normalise) -> list[Transition]:
    """The transitions of one group, in the order of its episodes and their calls.

    `returns` is by call id, from a credit rule. A rollout's own return is the mean over its calls. An episode that made
    no call has nothing that the policy did: it neither trains nor moves the baseline.
    """
    rollouts = [episode for episode in group if episode.calls]
    if not rollouts:
        return []
    baseline = group_baseline(
        [statistics.fmean(returns[call.id] for call in episode.calls) for episode in rollouts], normalise
    )
    values = [returns[call.id] for episode in rollouts for call in episode.calls]
    group_mask = None
    if len(rollouts) == 1:
        group_mask = Mask.GROUP_OF_ONE
    elif all(math.isclose(value, values[0], rel_tol=1e-9, abs_tol=1e-12) for value in values):
        group_mask = Mask.NO_SIGNAL
    return [
        _transition(call, returns[call.id], baseline.advantage(returns[call.id]), group_mask)
        for episode in rollouts
        for call in episode.calls
    ]


def _transition(call: Call, ret: float, advantage: float, group_mask: Mask | None) -> Transition:
    masked = _call_mask(call) or group_mask or (Mask.ZERO_ADVANTAGE if advantage == 0 else None)
    return Transition(
        episode_id=call.episode_id,
        call_id=call.id,
        prompt_ids=call.prompt_ids,
        sampled_ids=call.sampled_ids,
        logprobs=call.logprobs,
        versions=call.versions,
        temperature=call.temperature,
        ret=ret,
        advantage=0.0 if masked else advantage,
        masked=masked,
    )


def _call_mask(call: Call) -> Mask | None:
    if call.temperature == 0:
        return Mask.GREEDY
    return Mask.ABORTED if call.finish_reason == "abort" else None

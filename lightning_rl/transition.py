"""From the episodes of a group to transitions: one per call, with the advantage that its tokens are trained with.

The baseline is taken over rollouts, each counted once, never over calls, and of each only the calls that learn: what another
agent or model did is no deed of the policy that is trained. A transition that cannot or should not be trained on keeps its place
with the reason why, so that the ledger can account for its tokens.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from enum import StrEnum

from msgspec import Struct

from lightning_rl.agents import callers, fits
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
    OTHER_MODEL = "other_model"
    """An adapter or a provider answered, not the policy."""
    NOT_LEARNING = "not_learning"
    """Of an agent that the recipe does not train."""
    REDACTED = "redacted"
    """Tokens were taken out of it before it was stored."""


NOT_OF_THE_LEARNER = (Mask.OTHER_MODEL, Mask.NOT_LEARNING)
"""Masks of calls that say nothing about what the trained agent does."""
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


def call_masks(episode: Episode, learns: Collection[str] = ("*",), adapters: Collection[str] = ()) -> dict[str, Mask]:
    """By call id, why a call is not trained on, whatever its group earned; calls that may be trained on are left out.

    `learns` are globs for the callers that learn (`agents.fits`), `adapters` the names of the models beside the policy.
    """
    caller_of = callers(episode)
    masks = {}
    for call in episode.calls:
        if call.upstream or call.model in adapters:
            masks[call.id] = Mask.OTHER_MODEL
        elif not fits(learns, caller_of[call.id]):
            masks[call.id] = Mask.NOT_LEARNING
        elif call.redacted:
            masks[call.id] = Mask.REDACTED
        elif call.temperature == 0:
            masks[call.id] = Mask.GREEDY
        elif call.finish_reason == "abort":
            masks[call.id] = Mask.ABORTED
    return masks


def group_transitions(
    group: Sequence[Episode],
    returns: Mapping[str, float],
    normalise: Normalise,
    *,
    learns: Collection[str] = ("*",),
    adapters: Collection[str] = (),
) -> list[Transition]:
    """The transitions of one group, in the order of its episodes and their calls.

    `returns` is by call id, from a credit rule; `learns` and `adapters` are those of `call_masks`. A rollout's own return is
    the mean over the calls that the learner made. Redacted, greedy and aborted calls are among them: they are not trained
    on, but they are what the policy did, and a baseline without them would be of other rollouts than those that were
    sampled. A rollout in which the learner made no call says nothing about it: it neither trains nor moves the baseline, and
    does not count as company. So the advantages of a group are those that it would have if the calls of others had never
    been recorded.
    """
    masks = {call_id: mask for episode in group for call_id, mask in call_masks(episode, learns, adapters).items()}
    earned = [
        values
        for episode in group
        if (values := [returns[call.id] for call in episode.calls if masks.get(call.id) not in NOT_OF_THE_LEARNER])
    ]
    group_mask = None
    if len(earned) <= 1:
        group_mask = Mask.GROUP_OF_ONE
    elif all(math.isclose(value, earned[0][0], rel_tol=1e-9, abs_tol=1e-12) for values in earned for value in values):
        group_mask = Mask.NO_SIGNAL
    baseline = group_baseline([statistics.fmean(values) for values in earned] or [0.0], normalise)
    return [
        _transition(call, returns[call.id], baseline.advantage(returns[call.id]), masks.get(call.id) or group_mask)
        for episode in group
        for call in episode.calls
    ]


def _transition(call: Call, ret: float, advantage: float, mask: Mask | None) -> Transition:
    masked = mask or (Mask.ZERO_ADVANTAGE if advantage == 0 else None)
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

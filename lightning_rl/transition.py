"""From the episodes of a group to transitions: one per call, with the advantage that its tokens are trained with.

The baseline is taken over rollouts, each counted once, never over calls, and of each only the calls that learn: what another
agent or model did is no deed of the policy that is trained. A transition that cannot or should not be trained on keeps its place
with the reason why, so that the ledger can account for its tokens.

Three stages: `call_masks` says which calls are fair samples, `group_transitions` compares those of a group, and `settle` leaves out
what has no gradient. Between the last two, the advantages of a step may be changed (`algorithms.batch`): zero is what they end as.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from enum import StrEnum
from typing import Literal

from msgspec import Struct, structs

from lightning_rl.agents import callers, fits
from lightning_rl.algorithms.advantage import estimate
from lightning_rl.algorithms.settings import AdvantageSettings
from lightning_rl.credit.records import Credits
from lightning_rl.episode import Call, Episode


class Mask(StrEnum):
    """Why a transition is not trained on."""

    GROUP_OF_ONE = "group_of_one"
    """No other rollout of the task to compare with."""
    NO_SIGNAL = "no_signal"
    """All advantages of the group are zero."""
    ZERO_ADVANTAGE = "zero_advantage"
    """The return is exactly what it is compared with: the gradient would be zero."""
    NO_CREDIT = "no_credit"
    """The credit rule gives the call nothing to learn from."""
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
    RESTRICTED = "restricted"
    """Sampled from another distribution than the policy's (`Call.restricted`), in a recipe that masks such calls."""
    STALE = "stale"
    """A token is of a policy that is too many versions old."""


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
    """Of the call, the mean over its tokens; 0 when masked and settled."""
    token_advantages: list[float] = []
    """Of each sampled token, where they differ; else empty, and `advantage` is everyone's."""
    value_targets: list[float | None] = []
    """What the critic should have said before each sampled token (None: not asked); empty without a critic."""
    masked: Mask | None = None

    @property
    def advantages(self) -> list[float]:
        """Of each sampled token."""
        return self.token_advantages or [self.advantage] * len(self.sampled_ids)


def call_masks(
    episode: Episode,
    learns: Collection[str] = ("*",),
    adapters: Collection[str] = (),
    *,
    restricted: Literal["train", "mask"] = "train",
    newest: int | None = None,
    max_staleness: int | None = None,
) -> dict[str, Mask]:
    """By call id, why a call is not trained on, whatever its group earned; calls that may be trained on are left out.

    `learns` are globs for the callers that learn (`agents.fits`), `adapters` the names of the models beside the policy, `newest` is
    the version of the policy that is trained. A call is stale if one of its tokens is more than `max_staleness` versions older.
    """
    caller_of = callers(episode)
    oldest = None if newest is None or max_staleness is None else newest - max_staleness
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
        elif call.restricted and restricted == "mask":
            masks[call.id] = Mask.RESTRICTED
        elif oldest is not None and any(version < oldest for version in call.versions):
            masks[call.id] = Mask.STALE
    return masks


def learning_calls(episode: Episode, learns: Collection[str] = ("*",), adapters: Collection[str] = ()) -> list[str]:
    """Ids of the calls that the trained policy made as an agent that learns: those that credit is about."""
    masks = call_masks(episode, learns, adapters)
    return [call.id for call in episode.calls if masks.get(call.id) not in NOT_OF_THE_LEARNER]


def group_transitions(
    group: Sequence[Episode],
    credits: Credits,
    settings: AdvantageSettings,
    masks: Mapping[str, Mask],
) -> list[Transition]:
    """The transitions of one group, in the order of its episodes and their calls, not settled.

    `credits` are a credit rule's, of the calls of `learning_calls`; `masks` are `call_masks` of the episodes. Redacted, greedy and
    aborted calls have credits: they are not trained on, but they are what the policy did, and a baseline without them would be of
    other rollouts than those that were sampled. A rollout in which the learner made no call says nothing about it: it neither
    trains nor moves a baseline. So the advantages of a group are those that it would have if the calls of others had never been
    recorded.
    """
    estimates = estimate(credits, settings, {call.id: episode.id for episode in group for call in episode.calls})

    def transition(call: Call) -> Transition:
        mask = masks.get(call.id)
        own = estimates.get(call.id)
        tokens = credits.token_advantages.get(call.id, [])
        if mask is None and (call.id in credits.alone or (own is not None and own.alone)):
            mask = Mask.GROUP_OF_ONE
        if mask is None and own is None and call.id not in credits.token_advantages:
            mask = Mask.NO_CREDIT
        return Transition(
            episode_id=call.episode_id,
            call_id=call.id,
            prompt_ids=call.prompt_ids,
            sampled_ids=call.sampled_ids,
            logprobs=call.logprobs,
            versions=call.versions,
            temperature=call.temperature,
            ret=credits.returns.get(call.id, 0.0),
            advantage=mean(tokens) if tokens else own.advantage if own else 0.0,
            token_advantages=tokens,
            value_targets=credits.value_targets.get(call.id, []),
            masked=mask,
        )

    return [transition(call) for episode in group for call in episode.calls]


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def settle(
    transitions: Sequence[Transition], group_of: Mapping[str, str], *, asks_everywhere: bool = False
) -> list[Transition]:
    """The same transitions, with those masked whose gradient is zero: the last thing that is done to the advantages of a step.

    `group_of`: episode id -> group. A zero in a group where another call has an advantage is `ZERO_ADVANTAGE`, else the group has
    `NO_SIGNAL`. Calls that are not samples count in that, too: they moved the baseline. `asks_everywhere`: an objective whose
    gradient is not zero where the advantage is. A call that a critic learns from stays, with the advantage zero: else a step whose
    returns are all the same would never teach the critic what they are.
    """
    with_signal = {group_of[t.episode_id] for t in transitions if any(t.advantages)}

    def settled(transition: Transition) -> Transition:
        mask = transition.masked
        teaches_critic = any(target is not None for target in transition.value_targets)
        if mask is None and not any(transition.advantages) and not asks_everywhere and not teaches_critic:
            mask = Mask.ZERO_ADVANTAGE if group_of[transition.episode_id] in with_signal else Mask.NO_SIGNAL
        if mask is None:
            return transition
        return structs.replace(transition, advantage=0.0, token_advantages=[], value_targets=[], masked=mask)

    return [settled(transition) for transition in transitions]

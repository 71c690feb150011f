"""Who got what in a step, and what each credit rule would have given: pure, in records that a terminal or a page can show.

Advantages are those that training computes: the step goes through `learning.credited`, once for each rule, so that masks,
baselines and comparisons over the step are in them. What the trainer's models said is not stored: a rule that needs a critic has no
numbers here, and penalties from a reference policy are left out.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct, structs

from lightning_rl.agents import callers
from lightning_rl.algorithms.aggregation import kept_tokens
from lightning_rl.credit import RULES, WITH_CRITIC
from lightning_rl.credit.placement import placed
from lightning_rl.credit.records import Rollout
from lightning_rl.credit.returns import reward_weight
from lightning_rl.episode import Call, Episode
from lightning_rl.recipe import Credit, Recipe
from lightning_rl.recipe.training import Kl
from lightning_rl.transition import NOT_OF_THE_LEARNER, Transition
from trainers.learning import credited, groups_of, rollouts_of
from trainers.needs import critic
from trainers.penalties import call_shaping

OVERLONG = "overlong"
NEEDS_CRITIC = "needs a critic, and its values are not stored"


class CallCredit(Struct, frozen=True, kw_only=True):
    """What a rule gave to a call."""

    ret: float
    advantage: float
    """Mean over the call's tokens; 0 where it is masked."""
    token_advantages: list[float]
    """Of each sampled token, where they differ; else empty."""
    masked: str | None
    """Why it is not trained on (`transition.Mask`); None where it is."""
    with_loss: int
    """Sampled tokens with a loss: what the ledger counts as trained and as merged."""


class RuleCredit(Struct, frozen=True, kw_only=True):
    rule: str
    """The name, or the user's function."""
    calls: dict[str, CallCredit]
    """By call id; empty where `unknown` says why."""
    unknown: str = ""


class CallFacts(Struct, frozen=True, kw_only=True):
    """A call, whoever made it, without its texts."""

    id: str
    index: int
    agent: str
    """"" if nobody knows."""
    learns: bool
    """Whether it is the policy's, by an agent that learns."""
    span_id: str | None
    parent_id: str | None
    relation: str
    parted_at: int | None
    sampled: int
    earned: float
    """The weighted sum of the rewards that were given at the call; 0 for calls of others, whose rewards are in the outcome."""
    rewards: dict[str, float]
    """What was given there by name, weighted; `overlong` is what the objective takes for the call's length."""


class RolloutFacts(Struct, frozen=True, kw_only=True):
    episode: str
    sample: int
    ret: float
    """R."""
    outcome: float
    """What was earned at no call of the learner's."""
    outcome_rewards: dict[str, float]
    calls: list[CallFacts]


class GroupReport(Struct, frozen=True, kw_only=True):
    """A group by the run's own rule and objective, and by others beside it."""

    group: str
    task: str
    objective: str
    rollouts: list[RolloutFacts]
    own: RuleCredit
    others: list[RuleCredit]
    notes: list[str]
    """What the numbers leave out."""


class GroupSummary(Struct, frozen=True, kw_only=True):
    group: str
    task: str
    episodes: list[str]
    mean: float | None
    """Of the returns of the rollouts in which the learner made a call; None if there are none."""
    spread: float
    """Their unbiased standard deviation; 0 for one rollout."""
    lowest: float | None
    """Smallest advantage of a call of the learner's; None if it made none, or where a note says that credit is not known."""
    highest: float | None
    with_loss: int | None
    """Sampled tokens with a loss: what the ledger counts as trained and as merged. None where credit is not known."""
    masked: dict[str, int]
    """Sampled tokens without, by reason."""


class StepReport(Struct, frozen=True, kw_only=True):
    step: int
    """From 1, as the console counts."""
    rule: str
    objective: str
    groups: list[GroupSummary]
    notes: list[str]


def step_report(recipe: Recipe, step: int, episodes: Sequence[Episode]) -> StepReport:
    """`step` is as the store counts, from 0; `episodes` are all its attempts."""
    rollouts = {name: rollouts_of(recipe, group) for name, group in groups_of(episodes).items()}
    own = credit_by(recipe, rollouts)
    return StepReport(
        step=step + 1,
        rule=own.rule,
        objective=recipe.train.objective.name,
        groups=[_summary(name, group, own) for name, group in rollouts.items()],
        notes=_notes(recipe, own, rollouts),
    )


def credit_report(
    recipe: Recipe, episodes: Sequence[Episode], group: str, rules: Sequence[str] = tuple(RULES)
) -> GroupReport:
    """`episodes` are all attempts of the group's step; `rules` are built-in names or references to functions.

    Raises KeyError if the step has no such group, CreditError for what a rule gives that is no credit.
    """
    rollouts = {name: rollouts_of(recipe, members) for name, members in groups_of(episodes).items()}
    members = rollouts[group]
    own = credit_by(recipe, rollouts)
    others = [own if rule == own.rule else credit_by(recipe, rollouts, rule) for rule in rules]
    return group_report(recipe, group, members, own, others)


def group_report(
    recipe: Recipe, group: str, members: Sequence[Rollout], own: RuleCredit, others: Sequence[RuleCredit]
) -> GroupReport:
    """A group of the step that was credited so."""
    own_calls = {call.id for rollout in members for call in rollout.episode.calls}

    def of_group(credit: RuleCredit) -> RuleCredit:
        calls = {id: given for id, given in credit.calls.items() if id in own_calls}
        return RuleCredit(rule=credit.rule, calls=calls, unknown=credit.unknown)

    return GroupReport(
        group=group,
        task=members[0].episode.start.task.id,
        objective=recipe.train.objective.name,
        rollouts=[_facts(recipe, rollout) for rollout in members],
        own=of_group(own),
        others=[of_group(credit) for credit in others],
        notes=_notes(recipe, own, {group: members}),
    )


def credit_by(recipe: Recipe, rollouts: Mapping[str, Sequence[Rollout]], rule: str | None = None) -> RuleCredit:
    """A step's credit by the recipe's rule, or by another with its own parameters, under the recipe's objective. `rollouts` are
    `learning.rollouts_of`, by group."""
    chosen = recipe.train.credit or Credit(rule=recipe.train.rule)
    if rule is not None and rule != chosen.rule:
        chosen = Credit(rule=rule)
    if chosen.rule in WITH_CRITIC or (chosen.rule == recipe.train.rule and critic(recipe) is not None):
        return RuleCredit(rule=chosen.rule, calls={}, unknown=NEEDS_CRITIC)
    changes: dict[str, Any] = {"credit": chosen}
    if _has_unstored_penalty(recipe):
        changes["objective"] = recipe.train.objective.model_copy(update={"kl": Kl(coefficient=0)})
    by_rule = recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})
    transitions = credited(by_rule, rollouts, {})
    kept = kept_tokens(transitions, recipe.train.max_row_tokens)
    return RuleCredit(rule=chosen.rule, calls={t.call_id: _credit(t, kept) for t in transitions})


def _credit(transition: Transition, kept: dict[str, int]) -> CallCredit:
    return CallCredit(
        ret=transition.ret,
        advantage=transition.advantage,
        token_advantages=transition.token_advantages,
        masked=None if transition.masked is None else str(transition.masked),
        with_loss=kept[transition.call_id] if transition.masked is None else 0,
    )


def _facts(recipe: Recipe, rollout: Rollout) -> RolloutFacts:
    episode, caller_of = rollout.episode, callers(rollout.episode)
    rewards: dict[str | None, dict[str, float]] = defaultdict(dict)
    for reward, call_id in placed(episode):
        place = rewards[call_id if call_id in rollout.earned else None]
        weighted = reward_weight(reward, recipe.reward.weights) * reward.value
        place[reward.name] = place.get(reward.name, 0.0) + weighted

    lengths = structs.replace(recipe.train.objective.settings(), kl=None)
    for call_id, shaping in call_shaping(rollout.calls, lengths, recipe.sampling.max_tokens, {}).items():
        if shaping:
            rewards[call_id][OVERLONG] = shaping

    def facts(call: Call) -> CallFacts:
        return CallFacts(
            id=call.id,
            index=call.index,
            agent=caller_of[call.id].agent or "",
            learns=call.id in rollout.earned,
            span_id=call.span_id,
            parent_id=call.parent_id,
            relation=call.relation,
            parted_at=call.parted_at,
            sampled=len(call.sampled_ids),
            earned=rollout.earned.get(call.id, 0.0),
            rewards=rewards.get(call.id, {}),
        )

    return RolloutFacts(
        episode=episode.id,
        sample=episode.start.sample,
        ret=rollout.ret,
        outcome=rollout.outcome,
        outcome_rewards=rewards.get(None, {}),
        calls=[facts(call) for call in sorted(episode.calls, key=lambda call: (call.index, call.id))],
    )


def _summary(name: str, group: Sequence[Rollout], own: RuleCredit) -> GroupSummary:
    returns = [rollout.ret for rollout in group if rollout.calls]
    calls = [call for rollout in group for call in rollout.episode.calls if call.id in own.calls]
    credits = [own.calls[call.id] for call in calls]
    learners = [credit.advantage for credit in credits if credit.masked not in NOT_OF_THE_LEARNER]
    masked: dict[str, int] = defaultdict(int)
    for call, credit in zip(calls, credits, strict=True):
        if credit.masked is not None:
            masked[credit.masked] += len(call.sampled_ids)
        elif cut := len(call.sampled_ids) - credit.with_loss:
            masked["row_limit"] += cut
    return GroupSummary(
        group=name,
        task=group[0].episode.start.task.id,
        episodes=[rollout.id for rollout in group],
        mean=statistics.fmean(returns) if returns else None,
        spread=statistics.stdev(returns) if len(returns) > 1 else 0.0,
        lowest=min(learners, default=None),
        highest=max(learners, default=None),
        with_loss=None if own.unknown else sum(credit.with_loss for credit in credits),
        masked=dict(masked),
    )


def _notes(recipe: Recipe, own: RuleCredit, rollouts: Mapping[str, Sequence[Rollout]]) -> list[str]:
    notes = []
    if own.unknown:
        notes.append(f"{own.rule} {own.unknown}: advantages of the run's own rule are not known here")
    if _has_unstored_penalty(recipe):
        notes.append("the penalty for leaving the reference policy is not stored, and not in these numbers")
    full = recipe.train.samples_per_task
    small = {name: len(group) for name, group in rollouts.items() if len(group) < full}
    if small:
        which = f"{len(small)} of {len(rollouts)} groups have" if len(rollouts) > 1 else "the group has"
        notes.append(
            f"{which} fewer than train.samples_per_task = {full} rollouts: episodes that do not count, or have not ended yet"
        )
    return notes


def _has_unstored_penalty(recipe: Recipe) -> bool:
    kl = recipe.train.objective.settings().kl
    return kl is not None and kl.place != "loss"

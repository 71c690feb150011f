"""What a step learns from: episodes to credits, advantages, loss weights, rows, ledger. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from msgspec import Struct, structs

from lightning_rl.agents import callers
from lightning_rl.algorithms.aggregation import kept_tokens, token_weights
from lightning_rl.algorithms.batch import over_batch
from lightning_rl.algorithms.settings import AdvantageSettings
from lightning_rl.credit import bind, rule_function
from lightning_rl.credit.records import Credits, Rollout
from lightning_rl.credit.rollouts import rollout_of
from lightning_rl.episode import Episode
from lightning_rl.ledger import Ledger, account
from lightning_rl.recipe import Recipe
from lightning_rl.scores import CallScores
from lightning_rl.transition import Mask, Transition, call_masks, group_transitions, settle
from trainers.minibatches import minibatches
from trainers.needs import learners_calls, needs, require_scores
from trainers.packing import Packed, pack
from trainers.penalties import call_shaping, token_penalised
from trainers.runner.user_code import load_function


class StepData(Struct, frozen=True, kw_only=True):
    """A step's episodes, and what is learned from them."""

    episodes: list[Episode]
    """All attempts."""
    counted: list[Episode]
    transitions: list[Transition]
    updates: list[Packed]
    """One for each optimiser step, in order: the minibatches of the first epoch, then of the next. At least one."""
    packed: Packed
    """Rows and trees of the first epoch, all together: every token that is trained on is there once."""
    ledger: Ledger
    returns: dict[str, float]
    """R by episode id, with what the objective adds to rewards."""
    scores: dict[str, CallScores]
    """What the credit was made with."""


def credit_rule(recipe: Recipe, name: str | None = None) -> Callable[[Sequence[Rollout]], Credits]:
    """The recipe's rule, or the one of that name with its own parameters.

    Raises what the file of a user's rule raises on import.
    """
    chosen = recipe.train.credit
    arguments = chosen.arguments if name is None and chosen is not None else {}
    name = name or recipe.train.rule
    if ":" not in name:
        return bind(rule_function(name), arguments, name)
    reference = recipe.resolve_function(name)
    return bind(load_function(reference.path, reference.name, reference.module), arguments, name)


def rollouts_of(
    recipe: Recipe, group: Sequence[Episode], scores: Mapping[str, CallScores] | None = None
) -> list[Rollout]:
    """Of the episodes of a group, as credit rules see them: with what the objective adds to rewards, and with the critic's values
    if there is one: none of a call that was not scored. `scores` is None where nobody asked the trainer's models."""
    settings = recipe.train.objective.settings()
    has_critic = scores is not None and needs(recipe).values
    scores = scores or {}
    rollouts = []
    for episode in group:
        calls = learners_calls(recipe, episode)
        values = {call.id: scores[call.id].values if call.id in scores else [] for call in calls}
        rollouts.append(
            rollout_of(
                episode,
                recipe.reward.weights,
                [call.id for call in calls],
                shaping=call_shaping(calls, settings, recipe.sampling.max_tokens, scores),
                values=values if has_critic else None,
            )
        )
    return rollouts


def groups_of(episodes: Sequence[Episode]) -> dict[str, list[Episode]]:
    """The counted ones by group, in the order of a store's: by task, sample and attempt, whatever the order that they are given in.
    Nor does the order matter in which the calls of an episode are given."""
    groups: dict[str, list[Episode]] = defaultdict(list)
    counted = [episode for episode in episodes if episode.counted]
    for episode in sorted(counted, key=lambda e: (e.start.task.id, e.start.sample, e.start.attempt, e.id)):
        calls = sorted(episode.calls, key=lambda call: (call.index, call.id))
        groups[episode.start.group].append(structs.replace(episode, calls=calls))
    return dict(groups)


def groups_with_signal(recipe: Recipe, episodes: Sequence[Episode], version: int | None = None) -> set[str]:
    """The groups in which some call that may be trained on was credited with more or less than the group's mean.

    Rewards alone decide, as in DAPO (arXiv 2503.14476, section 3.2), without what the objective adds to them. For rules with a
    critic they are credited as `equal` does. `version`: as in `learn_from`.
    """
    rule = credit_rule(recipe, "equal" if needs(recipe).values else None)
    masks = _masks(recipe, [episode for episode in episodes if episode.counted], version)
    found = set()
    for name, group in groups_of(episodes).items():
        rollouts = [
            rollout_of(episode, recipe.reward.weights, [call.id for call in learners_calls(recipe, episode)])
            for episode in group
        ]
        transitions = group_transitions(group, rule(rollouts), AdvantageSettings(), masks)
        if any(t.masked is None and any(t.advantages) for t in transitions):
            found.add(name)
    return found


def learn_from(
    recipe: Recipe,
    episodes: Sequence[Episode],
    scores: Mapping[str, CallScores] | None = None,
    *,
    version: int | None = None,
) -> StepData:
    """Episodes of one step to rows: credit, advantage, loss weights, packing, ledger.

    `scores` are what the trainer's models say about the calls of `needs.calls_to_score`; None if nobody asked them, which is a
    RecipeError where credit needs them. `version` is the trainer's policy, by which staleness is measured; None, for a record: the
    newest that answered in the step. The order in which episodes and calls are given changes nothing.
    """
    groups = groups_of(episodes)
    counted = [episode for group in groups.values() for episode in group]
    require_scores(recipe, counted, scores)
    scores = dict(scores or {})
    rollouts = {name: rollouts_of(recipe, group, scores) for name, group in groups.items()}
    transitions = credited(recipe, rollouts, scores, version)
    kept = kept_tokens(transitions, recipe.train.max_row_tokens)
    updates, epoch = _updates(recipe, counted, transitions, kept, scores)
    packed = Packed(
        rows=[row for update in epoch for row in update.rows], trees=[tree for update in epoch for tree in update.trees]
    )
    return StepData(
        episodes=list(episodes),
        counted=counted,
        transitions=transitions,
        updates=updates,
        packed=packed,
        ledger=account(episodes, transitions, packed.trees),
        returns={rollout.id: rollout.ret for group in rollouts.values() for rollout in group},
        scores=scores,
    )


def credited(
    recipe: Recipe,
    rollouts: Mapping[str, Sequence[Rollout]],
    scores: Mapping[str, CallScores],
    version: int | None = None,
) -> list[Transition]:
    """A step's transitions with their final advantages and masks. `rollouts` are `rollouts_of`, by group; `version`: as in
    `learn_from`."""
    counted = [rollout.episode for group in rollouts.values() for rollout in group]
    settings = recipe.train.objective.settings()
    rule = credit_rule(recipe)
    masks = _masks(recipe, counted, version)
    group_of = {episode.id: episode.start.group for episode in counted}
    transitions = []
    for group in rollouts.values():
        episodes = [rollout.episode for rollout in group]
        transitions += group_transitions(episodes, rule(group), settings.advantage, masks)
    if settings.dynamic_sampling:
        transitions = _without(transitions, group_of, {*rollouts} - groups_with_signal(recipe, counted, version))
    calls_of = {rollout.id: rollout.calls for group in rollouts.values() for rollout in group}
    transitions = token_penalised(transitions, settings, calls_of, scores)
    kept = kept_tokens(transitions, recipe.train.max_row_tokens)
    transitions = over_batch(transitions, settings.advantage.batch, kept)
    return settle(transitions, group_of, asks_everywhere=settings.asks_everywhere)


def _masks(recipe: Recipe, counted: Sequence[Episode], newest: int | None) -> dict[str, Mask]:
    """By call id, of all episodes. `newest` is the trainer's policy; None: the newest that answered in the step stands for it."""
    adapters = recipe.model.adapters
    if newest is None:
        own = (
            call for episode in counted for call in episode.calls if not call.upstream and call.model not in adapters
        )
        newest = max((version for call in own for version in call.versions), default=None)
    return {
        call_id: mask
        for episode in counted
        for call_id, mask in call_masks(
            episode,
            recipe.agent.learns,
            adapters,
            restricted=recipe.train.restricted,
            newest=newest,
            max_staleness=recipe.train.max_staleness,
        ).items()
    }


def _without(transitions: Sequence[Transition], group_of: Mapping[str, str], groups: set[str]) -> list[Transition]:
    """The transitions with those of the groups masked: dynamic sampling leaves groups without signal out of the batch."""
    return [
        structs.replace(t, masked=Mask.NO_SIGNAL) if t.masked is None and group_of[t.episode_id] in groups else t
        for t in transitions
    ]


def _updates(
    recipe: Recipe,
    counted: Sequence[Episode],
    transitions: Sequence[Transition],
    kept: Mapping[str, int],
    scores: Mapping[str, CallScores],
) -> tuple[list[Packed], list[Packed]]:
    """What each optimiser step computes, and the first epoch of it. Loss weights are of the optimiser step's own means.

    With dynamic sampling, groups without signal were left out of the batch, and count in no mean.
    """
    train, settings = recipe.train, recipe.train.objective.settings()
    group_of = {episode.id: episode.start.group for episode in counted}
    agent_of = {id: caller.agent or "" for episode in counted for id, caller in callers(episode).items()}
    calls = {call.id: call for episode in counted for call in episode.calls}
    if not needs(recipe).old:  # then it is the policy that is updated
        scores = {id: structs.replace(score, old=[]) for id, score in scores.items()}
    by_group: dict[str, list[Transition]] = {group: [] for group in group_of.values()}
    for transition in transitions:
        if not (settings.dynamic_sampling and transition.masked is Mask.NO_SIGNAL):
            by_group[group_of[transition.episode_id]].append(transition)
    with_loss = {group for group, own in by_group.items() if any(t.masked is None for t in own)}

    def packed(part: Sequence[str]) -> Packed:
        own = [transition for group in part for transition in by_group[group]]
        return pack(
            own,
            group_of=group_of,
            weights=token_weights(own, settings.aggregation, kept, length=recipe.sampling.max_tokens),
            calls=calls,
            max_row_tokens=train.max_row_tokens,
            ranks=train.world_size,
            scores=scores,
            agent_of=agent_of,
        )

    def epoch(number: int) -> list[Packed]:
        step = counted[0].start.step if counted else 0
        seed = f"{recipe.seed}-{step}-{number}"
        return [packed(part) for part in minibatches([*by_group], with_loss, train.minibatches, seed)]

    first = epoch(0)
    others = [first if len(first) == 1 else epoch(number) for number in range(1, train.epochs)]
    return [update for one in (first, *others) for update in one], first

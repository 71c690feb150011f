"""The circle: play, credit, pack, step, publish, check. Read `train` from top to bottom to follow one step of training.

Every stage leaves something that says it is done: episodes in the store, an adapter, a checkpoint. A run that is killed anywhere
repeats the stage it was in, and only what was missing of it.
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from lightning_rl.agents import callers
from lightning_rl.algorithms.aggregation import kept_tokens, token_weights
from lightning_rl.credit import credit_rule
from lightning_rl.episode import Episode, Task
from lightning_rl.errors import RecipeError
from lightning_rl.ledger import Ledger, account
from lightning_rl.recipe import Recipe
from lightning_rl.transition import NOT_OF_THE_LEARNER, Transition, group_transitions
from trainers.checkpoint import TrainState, read_state
from trainers.console import duration
from trainers.evaluation import Score, score, success_values
from trainers.learner import Learner, learning_rate
from trainers.packing import Packed, pack, share_out
from trainers.publish import DEFAULT_GAP, Gap, compare, publish
from trainers.rollouts import eval_starts, train_starts
from trainers.session import Session
from trainers.tracking import Sink

SEQUENCES_TO_COMPARE = 2
FIRST_VERSION = 1
"""Of the policy that the reinforcement learning starts from; 0 is the model as it was."""


class StepData(Struct, frozen=True, kw_only=True):
    """A step's episodes, and what is learned from them."""

    episodes: list[Episode]
    """All attempts."""
    counted: list[Episode]
    transitions: list[Transition]
    packed: Packed
    ledger: Ledger
    nobody_learns: str = ""
    """Why, if no call is of those that `agent.learns` says."""


def train(
    session: Session, learner: Learner, tasks: Mapping[str, Sequence[Task]], sinks: Sequence[Sink], state: TrainState
) -> TrainState:
    """From `state` to the last step. The server holds the policy of `state.version` when this returns, or raises."""
    recipe, console = session.recipe, session.console
    publish_policy(session, learner, state.version, known_sequences(session))
    evaluation_seconds = session.seconds.get("evaluate", 0.0)
    for step in range(state.step, recipe.train.steps):
        if step and recipe.evaluate.every and step % recipe.evaluate.every == 0:
            evaluate(session, tasks["eval"], f"step-{step}", sinks, step)
        started, started_at = time.monotonic(), time.time()
        console.status(_time_left(state, recipe, evaluation_seconds))
        with session.timed("rollout"):
            session.play(f"step {step + 1}/{recipe.train.steps}: rollout", train_starts(recipe, tasks["train"], step))
        rolled = time.monotonic()
        data = learn_from(recipe, session.episodes("train", step))
        data.ledger.check(f"step {step + 1}")
        for line in doubts(recipe, data, is_first=step == 0):
            console.say(f"step {step + 1}/{recipe.train.steps}: {line}")
        with session.timed("train"), console.stage(f"step {step + 1}/{recipe.train.steps}: train"):
            sums = update(recipe, learner, data, step)
        trained = time.monotonic()
        version = state.version + 1
        with session.timed("publish"), console.stage(f"step {step + 1}/{recipe.train.steps}: publish"):
            gap = publish_policy(session, learner, version, _some_sequences(data.counted))
        metrics = _metrics(recipe, data, sums, gap, version, started_at, rolled - started, trained - rolled)
        state = TrainState(
            step=step + 1,
            version=version,
            world_size=recipe.train.world_size,
            history=[*state.history, metrics],
        )
        for sink in sinks:  # before the checkpoint: a line too many is cut on resume, a missing one would stay missing
            sink.log(metrics, state.step)
            sink.samples(data.counted[: recipe.train.samples_per_task], state.step)
        if state.step % recipe.train.checkpoint_every == 0 or state.step == recipe.train.steps:
            with session.timed("checkpoint"):
                learner.save(session.run.checkpoints, state, recipe.train.keep_checkpoints)
        console.say(_line(metrics, recipe, time.monotonic() - started))
    return state


def learn_from(recipe: Recipe, episodes: Sequence[Episode]) -> StepData:
    """Episodes to rows: credit, advantage, loss weights, packing, ledger. Pure."""
    counted = [episode for episode in episodes if episode.counted]
    rule = credit_rule(recipe.train.credit)
    groups: dict[str, list[Episode]] = defaultdict(list)
    for episode in counted:
        groups[episode.start.group].append(episode)
    transitions = []
    for group in groups.values():
        returns = {}
        for episode in group:
            returns.update(rule(episode, recipe.reward.weights))
        transitions += group_transitions(
            group,
            returns,
            recipe.train.objective.normalise,
            learns=recipe.agent.learns,
            adapters=recipe.model.adapters,
        )
    packed = pack(
        transitions,
        group_of={episode.id: episode.start.group for episode in counted},
        weights=token_weights(
            transitions, recipe.train.objective.aggregation, kept_tokens(transitions, recipe.train.max_row_tokens)
        ),
        calls={call.id: call for episode in counted for call in episode.calls},
        max_row_tokens=recipe.train.max_row_tokens,
        ranks=recipe.train.world_size,
    )
    ledger = account(episodes, transitions, packed.trees)
    return StepData(
        episodes=list(episodes),
        counted=counted,
        transitions=transitions,
        packed=packed,
        ledger=ledger,
        nobody_learns=_nobody_learns(recipe, counted, transitions),
    )


def _nobody_learns(recipe: Recipe, counted: Sequence[Episode], transitions: Sequence[Transition]) -> str:
    if not transitions or any(transition.masked not in NOT_OF_THE_LEARNER for transition in transitions):
        return ""
    seen = {name for episode in counted for caller in callers(episode).values() for name in caller.names if name}
    return (
        f"agent.learns: no call of the policy fits {', '.join(recipe.agent.learns)}; the calls of this step were made under the "
        f"names {', '.join(sorted(seen)[:20]) or '(none)'}"
    )


def doubts(recipe: Recipe, data: StepData, *, is_first: bool) -> list[str]:
    """What a person should hear of before the step is trained on.

    Raises RecipeError where nobody learns in the first step: that is a misspelt name. Later, those who learn did not come to it.
    """
    lines = []
    if data.nobody_learns and is_first:
        raise RecipeError(
            data.nobody_learns,
            hint="name an agent, a graph node or a model that is asked for, and leave its calls to the policy in agent.routes",
        )
    if data.nobody_learns:
        lines.append(f"nothing is trained: {data.nobody_learns}")
    given = {reward.name for episode in data.counted for reward in episode.rewards}
    unmet = [name for name, weight in recipe.reward.weights.items() if weight and name not in given]
    if unmet and is_first and data.counted:
        lines.append(f"reward.weights: no episode of this step has a reward named {', '.join(unmet)}")
    return lines


def update(recipe: Recipe, learner: Learner, data: StepData, step: int) -> dict[str, float]:
    """One optimiser step, and the sums of `Learner.step`. Where nobody learned, the policy and the optimiser stay as they are."""
    if data.nobody_learns:
        return {}
    return learner.step(share_out(data.packed.rows, recipe.train.world_size), learning_rate(recipe.train, step))


def publish_policy(session: Session, learner: Learner, version: int, sequences: Sequence[list[int]]) -> Gap:
    """The server samples from the learner's policy from here on, and is shown to."""
    directory = session.run.published / f"v{version:05d}"
    admin = session.server.admin()
    publish(learner.policy, admin, directory, version, session.model_dir)
    for other in session.run.published.glob("v*"):
        if not version - 1 <= int(other.name[1:]) <= version:  # later ones are of a checkpoint that was given up
            shutil.rmtree(other)
    bound = session.recipe.publish.max_logprob_gap or DEFAULT_GAP[session.recipe.model.dtype]
    return compare(learner.policy, admin, sequences, bound)


def evaluate(session: Session, tasks: Sequence[Task], label: str, sinks: Sequence[Sink], step: int) -> Score:
    result = session.evaluate(label, eval_starts(session.recipe, tasks, label))
    for sink in sinks:
        sink.evaluation(label, result, step)
    session.console.say(f"success {label.replace('_', ' ')}: {result} on {result.n} held-out tasks")
    return result


def resume_point(session: Session, learner: Learner, checkpoint: Path | None) -> TrainState:
    """The state to go on from: the newest checkpoint's, loaded on every rank, or the start."""
    if checkpoint is None:
        return TrainState(step=0, version=FIRST_VERSION, world_size=session.recipe.train.world_size)
    state = read_state(checkpoint)
    learner.load(checkpoint)
    return state


def known_sequences(session: Session) -> list[list[int]]:
    """Real conversations for the check before the first step: the evaluation's."""
    for phase in ("eval-warm_start", "eval-base"):
        summaries = [summary for summary in session.store.starts(phase=phase) if summary.counted and summary.calls]
        episodes = [session.store.episode(summary.id) for summary in summaries[:SEQUENCES_TO_COMPARE]]
        if episodes:
            return _some_sequences(episodes)
    return [list(range(3, 40))]


def _some_sequences(episodes: Sequence[Episode]) -> list[list[int]]:
    lasts = (next((c for c in reversed(e.calls) if c.sampled_ids), None) for e in episodes)  # a provider's has no ids
    known = (call.prompt_ids + call.sampled_ids for call in lasts if call is not None)
    return list(itertools.islice(known, SEQUENCES_TO_COMPARE)) or [list(range(3, 40))]


def _metrics(
    recipe: Recipe,
    data: StepData,
    sums: Mapping[str, float],
    gap: Gap,
    version: int,
    started_at: float,
    rollout_seconds: float,
    train_seconds: float,
) -> dict[str, Any]:
    tokens = max(sums.get("tokens", 0.0), 1.0)
    mean = {name: sums.get(name, 0.0) / tokens for name in ("entropy", "clip_fraction", "ratio", "tis", "gap")}
    calls = [call for episode in data.counted for call in episode.calls]
    sampled = [len(call.sampled_ids) for episode in data.episodes for call in episode.calls if not call.upstream]
    fresh = sum(len(c.sampled_ids) for e in data.episodes if e.start.started_at >= started_at for c in e.calls)
    names = sorted({reward.name for episode in data.counted for reward in episode.rewards})
    computed = sum(len(row.ids) for row in data.packed.rows)
    groups = {episode.start.group for episode in data.counted}
    trained_groups = {
        e.start.group for e in data.counted if any(t.episode_id == e.id and not t.masked for t in data.transitions)
    }
    outcomes: dict[str, int] = defaultdict(int)
    for episode in data.episodes:
        outcomes[str(episode.outcome)] += 1
    return {
        "success": score(success_values(data.counted, recipe.success_reward)).value,
        "reward": {name: score(success_values(data.counted, name)).value for name in names},
        "kl": sums.get("kl_behaviour", 0.0) / tokens,
        "loss": sums.get("loss", 0.0),
        "gradient_norm": sums.get("gradient_norm", 0.0),
        **{"entropy": mean["entropy"], "clip_fraction": mean["clip_fraction"], "tis": mean["tis"]},
        "logprob_gap": {"rollout": mean["gap"], "published": gap.mean, "published_max": gap.largest},
        "length": {
            "sampled_per_call": sum(sampled) / max(len(sampled), 1),
            "sampled_per_episode": sum(sampled) / max(len(data.episodes), 1),
            "calls_per_episode": len(calls) / max(len(data.counted), 1),
        },
        "outcomes": dict(outcomes),
        "groups": {"all": len(groups), "trained": len(trained_groups)},
        "ledger": data.ledger.to_dict(),
        "tokens": {"computed": computed, "sampled": sum(sampled), "sampled_now": fresh},
        "rollout_tokens_per_second": fresh / rollout_seconds,
        "train_tokens_per_second": computed / train_seconds,
        "seconds": {"rollout": rollout_seconds, "train": train_seconds},
        "policy_version": version,
    }


def _line(metrics: Mapping[str, Any], recipe: Recipe, seconds: float) -> str:
    return (
        f"step {metrics['policy_version'] - FIRST_VERSION}/{recipe.train.steps}: success {metrics['success']:.2f}, "
        f"kl {metrics['kl']:.4f}, entropy {metrics['entropy']:.2f}, gap {metrics['logprob_gap']['published']:.4f}, "
        f"rollout {metrics['seconds']['rollout']:.0f} s at {metrics['rollout_tokens_per_second']:.0f} tok/s, "
        f"train {metrics['seconds']['train']:.0f} s at {metrics['train_tokens_per_second']:.0f} tok/s, "
        f"{seconds:.0f} s in all"
    )


def _time_left(state: TrainState, recipe: Recipe, evaluation_seconds: float) -> str:
    if not state.history:
        return ""
    recent = state.history[-3:]
    step_seconds = sum(sum(row["seconds"].values()) for row in recent) / len(recent) * 1.1
    left = step_seconds * (recipe.train.steps - state.step) + evaluation_seconds / 2
    last = state.history[-1]
    return (
        f"success {last['success']:.2f} · {last['rollout_tokens_per_second']:.0f} tok/s sampled · "
        f"{last['train_tokens_per_second']:.0f} tok/s trained · about {duration(left)} left"
    )


def total_ledger(history: Sequence[Mapping[str, Any]]) -> Ledger:
    return sum((Ledger.from_dict(row["ledger"]) for row in history), Ledger())

"""The circle: play, score, credit, pack, step, publish, check. Read `train` from top to bottom to follow one step of training.

Every stage leaves something that says it is done: episodes in the store, an adapter, a checkpoint. A run that is killed anywhere
repeats the stage it was in, and only what was missing of it.
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_rl.episode import Episode, Task
from lightning_rl.ledger import Ledger
from lightning_rl.recipe import Recipe
from lightning_rl.scores import CallScores
from trainers.checkpoint import FIRST_VERSION, TrainState, read_state
from trainers.doubts import doubts, nobody_learns
from trainers.evaluation import Score
from trainers.learner import Learner, learning_rate
from trainers.learning import StepData, groups_of, groups_with_signal, learn_from
from trainers.needs import calls_to_score, needs
from trainers.packing import rows_to_score, share_out
from trainers.publish import DEFAULT_GAP, Gap, compare, publish
from trainers.rollouts import eval_starts, train_starts
from trainers.session import Session
from trainers.step_metrics import step_line, step_metrics, time_left
from trainers.tracking import Sink

SEQUENCES_TO_COMPARE = 2
MEANS = ("loss", "value_loss", "gradient_norm", "critic_gradient_norm")
"""Of an optimiser step, not sums over its tokens."""


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
        title = f"step {step + 1}/{recipe.train.steps}"
        started, started_at = time.monotonic(), time.time()
        console.status(time_left(state, recipe, evaluation_seconds))
        with session.timed("rollout"):
            episodes = play_step(session, tasks["train"], step, state.version)
        seconds = {"rollout": time.monotonic() - started}
        scores = None
        if needs(recipe).scores:
            with session.timed("score"), console.stage(f"{title}: score"):
                scores = score_calls(recipe, learner, episodes)
            seconds["score"] = time.monotonic() - started - sum(seconds.values())
        data = learn_from(recipe, episodes, scores, version=state.version)
        data.ledger.check(f"step {step + 1}")
        for line in doubts(recipe, data, is_first=step == 0):
            console.say(f"{title}: {line}")
        with session.timed("train"), console.stage(f"{title}: train"):
            sums = update(recipe, learner, data, step)
        seconds["train"] = time.monotonic() - started - sum(seconds.values())
        version = state.version + 1
        with session.timed("publish"), console.stage(f"{title}: publish"):
            gap = publish_policy(session, learner, version, _some_sequences(data.counted))
        metrics = step_metrics(recipe, data, sums, gap, version, started_at, seconds)
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
        console.say(step_line(metrics, recipe, time.monotonic() - started))
    return state


def play_step(session: Session, tasks: Sequence[Task], step: int, version: int) -> list[Episode]:
    """All attempts at the episodes of a step, counted or not. `version`: the policy that plays it.

    With dynamic sampling, a step in which too few groups have signal goes for as many tasks as it lacks, as often as the objective
    says. All groups that come of it are kept, should they be more than were asked for. What a round asks for follows from what the
    rounds before it left in the store: a resumed run asks for the same, and plays what is not there.
    """
    recipe, train = session.recipe, session.recipe.train
    title = f"step {step + 1}/{train.steps}: rollout"
    starts = train_starts(recipe, tasks, step)
    session.play(title, starts)
    asked = {start.group for start in starts}
    for round in range(1, train.objective.settings().dynamic_sampling + 1):
        episodes = [episode for episode in session.episodes("train", step) if episode.start.group in asked]
        lacking = train.tasks_per_step - len(groups_with_signal(recipe, episodes, version))
        if lacking <= 0:
            break
        starts = train_starts(recipe, tasks, step, round=round, count=lacking)
        session.play(f"{title}, {lacking} more tasks", starts, may_fail=True)
        asked |= {start.group for start in starts}
    return session.episodes("train", step)


def score_calls(recipe: Recipe, learner: Learner, episodes: Sequence[Episode]) -> dict[str, CallScores]:
    """What the trainer's models say about the learner's calls, before they learn from them."""
    counted = [episode for group in groups_of(episodes).values() for episode in group]
    group_of = {episode.id: episode.start.group for episode in counted}
    ranks = recipe.train.world_size
    rows = rows_to_score(calls_to_score(recipe, counted), group_of, recipe.train.max_row_tokens, ranks)
    return learner.score(share_out(rows, ranks), reference=needs(recipe).reference) if rows else {}


def update(recipe: Recipe, learner: Learner, data: StepData, step: int) -> dict[str, float]:
    """The optimiser steps of a step, and the sums of `Learner.step`: added up, but for those of `MEANS`, which are means over the
    optimiser steps. Where nobody learned, and in minibatches without a loss, the policy and the optimiser stay as they are."""
    if nobody_learns(recipe, data):
        return {}
    total: Counter[str] = Counter()
    rate = learning_rate(recipe.train, step)
    updates = [packed.rows for packed in data.updates if packed.rows]
    for rows in updates:
        total.update(learner.step(share_out(rows, recipe.train.world_size), rate))
    return {name: value / len(updates) if name in MEANS else value for name, value in total.items()}


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


def total_ledger(history: Sequence[Mapping[str, Any]]) -> Ledger:
    return sum((Ledger.from_dict(row["ledger"]) for row in history), Ledger())

"""One training of the study: the trainer's own circle, with the episodes of a step side by side in this process.

Server, store, credit, packing, learner and publishing are those of `lrl train`. Only the runner differs: a process for each
episode would take longer than the episode.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct, structs
from openai import AsyncOpenAI

from lightning_rl.episode import Episode, EpisodeStart, Outcome, Span
from lightning_rl.recipe import Recipe, load_recipe
from lightning_rl.store import Store
from recipes.studies.credit import agents, rewards
from recipes.studies.credit.figures import is_learned
from rollout_server.launch import RolloutServer
from tracers.context import Event, Rollout, running
from tracers.environment import pointing_at
from tracers.install import install
from trainers.learner import Learner
from trainers.learning import learn_from
from trainers.loop import score_calls, update
from trainers.needs import needs
from trainers.publish import publish
from trainers.rollouts import as_tasks, train_starts
from trainers.runner.scoring import checked

RECIPE = Path(__file__).parent / "recipe.yaml"


class Training(Struct, frozen=True, kw_only=True):
    task: str
    rule: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}.{self.rule}.{self.seed}"

    def recipe(self, model_dir: Path) -> Recipe:
        return load_recipe(
            RECIPE,
            [
                f"seed={self.seed}",
                f"model.name={model_dir}",
                f"agent.function=agents.py:{self.task}",
                f"reward.function=rewards.py:{self.task}",
                f"train.credit={self.rule}",
            ],
        )


class Bench:
    """A server and a store in which trainings take place one after the other. A context manager."""

    def __init__(self, model_dir: Path, directory: Path) -> None:
        self._model_dir, self._directory = model_dir, directory
        self._place = directory / "episodes.db"
        self._inside = contextlib.ExitStack()

    def __enter__(self) -> Bench:
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir(parents=True)
        self._store = self._inside.enter_context(Store.open(self._place))
        self._server = self._inside.enter_context(
            RolloutServer(
                self._model_dir, "policy", "float32",
                device="cpu", log_dir=self._directory, store=self._place, aliases=["*"], kv_tokens=8192, threads=1,
            )
        )  # fmt: skip
        install()
        self._inside.enter_context(pointing_at(self._server.base_url))
        self._loop = self._inside.enter_context(asyncio.Runner())
        self._client = AsyncOpenAI(base_url=f"{self._server.base_url}/v1", api_key="lrl", max_retries=0)
        return self

    def __exit__(self, *_: Any) -> None:
        self._loop.run(self._client.close())
        self._inside.close()
        shutil.rmtree(self._directory)

    def train(self, training: Training) -> list[float]:
        """The share of right decisions among the episodes of each step, until the threshold is reached or the steps are over."""
        recipe = training.recipe(self._model_dir)
        tasks = as_tasks(agents.make_tasks(training.seed)["train"])
        curve: list[float] = []
        with _learner(recipe, self._model_dir) as learner:
            for step in range(recipe.train.steps):
                self._publish(learner, step + 1)
                phase = f"{training.name}-{step}"
                self._play(training, [_renamed(start, phase) for start in train_starts(recipe, tasks, step)])
                episodes = self._store.episodes(phase=phase)
                curve.append(sum(_was_right(episode) for episode in episodes) / len(episodes))
                if is_learned(curve):
                    break
                scores = score_calls(recipe, learner, episodes) if needs(recipe).scores else None
                data = learn_from(recipe, episodes, scores)
                data.ledger.check(phase)
                update(recipe, learner, data, step)
        return curve

    def _publish(self, learner: Learner, version: int) -> None:
        publish(learner.policy, self._server.admin(), self._directory / "published", version, self._model_dir)

    def _play(self, training: Training, starts: Sequence[EpisodeStart]) -> None:
        async def all_of_them() -> None:
            await asyncio.gather(*(self._episode(training.task, start) for start in starts))

        self._loop.run(all_of_them())

    async def _episode(self, task: str, start: EpisodeStart) -> None:
        self._store.begin(structs.replace(start, started_at=time.time()))
        events: list[Event] = []
        with running(Rollout(start.id, events.append, self._server.base_url)):
            row = {"id": start.task.id, **start.task.input}
            answer = await getattr(agents, task)(row, self._client, random.Random(start.sampling.seed))
        spans = [event for event in events if isinstance(event, Span)]
        record = structs.replace(self._store.episode(start.id), spans=spans, outcome=Outcome.COMPLETED, answer=answer)
        given = checked(getattr(rewards, task)(start.task, record), record)
        self._store.end(
            start.id,
            Outcome.COMPLETED,
            answer=answer,
            error=None,
            counted=True,
            spans=spans,
            rewards=given,
            ended_at=time.time(),
        )


def _renamed(start: EpisodeStart, phase: str) -> EpisodeStart:
    return structs.replace(start, id=f"{phase}.{start.id}", phase=phase)


def _was_right(episode: Episode) -> float:
    return next(reward.value for reward in episode.rewards if reward.name == "right")


@contextlib.contextmanager
def _learner(recipe: Recipe, model_dir: Path) -> Iterator[Learner]:
    learner = Learner(recipe, model_dir, None)
    try:
        yield learner
    finally:
        learner.stop()

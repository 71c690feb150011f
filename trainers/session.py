"""Everything that is open while a run goes on: directory, store, server, runner pool, console, trackers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightning_rl.episode import Episode, EpisodeStart, Outcome
from lightning_rl.errors import RecipeError
from lightning_rl.recipe import Recipe
from lightning_rl.store import Store
from rollout_server.launch import RolloutServer
from rollout_server.models.catalog import resolve_model
from trainers.console import Console
from trainers.evaluation import Score, last_attempts, score, success_values
from trainers.run_directory import RunDirectory
from trainers.runners import EpisodeResult, RunnerPool


@dataclass
class Session:
    recipe: Recipe
    run: RunDirectory
    model_dir: Path
    store: Store
    server: RolloutServer
    pool: RunnerPool
    console: Console
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall-clock seconds by stage."""
    _checks: list[Callable[[], None]] = field(default_factory=list)

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - started

    def watch(self, check: Callable[[], None]) -> None:
        """Have `check` called along with the server's, while episodes are played."""
        self._checks.append(check)

    def check(self) -> None:
        """Raises when something that the run needs has died."""
        self.server.check()
        for check in self._checks:
            check()

    def play(self, title: str, starts: Sequence[EpisodeStart]) -> list[EpisodeResult]:
        """Run the episodes that the store does not have yet, with progress."""
        with self.console.stage(title, total=len(starts)) as stage:
            return self.pool.run(starts, on_end=lambda _: stage.advance(), check=self.check)

    def success_name(self) -> str:
        """The reward that says whether a task was solved."""
        name = self.recipe.evaluate.success or next(iter(self.recipe.reward.weights), None)
        if name is None:
            raise RecipeError(
                f"{self.recipe.source}: evaluate.success: which reward says that a task was solved?",
                hint="name it there, or give reward.weights (then it is the first)",
            )
        return name

    def evaluate(self, label: str, starts: Sequence[EpisodeStart]) -> Score:
        """Greedy success on held-out tasks under the server's present policy."""
        with self.timed("evaluate"):
            self.play(f"evaluate: {label.replace('_', ' ')}", starts)
        return self.evaluation(label)

    def evaluation(self, label: str) -> Score:
        """The score of an evaluation whose episodes are in the store."""
        episodes = last_attempts(self.store.episodes(phase=f"eval-{label}"))
        return score(success_values(episodes, self.success_name()))

    def episodes(self, phase: str, step: int) -> list[Episode]:
        """All attempts, counted or not."""
        return self.store.episodes(phase=phase, step=step)


@contextlib.contextmanager
def open_session(recipe: Recipe, run: RunDirectory, console: Console) -> Iterator[Session]:
    """Start the server on the recipe's model, with the run's store, and a pool of agent processes."""
    with contextlib.ExitStack() as stack:
        with console.stage("load model"):
            model_dir = resolve_model(recipe.model.name)
        store = stack.enter_context(Store.open(run.store))
        with console.stage("start server"):
            server = stack.enter_context(
                RolloutServer(
                    model_dir,
                    recipe.model.name,
                    recipe.model.dtype,
                    log_dir=run.logs,
                    store=run.store,
                    aliases=["*"],
                    kv_tokens=recipe.server.kv_tokens,
                    page_size=recipe.server.page_size,
                    max_batch=recipe.server.max_batch,
                    threads=recipe.server.threads,
                    batch_invariant=recipe.server.batch_invariant,
                )
            )
        outcomes = recipe.agent.outcomes
        pool = stack.enter_context(
            RunnerPool(
                agent_function=recipe.resolve_function(recipe.agent.function),
                reward_function=recipe.resolve_function(recipe.reward.function),
                store=store,
                server_url=server.base_url,
                concurrency=recipe.agent.concurrency,
                timeout_s=recipe.agent.timeout_s,
                max_attempts=recipe.agent.max_attempts,
                outcome_policy={outcome: getattr(outcomes, outcome.value) for outcome in Outcome},
            )
        )
        yield Session(recipe, run, model_dir, store, server, pool, console)

"""Everything that is open while a run goes on: directory, store, server, runner pool, console, trackers."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_rl.episode import Episode, EpisodeStart
from lightning_rl.errors import LightningError
from lightning_rl.recipe import Recipe
from lightning_rl.store import Store
from lightning_rl.store.place import settle_store
from rollout_server.launch import RolloutServer
from rollout_server.models.catalog import resolve_model
from trainers.console import Console
from trainers.evaluation import Score, last_attempts, score, success_values
from trainers.run_directory import RunDirectory, write_json
from trainers.runner.pool import EpisodeResult, RunnerPool
from trainers.serving import answering, running


@dataclass
class Session:
    recipe: Recipe
    run: RunDirectory
    model_dir: Path
    store: Store
    server: RolloutServer
    pool: RunnerPool
    console: Console
    seconds: dict[str, float]
    """Wall-clock seconds by stage, over all attempts at the run."""

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - started
            write_json(self.run.seconds, self.seconds)

    def play(self, title: str, starts: Sequence[EpisodeStart], *, may_fail: bool = False) -> list[EpisodeResult]:
        """Run the episodes that the store does not have yet, with progress.

        Raises LightningError when none of them counts, unless they `may_fail`: there is nothing to learn from a run in which
        nothing works.
        """
        with self.console.stage(title, total=len(starts)) as stage:
            results = self.pool.run(starts, on_end=lambda _: stage.advance(), check=self.server.check)
        failed = [result for result in results if not result.counted]
        if failed and len(failed) == len(results) and not may_fail:
            first = failed[0]
            raise LightningError(
                f"{title}: none of {len(results)} episodes counts; the first, {first.start.id}, ended with "
                f"{first.outcome}:\n{first.error}",
                hint=f"all of them: lrl traces list {self.run.path}",
            )
        if failed:
            counts = Counter(str(result.outcome) for result in failed)
            self.console.say(f"{title}: not counted: {', '.join(f'{n} {outcome}' for outcome, n in counts.items())}")
        return results

    def evaluate(self, label: str, starts: Sequence[EpisodeStart]) -> Score:
        """Greedy success on held-out tasks under the server's present policy."""
        with self.timed("evaluate"):
            self.play(f"evaluate: {label.replace('_', ' ')}", starts)
        return self.evaluation(label)

    def evaluation(self, label: str) -> Score:
        """The score of an evaluation whose episodes are in the store."""
        episodes = last_attempts(self.store.episodes(phase=f"eval-{label}"))
        return score(success_values(episodes, self.recipe.success_reward))

    def episodes(self, phase: str, step: int) -> list[Episode]:
        """All attempts, counted or not."""
        return self.store.episodes(phase=phase, step=step)


@contextlib.contextmanager
def open_session(recipe: Recipe, run: RunDirectory, console: Console) -> Iterator[Session]:
    """Start the server on the recipe's model, with the run's store, and a pool of agent processes."""
    seconds = json.loads(run.seconds.read_text()) if run.seconds.exists() else {}
    started = time.monotonic()
    answered = answering(recipe, os.environ)
    with contextlib.ExitStack() as stack:
        with console.stage("load model"):
            model_dir = resolve_model(recipe.model.name)
        place = settle_store(run.path, recipe.recording.store)
        store = stack.enter_context(Store.open(place))
        with console.stage("start server"):
            server = stack.enter_context(
                RolloutServer(
                    model_dir,
                    recipe.model.name,
                    recipe.model.dtype,
                    device="cpu",  # where the trainer computes: both round alike
                    log_dir=run.logs,
                    store=place,
                    aliases=["*"],
                    kv_tokens=recipe.server.kv_tokens,
                    page_size=recipe.server.page_size,
                    max_batch=recipe.server.max_batch,
                    threads=recipe.server.threads,
                    batch_invariant=recipe.server.batch_invariant,
                    **answered,
                )
            )
        pool = stack.enter_context(RunnerPool(store=store, server_url=server.base_url, **running(recipe, os.environ)))
        seconds["start"] = seconds.get("start", 0.0) + time.monotonic() - started
        yield Session(recipe, run, model_dir, store, server, pool, console, seconds)

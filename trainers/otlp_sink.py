"""The episodes of a run as OpenTelemetry traces, sent behind its back.

A thread reads the episodes of a step or an evaluation from the store when it is over, and sends them. The run never waits:
what does not fit into the queue, or cannot be sent, is counted, said once when it first happens, and summed up at the end.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lightning_rl.episode import Episode
from lightning_rl.errors import LightningError, RecipeError
from lightning_rl.otlp.write import trace_request
from lightning_rl.recipe import Otlp
from lightning_rl.store import Store
from tracers.commands.otlp import TRIES, Collector, ExportError, parse_headers
from trainers.evaluation import Score

QUEUED = 1000
"""Steps and evaluations that wait for a slow collector."""
FLUSH_S = 30.0
"""That the end of a run waits for what is left."""

FLUSH_FAILED_S = 5.0
"""The same after an error or Ctrl-C."""

Batch = tuple[str, int | None]
"""Phase and step of episodes; None for an evaluation, whose phase is its own."""


def collector_of(config: Otlp) -> Collector:
    """Raises RecipeError if the headers' variable is not set."""
    headers = ""
    if config.headers_env is not None:
        if config.headers_env not in os.environ:
            raise RecipeError(f"tracking.otlp.headers_env: {config.headers_env} is not set in the environment")
        headers = os.environ[config.headers_env]
    return Collector(config.endpoint, parse_headers(headers))


class OtlpSink:
    """A sink of `trainers.tracking`."""

    def __init__(self, collector: Collector, store: Store, content: bool, say: Callable[[str], None]) -> None:
        self._collector = collector
        self._store = store
        self._content = content
        self._say = say
        self._waiting: queue.Queue[Batch] = queue.Queue(QUEUED)
        self._closing = threading.Event()
        self._given_up = threading.Event()
        self._handled: set[str] = set()
        self.sent = 0
        self.lost = 0
        """Episodes, and steps that found no room in the queue."""
        self._thread = threading.Thread(target=self._work, name="otlp", daemon=True)
        self._thread.start()

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Metrics are no traces."""

    def evaluation(self, label: str, score: Score, step: int) -> None:
        self._offer((f"eval-{label}", None))

    def samples(self, episodes: Iterable[Episode], step: int) -> None:
        """All episodes of the step, not only the samples: `step` counts from 1 and theirs from 0."""
        self._offer(("train", step - 1))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The summary is no trace."""

    def close(self, *, failed: bool) -> None:
        self._closing.set()
        self._thread.join(FLUSH_FAILED_S if failed else FLUSH_S)
        self._given_up.set()
        unsent = self._thread.is_alive() or not self._waiting.empty()
        if self.lost or unsent:
            rest = ", and the collector was too slow for the rest" if unsent else ""
            self._say(f"traces: {self.sent} episodes were sent to {self._collector.name}, {self.lost} were lost{rest}")

    def _offer(self, batch: Batch) -> None:
        try:
            self._waiting.put_nowait(batch)
        except queue.Full:
            self._lose("it is too slow")

    def _work(self) -> None:
        while not self._given_up.is_set():
            try:
                batch = self._waiting.get(timeout=0.1)
            except queue.Empty:
                if self._closing.is_set():
                    return
                continue
            self._send(*batch)

    def _send(self, phase: str, step: int | None) -> None:
        try:
            ids = [summary.id for summary in self._store.starts(phase=phase, step=step) if summary.outcome is not None]
        except Exception as error:
            self._lose(_why(error))
            return
        for episode_id in ids:
            if self._given_up.is_set() or episode_id in self._handled:
                continue
            self._handled.add(episode_id)
            try:
                request = trace_request(self._store.episode(episode_id), content=self._content)
                self._collector.send(request, 1 if self.lost else TRIES, self._given_up.wait)
                self.sent += 1
            except ExportError as error:
                self._lose(str(error))
            except Exception as error:  # the next one may be well
                self._lose(f"{episode_id}: {_why(error)}")

    def _lose(self, why: str) -> None:
        self.lost += 1
        if self.lost == 1:
            self._say(f"traces: {why}; the run goes on, and its episodes stay in the store")


def _why(error: Exception) -> str:
    """What other errors say may quote what was to be sent."""
    return str(error) if isinstance(error, LightningError) else type(error).__name__

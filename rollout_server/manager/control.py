"""Requests that change the engine as a whole, one after the other: weights, adapters, pauses, sleep.

Each waits until nothing is in flight; while one waits or is carried out at the worker, no pass is planned, so whatever
arrives after it meets its result. Pure: what to tell the worker and the web is returned, not sent.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path

from rollout_server import messages as m
from rollout_server.manager.scheduler import Scheduler

Control = m.UpdateWeights | m.UnloadAdapter | m.Pause | m.Resume | m.Sleep | m.Wake


class ControlQueue:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._queue: deque[Control] = deque()
        self._asked: Control | None = None
        """What the worker is carrying out."""
        self._deadly: Control | None = None
        """What the last worker was carrying out when it died."""
        self.depth = 0
        """Level of the present sleep; 0 is awake."""

    @property
    def holds_planning(self) -> bool:
        return bool(self._queue) or self._asked is not None

    @property
    def under_way(self) -> Control | None:
        """What the worker is carrying out."""
        return self._asked

    def push(self, control: Control) -> None:
        self._queue.append(control)

    def next(self) -> tuple[m.ToWorker | None, list[m.FromManager]]:
        """Begin what is first in the queue, if nothing is in flight: what the worker must do for it, and answers."""
        if self._asked is not None or not self._queue or self._scheduler.in_flight:
            return None, []
        control = self._queue.popleft()
        match control:
            case m.Pause(request_id=key, running=running):
                return None, [*self._scheduler.pause(running), m.Done(request_id=key)]
            case m.Resume(request_id=key):
                self._scheduler.resume()
                return None, [m.Done(request_id=key)]
            case m.UnloadAdapter(request_id=key, adapter=adapter):
                if not adapter or adapter not in self._scheduler.versions:
                    return None, [m.Failed(request_id=key, code="model_not_found", message=_not_loaded(adapter))]
                message: m.ToWorker = m.Unload(adapter=adapter)
            case m.UpdateWeights(request_id=key, source=source, version=version, adapter=adapter):
                if self.depth >= 2:
                    text = "the engine sleeps and its weights are away; wake it first"
                    return None, [m.Failed(request_id=key, code="weights_rejected", message=text)]
                message = m.Load(source=source, version=version, adapter=adapter)
            case m.Sleep(request_id=key, level=level):
                if level <= self.depth:
                    return None, [m.Done(request_id=key)]
                message = m.Release(weights=level >= 2)
            case m.Wake(request_id=key):
                if not self.depth:
                    self._scheduler.wake()
                    return None, [m.Done(request_id=key)]
                message = m.Reclaim()
        self._asked = control
        return message, []

    def loaded(self, result: m.Loaded) -> list[m.FromManager]:
        """The worker has loaded weights, or refused them."""
        update, self._asked = self._asked, None
        assert isinstance(update, m.UpdateWeights), update
        key = update.request_id
        if result.error is not None:
            return [m.Failed(request_id=key, code="weights_rejected", message=result.error)]
        failed = self._scheduler.update(
            update.adapter, update.version, base=is_base(update.source), running=update.running
        )
        return [*failed, m.Updated(request_id=key, version=update.version, checksum=result.checksum)]

    def acknowledged(self, result: m.Acknowledged) -> list[m.FromManager]:
        """The worker has unloaded, released or reclaimed; or could not, and all is as it was."""
        control, self._asked = self._asked, None
        assert control is not None
        key = control.request_id
        if result.error is not None:
            return [m.Failed(request_id=key, code="worker_failed", message=result.error)]
        failed: list[m.Failed] = []
        match control:
            case m.UnloadAdapter(adapter=adapter):
                failed = self._scheduler.unload(adapter)
            case m.Sleep(level=level):
                self._scheduler.sleep()
                self.depth = level
            case m.Wake():
                self.depth = 0
                self._scheduler.wake()
        return [*failed, m.Done(request_id=key)]

    def recover(self) -> list[m.FromManager]:
        """The worker has died. What it was carrying out comes first again, once; a broadcast is over and cannot be repeated."""
        control, self._asked = self._asked, None
        if control is None:
            return []
        again = control is not self._deadly
        self._deadly = control
        if again and not (isinstance(control, m.UpdateWeights) and isinstance(control.source, m.Broadcast)):
            self._queue.appendleft(control)
            return []
        text = "the worker died over it and was started again; things are as they were before"
        return [m.Failed(request_id=control.request_id, code="worker_failed", message=text)]


def is_base(source: m.WeightSource) -> bool:
    """Whether these are base weights; otherwise they are an adapter's."""
    if isinstance(source, m.Directory):
        return not (Path(source.path) / "adapter_config.json").is_file()
    return source.adapter_config is None


def _not_loaded(adapter: str) -> str:
    return f"no adapter {adapter!r} is loaded" if adapter else "the policy's own adapter cannot be unloaded by name"

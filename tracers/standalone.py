"""An episode that a decorated function opens for itself, in the store of LRL_STORE, with its calls going to LRL_SERVER.

Any number may run at once in one process, each in its own context: asyncio tasks, threads, one inside nothing else. Each
process has one store per address and one thread that writes to it, so that neither an event loop nor the other episodes
wait for a disk. However the agent ends, the episode gets an outcome, and exceptions pass unchanged; what is still running
when the interpreter ends is cancelled. Known keys are not stored.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import time
import traceback
import uuid
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lightning_rl.episode import CallLink, EpisodeStart, Outcome, Reward, Span, Task
from lightning_rl.errors import LightningError
from tracers.context import Event, Rollout, running
from tracers.environment import pointing_at
from tracers.forking import after_fork
from tracers.install import install
from tracers.plain import as_json
from tracers.spans import span

if TYPE_CHECKING:
    from lightning_rl.redact import Redactor
    from lightning_rl.store import Store

PHASE = "standalone"


def address() -> tuple[str, str] | None:
    """Store and server that the environment names; None if it names neither."""
    store, server = os.environ.get("LRL_STORE"), os.environ.get("LRL_SERVER")
    if store and server:
        return store, server
    if store or server:
        raise LightningError(
            "only one of LRL_STORE and LRL_SERVER is set", hint="set both to record the rollout, or neither"
        )
    return None


class StandaloneEpisode:
    """A context manager, sync or async, around one run of an agent; whoever runs it sets `answer`."""

    def __init__(self, place: tuple[str, str], label: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        store, self._server_url = place
        self._writer = _writer(store)
        self._label = label
        self._input = {"args": as_json(args), "kwargs": as_json(kwargs)}
        self._id = f"{PHASE}-{uuid.uuid4().hex[:12]}"
        self._events: list[Event] = []
        self._rollout = Rollout(self._id, self._events.append, self._server_url)
        self._is_over = False
        self._is_empty = False
        self._inside = ExitStack()
        self.answer: Any = None

    def __enter__(self) -> StandaloneEpisode:
        begun = self._begin()
        with self._ended_if_it_fails():
            begun.result()
            self._enter()
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: TracebackType | None) -> None:
        if not self._is_over:
            self._leave(error)
            self._end(error).result()
            self._check_recorded()

    async def __aenter__(self) -> StandaloneEpisode:
        begun = self._begin()
        with self._ended_if_it_fails():
            await _written(begun)
            self._enter()
        return self

    async def __aexit__(self, _: Any, error: BaseException | None, __: TracebackType | None) -> None:
        if not self._is_over:
            self._leave(error)
            await _written(self._end(error))
            self._check_recorded()

    def cancel(self) -> None:
        """End it from outside, now."""
        self._rollout.close()
        self._end(GeneratorExit()).result()

    @contextmanager
    def _ended_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._leave(error)
            self._end(error)
            raise

    def _enter(self) -> None:
        install()
        self._inside.enter_context(running(self._rollout))
        self._inside.enter_context(pointing_at(self._server_url))
        self._inside.enter_context(span(self._label, kind="agent"))

    def _leave(self, error: BaseException | None) -> None:
        self._inside.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)

    def _begin(self) -> Future[None]:
        started_at = time.time()
        _open.add(self)

        def write(store: Store) -> None:
            task = Task(id=self._label, input=_redactor().value(self._input))
            store.begin(EpisodeStart(id=self._id, task=task, phase=PHASE, started_at=started_at))

        return self._writer.submit(write)

    def _end(self, error: BaseException | None) -> Future[None]:
        self._is_over = True
        _open.discard(self)
        outcome = _outcome(error)
        closed = error is None or isinstance(error, GeneratorExit)
        text = None if closed else as_json("".join(traceback.format_exception(error)))
        answer, events, ended_at = as_json(self.answer), list(self._events), time.time()

        def write(store: Store) -> None:
            redactor = _redactor()
            store.end(
                self._id,
                outcome,
                answer=redactor.value(answer),
                error=redactor.value(text),
                counted=outcome is Outcome.COMPLETED,
                spans=redactor.spans([event for event in events if isinstance(event, Span)]),
                rewards=redactor.rewards([event for event in events if isinstance(event, Reward)]),
                links=[event for event in events if isinstance(event, CallLink)],
                ended_at=ended_at,
            )
            self._is_empty = outcome is Outcome.COMPLETED and len(events) < 2 and not store.call_count(self._id)

        return self._writer.submit(write)

    def _check_recorded(self) -> None:
        if self._is_empty:
            warnings.warn(
                f"nothing but its root span is recorded of the rollout {self._label!r}: no request to {self._server_url} said "
                "that it belongs to it; send those of HTTP clients that are not followed to lrl.base_url()",
                RuntimeWarning,
                stacklevel=4,
            )


def _redactor() -> Redactor:
    from lightning_rl.redact import Redactor, environment_keys

    return Redactor((), environment_keys(os.environ))


def _outcome(error: BaseException | None) -> Outcome:
    match error:
        case None:
            return Outcome.COMPLETED
        case Exception():
            return Outcome.AGENT_ERROR
        case _:
            return Outcome.CANCELLED


async def _written(write: Future[None]) -> None:
    """Wait without holding up the event loop; a write goes on even if the waiting task is cancelled."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:  # another library's event loop
        write.result()
    else:
        await asyncio.shield(asyncio.wrap_future(write))


class _Writer:
    """The thread of this process that writes to one store."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lrl-store")
        self._store: Store | None = None
        self._file: tuple[int, int] | None = None

    def submit(self, write: Callable[[Store], None]) -> Future[None]:
        if _exiting:  # the pool's thread is gone
            write(self._open())
            done: Future[None] = Future()
            done.set_result(None)
            return done
        return self._thread.submit(lambda: write(self._open()))

    def _open(self) -> Store:
        """The store, opened anew where its file was deleted or put in another's place."""
        from lightning_rl.store import Store

        if self._store is None or self._file != _identity(self._place):
            if self._store is not None:
                self._store.close()
            self._store = Store.open(self._place)
            self._file = _identity(self._place)
        return self._store


def _identity(place: str) -> tuple[int, int] | None:
    if "://" in place:
        return None
    try:
        found = Path(place).stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


_lock = threading.Lock()
_writers: dict[str, _Writer] = {}
_open: weakref.WeakSet[StandaloneEpisode] = weakref.WeakSet()
_exiting = False


@atexit.register
def _cancel_all() -> None:
    global _exiting
    _exiting = True
    for episode in list(_open):
        episode.cancel()


def _writer(place: str) -> _Writer:
    key = place if "://" in place else str(Path(place).absolute())
    with _lock:
        if key not in _writers:
            _writers[key] = _Writer(key)
        return _writers[key]


@after_fork
def _forget() -> None:
    global _lock
    _lock = threading.Lock()
    _writers.clear()
    _open.clear()

"""The manager process: between the web's requests and the worker's passes. No torch here.

`python -m rollout_server.manager.process CONFIG.json`. The worker has up to `lookahead` passes queued beyond the one that
runs. When results arrive, the next pass is planned and sent before the web hears of them; requests are taken in while
passes run. The answers of a pass go to the web as one multi-part ZeroMQ message, a part each: it wakes up once.

The worker is this process's child. When it dies it is started again, loads the weights that it held (`kept_weights`), and goes
on with the tokens that are known; requests that arrive meanwhile wait. What cannot be loaded again is refused as
`weights_lost` until it is published once more.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import msgspec
import zmq

from lightning_rl.lifetime import die_with_parent
from rollout_server import messages as m
from rollout_server.config import EngineConfig, read_engine_config
from rollout_server.grammar import Grammars
from rollout_server.manager.compiling import Compiled, Compiling
from rollout_server.manager.control import ControlQueue
from rollout_server.manager.kept_weights import KeptWeights, Name
from rollout_server.manager.masking import GrammarError, Masker
from rollout_server.manager.refusal import Refused
from rollout_server.manager.scheduler import Scheduler
from rollout_server.manager.worker_process import RestartBudget, WorkerLost, WorkerProcess

log = logging.getLogger("lrl.manager")

WEIGHTS_LOST = "the engine was started again and could not load these weights again; publish them once more"
GARBAGE_THRESHOLD = 100_000
"""Objects made between two searches for garbage cycles. Nothing here makes cycles by the pass; each search is a pause."""


class Manager:
    def __init__(self, engine: EngineConfig, web: zmq.Socket[bytes], worker: WorkerProcess) -> None:
        """`worker` has been started; returns when it is ready. Raises WorkerLost when it dies before."""
        self.web, self.worker = web, worker
        self.ready = ready = _first_word(worker)
        self.weights = KeptWeights(Path(engine.ipc_dir) / "weights", ready.checksum)
        self.up = True
        """The worker is there, with the weights that it should have."""
        self._orders: deque[tuple[Name, m.Load] | m.Release] = deque()
        """What a new worker must still do before it is up; it is doing the first."""
        self._died_at = 0.0
        self._budget = RestartBudget()
        self._budget.ready()
        self.scheduler = Scheduler(
            pages=ready.num_pages,
            page_size=ready.page_size,
            vocab_size=ready.vocab_size,
            max_batch=engine.max_batch,
            max_step_tokens=engine.max_step_tokens,
            lookahead=engine.lookahead,
            host_pages=ready.host_pages,
        )
        self.control = ControlQueue(self.scheduler)
        self.compiling = Compiling(Grammars(engine.model_dir, ready.vocab_size))

    def run(self, signals: int) -> None:
        """`signals` is readable when one has come. Raises WorkerLost when there will be no worker any more."""
        while True:
            poller = zmq.Poller()
            poller.register(self.web, zmq.POLLIN)
            poller.register(self.worker.socket, zmq.POLLIN)
            poller.register(self.worker.pipe, zmq.POLLIN)
            poller.register(self.compiling.pipe, zmq.POLLIN)
            poller.register(signals, zmq.POLLIN)
            while not any(which == self.worker.pipe for which, _ in poller.poll()):
                self.turn()
            self.replace_worker()

    def turn(self) -> None:
        """Take in all that has arrived. The worker's results come first: it must not wait."""
        while (frame := _receive(self.worker.socket)) is not None:
            replies = self._from_worker(m.decode_from_worker(frame))
            if not self.control.holds_planning:  # otherwise what it answers comes after these
                self._feed()
            self._reply(replies)
        while (frame := _receive(self.web)) is not None:
            self._reply(self._from_web(m.decode_to_manager(frame)))
        self._reply([reply for compiled in self.compiling.finished() for reply in self._compiled(compiled)])
        self._feed()
        self.compiling.resume()

    def _feed(self) -> None:
        """Queue passes at the worker as far as results and look-ahead allow, or what must have it for itself."""
        if not self.up:
            return
        while self.control.holds_planning:
            message, replies = self.control.next()
            self._reply(replies)
            if message is not None:
                self._tell_worker(message)
            elif not replies:
                return
        while True:
            while (forward := self.scheduler.plan()) is not None:
                self._tell_worker(forward)
            if not self.scheduler.waits_for_masks:
                return
            self._reply(self.scheduler.catch_up())

    def _tell_worker(self, message: m.ToWorker) -> None:
        with contextlib.suppress(zmq.Again):  # it has just died, as its pipe will say
            self.worker.socket.send(m.encode(message), zmq.NOBLOCK)

    def _from_web(self, message: m.ToManager) -> Sequence[m.FromManager]:
        match message:
            case m.Submit():
                return self._submit(message)
            case m.Score(request_id=key, ids=[_], adapter=adapter) if adapter in self.scheduler.versions:
                return [m.Scored(request_id=key, logprobs=[], version=self.scheduler.versions[adapter])]
            case m.Score(request_id=key, ids=ids, adapter=adapter):
                return self._enqueue(key, ids, None, adapter=adapter)
            case m.Cancel(request_id=key, index=index):
                if not self.compiling.cancel(key, index):
                    self.scheduler.cancel(key, index)
                return []
            case m.GetStats(request_id=key, check=check):
                return [self._stats(key, check)]
            case _:
                self.control.push(message)
                return []

    def _from_worker(self, message: m.FromWorker) -> Sequence[m.FromManager]:
        if not self.up:
            return self._restore(message)
        match message:
            case m.Forwarded():
                return self.scheduler.apply(message)
            case m.Loaded():
                return self._loaded(message)
            case m.Acknowledged():
                return self._acknowledged(message)
            case m.Ready():
                raise RuntimeError("the worker was ready before")

    def _loaded(self, result: m.Loaded) -> Sequence[m.FromManager]:
        update = self.control.under_way
        assert isinstance(update, m.UpdateWeights)
        if result.error is None:
            self.weights.loaded(update.source, update.adapter, update.version, result.checksum)
        return self.control.loaded(result)

    def _acknowledged(self, result: m.Acknowledged) -> Sequence[m.FromManager]:
        control = self.control.under_way
        if isinstance(control, m.UnloadAdapter):
            if control.adapter in self.weights.lost:
                result = m.Acknowledged()  # the worker has never heard of it
            if result.error is None:
                self.weights.unloaded(control.adapter)
        return self.control.acknowledged(result)

    # a worker that died -----------------------------------------------------------------------------------------------

    def replace_worker(self) -> None:
        """The worker is gone: start another. Raises WorkerLost when that has been tried too often."""
        how = self.worker.stop()
        if self.up:
            self._died_at = time.monotonic()
        failed = self.scheduler.recover()
        if not self._budget.spend(explained=bool(failed)):
            raise WorkerLost(f"ended with {how}, as did those before it")
        log.error("the worker ended with %s; starting another", how)
        self.up = False
        self._orders.clear()
        replies = [*self.control.recover(), *failed]
        self.worker.start()
        self._reply(replies)

    def _restore(self, message: m.FromWorker) -> Sequence[m.FromManager]:
        """What a new worker says before it is up."""
        match message:
            case m.Ready(checksum=checksum):
                if msgspec.structs.replace(message, checksum="") != msgspec.structs.replace(self.ready, checksum=""):
                    raise WorkerLost("is ready with another model than before: its files have changed")
                self._orders.extend(self.weights.begin(checksum))
                if self.control.depth:
                    self._orders.append(m.Release(weights=self.control.depth >= 2))
            case m.Loaded():
                order = self._orders.popleft()
                assert not isinstance(order, m.Release)
                self.weights.repeated(order[0], message)
            case m.Acknowledged(error=error):
                order = self._orders.popleft()
                if error is not None and order == m.Release(weights=True):
                    log.error("the new worker cannot put its weights away, but sleeps: %s", error)
                    self.control.depth = 1
                    self._orders.append(m.Release(weights=False))
            case m.Forwarded():
                raise RuntimeError("results of a pass that was never sent")
        if self._orders:
            order = self._orders[0]
            self._tell_worker(order if isinstance(order, m.Release) else order[1])
            return []
        self.up = True
        self._budget.ready()
        log.warning("the worker is up again, %.1f s after the last one's death", time.monotonic() - self._died_at)
        lost = [r for r in self.scheduler.requests.values() if self.weights.is_lost(r.choices[0].adapter)]
        return self.scheduler.fail(lost, WEIGHTS_LOST, "weights_lost")

    # requests ---------------------------------------------------------------------------------------------------------

    def _submit(self, submit: m.Submit) -> list[m.FromManager]:
        if not submit.grammar:
            return self._accept(submit)
        try:
            masker = self.compiling.begin(submit)
        except GrammarError as error:
            return [_invalid_grammar(submit, error)]
        return self._accept(submit, masker) if masker is not None else []

    def _compiled(self, compiled: Compiled) -> list[m.FromManager]:
        if isinstance(compiled.grammar, GrammarError):
            return [_invalid_grammar(compiled.submit, compiled.grammar)]
        replies = self._accept(compiled.submit, compiled.grammar)
        for index in compiled.cancelled:
            self.scheduler.cancel(compiled.submit.request_id, index)
        return replies

    def _accept(self, submit: m.Submit, masker: Masker | None = None) -> list[m.FromManager]:
        room = self.ready.max_positions - len(submit.prompt_ids)
        sampling = submit.sampling
        if room < sampling.max_tokens:
            sampling = msgspec.structs.replace(sampling, max_tokens=max(1, room))
        return self._enqueue(
            submit.request_id,
            submit.prompt_ids,
            sampling,
            submit.priority,
            submit.n,
            submit.adapter,
            submit.flow,
            masker,
        )

    def _enqueue(
        self,
        key: str,
        ids: list[int],
        sampling: m.SamplingParams | None,
        priority: int = 0,
        n: int = 1,
        adapter: str = "",
        flow: str = "",
        masker: Masker | None = None,
    ) -> list[m.FromManager]:
        try:
            if self.weights.is_lost(adapter):
                raise Refused("weights_lost", WEIGHTS_LOST)
            self._check(ids, sampling)
            if n < 1 or (sampling is not None and sampling.max_tokens < 1):
                raise Refused("invalid_sampling", "n and max_tokens must be at least 1")
            self.scheduler.submit(key, ids, sampling, priority, n, adapter, flow, masker)
        except Refused as refused:
            return [m.Failed(request_id=key, code=refused.code, message=str(refused))]
        return []

    def _check(self, ids: list[int], sampling: m.SamplingParams | None) -> None:
        limit = self.ready.max_positions
        if not ids:
            raise Refused("context_length_exceeded", "the prompt is empty")
        if len(ids) + (sampling is not None) > limit:
            raise Refused("context_length_exceeded", f"the prompt has {len(ids)} tokens, the model's limit is {limit}")
        if not 0 <= min(ids) <= max(ids) < self.ready.vocab_size:
            raise Refused("invalid_token_ids", f"token ids must lie in 0 … {self.ready.vocab_size - 1}")

    def _stats(self, key: str, check: bool) -> m.FromManager:
        if check:
            try:
                self.scheduler.check_integrity()
            except AssertionError as broken:
                return m.Failed(request_id=key, code="integrity", message=str(broken))
        own = {
            "worker_up": float(self.up),
            "compiling": float(len(self.compiling)),
            "worker_restarts": float(self.worker.starts - 1),
            "weights_lost": float(self.weights.is_lost("")),
            "adapters_lost": float(len(self.weights.lost - {None, ""})),
        }
        return m.Stats(request_id=key, values=self.scheduler.stats() | own, checksums=self.weights.checksums())

    def _reply(self, replies: Sequence[m.FromManager]) -> None:
        if replies:
            with contextlib.suppress(zmq.Again):  # the web process is gone, and with it whoever asked
                self.web.send_multipart([m.encode(reply) for reply in replies], zmq.NOBLOCK, copy=True)


def _invalid_grammar(submit: m.Submit, error: GrammarError) -> m.Failed:
    return m.Failed(request_id=submit.request_id, code="invalid_grammar", message=f"its grammar: {error}")


def _receive(socket: zmq.Socket[bytes]) -> bytes | None:
    try:
        return socket.recv(zmq.NOBLOCK)
    except zmq.Again:
        return None


def _first_word(worker: WorkerProcess) -> m.Ready:
    poller = zmq.Poller()
    poller.register(worker.socket, zmq.POLLIN)
    poller.register(worker.pipe, zmq.POLLIN)
    if not any(which == worker.socket for which, _ in poller.poll()):
        raise WorkerLost(f"ended with {worker.stop()} before it was ready")
    ready = m.decode_from_worker(worker.socket.recv())
    assert isinstance(ready, m.Ready), ready
    return ready


def serve(engine: EngineConfig, config_file: Path) -> None:
    """Until SIGINT. Raises WorkerLost, which says why there is no worker."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    web = context.socket(zmq.PAIR)
    web.set_hwm(0)  # nothing is ever dropped; what is in flight is bounded by the web's admission
    web.bind(f"ipc://{engine.ipc_dir}/web.ipc")
    command = [sys.executable, "-m", "rollout_server.worker.process", str(config_file)]
    worker_log = None if engine.worker_log is None else Path(engine.worker_log)
    worker = WorkerProcess(context, Path(engine.ipc_dir), command, worker_log)
    worker.start()
    try:
        manager = Manager(engine, web, worker)
        gc.freeze()
        gc.set_threshold(GARBAGE_THRESHOLD)
        manager.run(_wakeup_pipe())
    except WorkerLost as lost:
        worker.bury(str(lost))
        raise
    finally:
        worker.stop()
        web.close(0)  # whoever has not heard the last answers learns of the broken line


def _wakeup_pipe() -> int:
    """Readable when a signal has come: one that comes just before the poll begins would not interrupt it."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)
    return reading


def _terminate(number: int, frame: object) -> None:
    raise SystemExit(0)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    file = Path(sys.argv[1])
    settings = read_engine_config(file)
    die_with_parent(settings.parent_pid)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # may come to all processes at once: the web still drains
    signal.signal(signal.SIGINT, _terminate)
    code = 1
    try:
        serve(settings, file)
    except SystemExit:
        code = 0
    except WorkerLost as lost:
        print(f"the worker {lost}", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)  # does not wait for a grammar that is being compiled

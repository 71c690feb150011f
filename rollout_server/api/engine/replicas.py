"""All replicas of the engine as one: requests go to the one that knows their prefix, changes go to all in one order.

Every replica has a manager, a worker, and its own cache; the weights are the same in all. A change (weights, adapters,
pause, sleep) is sent to all at once and has happened when all say so. A client's coroutines start in the order in which
they are made, and send before they first wait: all replicas hear all changes in the same order, and none is held up by
one that cannot be done yet (weights for a server that sleeps).

A replica whose manager is gone takes no part any more; the others serve on, and hold the changes alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import msgspec

from rollout_server import messages as m
from rollout_server.api.engine.engine_client import EngineClient, Generation
from rollout_server.api.engine.routing import PrefixRouter
from rollout_server.api.errors import EngineError

T = TypeVar("T")

ANSWER_TIMEOUT_S = 4.0
"""For a manager to say how it is. It answers between two passes, so this is long."""
NOT_SUMMED = {"version": min, "adapters": min, "worker_up": min, "weights_lost": max}
"""Counters that are not amounts, and what stands for all replicas together."""


class Replicas:
    """`capacity`: tokens that one replica's cache holds."""

    def __init__(self, clients: Sequence[EngineClient], capacity: int) -> None:
        self._clients = list(clients)
        self._router = PrefixRouter(len(clients), capacity)
        self.adapters: dict[str, int] = {}
        """Loaded adapters by name, with their versions."""
        self._latest: dict[str, int] = {}
        """The last version that was asked for of every adapter, the policy included."""
        self._changes: set[asyncio.Future[Any]] = set()
        """Under way; the event loop itself would forget them."""

    def __len__(self) -> int:
        return len(self._clients)

    def start(self) -> None:
        for client in self._clients:
            client.start()

    def hang_up(self) -> None:
        for client in self._clients:
            client.hang_up()

    def close(self) -> None:
        for client in self._clients:
            client.close()

    def submit(
        self,
        prompt_ids: list[int],
        sampling: m.SamplingParams,
        *,
        n: int = 1,
        adapter: str = "",
        priority: int = 0,
        grammar: str = "",
        flow: str = "",
    ) -> Generation:
        """As `EngineClient.submit`; the choices of a request stay together."""
        route = self._router.route(prompt_ids, n, adapter, self._best(adapter))
        try:
            return self._clients[route.replica].submit(
                prompt_ids,
                sampling,
                n=n,
                adapter=adapter,
                priority=priority,
                grammar=grammar,
                flow=flow,
                ended=lambda: self._router.release(route),
            )
        except BaseException:
            self._router.release(route)
            raise

    async def score(self, ids: list[int], adapter: str = "") -> m.Scored:
        replica = self._router.least_loaded(self._best(adapter))
        self._router.loads[replica] += 1
        try:
            return await self._clients[replica].score(ids, adapter)
        finally:
            self._router.loads[replica] -= 1

    async def update_weights(
        self,
        source: m.WeightSource,
        version: int | None,
        *,
        adapter: str = "",
        running: m.Running = "reprefill",
        expected_checksum: str | None = None,
    ) -> m.Updated:
        """Load in all replicas; of a broadcast the first one receives as the source's rank, the next as the one above.

        `version` None is one more than the adapter's last. A new adapter that one replica refuses is unloaded from the others.
        Goes on though nobody waits for it any more: what the replicas hold and what is known here stay the same.

        Raises:
            EngineError: `weights_rejected`: none holds the new weights. `replicas_disagree`: some do, or they hold different
                ones. `checksum_mismatch`: the weights are live.
        """
        return await self._whole(self._update_weights(source, version, adapter, running, expected_checksum))

    async def _update_weights(
        self,
        source: m.WeightSource,
        version: int | None,
        adapter: str,
        running: m.Running,
        expected_checksum: str | None,
    ) -> m.Updated:
        up = self._up()
        if isinstance(source, m.Broadcast) and len(up) < len(self):
            raise EngineError("weights_rejected", "a broadcast needs all replicas, and the managers of some are gone")
        sources = [_of_replica(source, number, len(self)) for number in range(len(self))]
        version = self._latest.get(adapter, 0) + 1 if version is None else version
        self._latest[adapter] = version
        answers, refusals = await self._try_all(
            lambda number, client: client.update_weights(sources[number], version, adapter=adapter, running=running)
        )
        if refusals:
            await self._take_back(adapter, version, list(answers), refusals)
        if adapter:
            self.adapters[adapter] = version
        checksums = [answer.checksum for answer in answers.values()]
        if len(set(checksums)) > 1:
            raise EngineError("replicas_disagree", f"the replicas hold different weights, checksums {checksums}")
        if expected_checksum is not None and checksums[0] != expected_checksum:
            raise EngineError(
                "checksum_mismatch",
                f"version {version} is live with checksum {checksums[0]}, expected was {expected_checksum}",
            )
        return next(iter(answers.values()))

    async def _take_back(
        self, adapter: str, version: int, taken: list[int], refusals: Mapping[int, EngineError]
    ) -> NoReturn:
        """Some replicas, or all, have refused an update."""
        refusal = next(iter(refusals.values()))
        if not taken:
            raise refusal
        if adapter and adapter not in self.adapters:
            await asyncio.gather(*(self._clients[number].unload_adapter(adapter) for number in taken))
            raise refusal
        raise EngineError(
            "replicas_disagree",
            f"version {version} is live in replicas {taken}, and was refused by {list(refusals)}: {refusal.message}",
        ) from refusal

    async def unload_adapter(self, adapter: str) -> None:
        """From all replicas that have it; its name stands as long as one may. Goes on though nobody waits for it any more."""
        if adapter not in self.adapters:
            raise EngineError("model_not_found", f"no adapter {adapter!r} is loaded")
        await self._whole(self._unload_adapter(adapter))

    async def _unload_adapter(self, adapter: str) -> None:
        answers, refusals = await self._try_all(lambda _, client: client.unload_adapter(adapter))
        for refusal in refusals.values():
            if refusal.code != "model_not_found":
                raise refusal
        self.adapters.pop(adapter, None)
        if not answers:
            raise next(iter(refusals.values()))

    async def pause(self, running: m.Running) -> None:
        await self._change(lambda client: client.pause(running))

    async def resume(self) -> None:
        await self._change(lambda client: client.resume())

    async def sleep(self, level: int) -> None:
        await self._change(lambda client: client.sleep(level))

    async def wake(self) -> None:
        await self._change(lambda client: client.wake())

    async def checksums(self) -> dict[str, str]:
        """Of the live weights (`messages.Stats`). Raises EngineError `replicas_disagree`."""
        first, *others = (await self._ask_all(lambda client: client.checksums())).values()
        if any(other != first for other in others):
            raise EngineError("replicas_disagree", f"the replicas hold different weights: {[first, *others]}")
        return first

    async def stats(self, *, check: bool = False) -> dict[str, float]:
        """Summed; with more than one replica also each one's own, as `replica_0.running`. Those that are gone are left out."""
        values = await self._ask_all(lambda client: client.stats(check=check))
        return values[0] if len(self) == 1 else summed(values)

    async def health(self) -> dict[int, str]:
        """What is wrong with the replicas that cannot serve now, by number.

        Raises EngineError, `engine_unavailable` or `weights_lost`, when none can.
        """
        troubles = await asyncio.gather(*(self._trouble(client) for client in self._clients))
        found = {number: trouble for number, trouble in enumerate(troubles) if trouble is not None}
        if len(found) < len(self):
            return {number: trouble.message for number, trouble in found.items()}
        if len(self) == 1:
            raise found[0]
        told = "; ".join(f"replica {number}: {trouble.message}" for number, trouble in found.items())
        raise EngineError(found[0].code, told)

    async def _trouble(self, client: EngineClient) -> EngineError | None:
        try:
            values = await asyncio.wait_for(client.stats(), ANSWER_TIMEOUT_S)
        except TimeoutError:
            return EngineError("engine_unavailable", "the engine does not answer yet")
        except EngineError as error:
            return error
        if not values.get("worker_up", 1.0):
            return EngineError("engine_unavailable", "the engine's worker process died and is being started again")
        if values.get("weights_lost", 0.0):
            return EngineError("weights_lost", "the engine was started again and waits for its weights to be published")
        return None

    def _up(self) -> list[int]:
        """The replicas whose managers are there. Raises EngineError when none is."""
        up = [number for number, client in enumerate(self._clients) if client.down is None]
        if not up:
            assert self._clients[0].down is not None
            raise self._clients[0].down
        return up

    def _best(self, adapter: str) -> list[int]:
        """Those of them that have not lost this adapter's weights, if there are any."""
        up = self._up()
        return [number for number in up if adapter not in self._clients[number].lost] or up

    async def _whole(self, change: Coroutine[Any, Any, T]) -> T:
        """See it through, even if this is cancelled."""
        task = asyncio.ensure_future(change)
        self._changes.add(task)
        task.add_done_callback(self._changed)
        return await asyncio.shield(task)

    def _changed(self, task: asyncio.Future[Any]) -> None:
        self._changes.discard(task)
        if not task.cancelled():
            task.exception()  # whoever asked may be gone

    async def _change(self, work: Callable[[EngineClient], Awaitable[None]]) -> None:
        await self._ask_all(work)

    async def _ask_all(self, work: Callable[[EngineClient], Awaitable[T]]) -> dict[int, T]:
        """Answers by replica. Raises the first EngineError after all have answered."""
        answers, refusals = await self._try_all(lambda _, client: work(client))
        for refusal in refusals.values():
            raise refusal
        return answers

    async def _try_all(
        self, work: Callable[[int, EngineClient], Awaitable[T]]
    ) -> tuple[dict[int, T], dict[int, EngineError]]:
        """Answers and refusals by replica. Those that are gone by the end are left out, unless there is no other."""
        numbers = self._up()
        told = await asyncio.gather(
            *(work(number, self._clients[number]) for number in numbers), return_exceptions=True
        )
        answers: dict[int, T] = {}
        refusals: dict[int, EngineError] = {}
        for number, answer in zip(numbers, told, strict=True):
            if not isinstance(answer, BaseException):
                answers[number] = answer
            elif isinstance(answer, EngineError):
                refusals[number] = answer
            else:
                raise answer
        gone = [number for number in refusals if self._clients[number].down is not None]
        if answers or len(gone) < len(refusals):
            for number in gone:
                del refusals[number]
        return answers, refusals


def summed(replicas: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """All replicas' counters together, and each one's under its number."""
    names = dict.fromkeys(name for values in replicas.values() for name in values)
    totals = {
        name: NOT_SUMMED.get(name, sum)([values[name] for values in replicas.values() if name in values])
        for name in names
    }
    each = {f"replica_{number}.{name}": value for number, values in replicas.items() for name, value in values.items()}
    return {**totals, "replicas": float(len(replicas)), **each}


def _of_replica(source: m.WeightSource, number: int, replicas: int) -> m.WeightSource:
    if not isinstance(source, m.Broadcast):
        return source
    if source.rank + replicas > source.world_size:
        raise EngineError(
            "weights_rejected",
            f"a broadcast to {replicas} replicas from rank {source.rank} on needs a world size of at least "
            f"{source.rank + replicas}, not {source.world_size}",
        )
    return msgspec.structs.replace(source, rank=source.rank + number)

"""All replicas of the engine as one: requests go to the one that knows their prefix, changes go to all in one order.

Every replica has a manager, a worker, and its own cache; the weights are the same in all. A change (weights, adapters,
pause, sleep) is sent to all at once and has happened when all say so. A client's coroutines start in the order in which
they are made, and send before they first wait: all replicas hear all changes in the same order, and none is held up by
one that cannot be done yet (weights for a server that sleeps).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

import msgspec

from rollout_server import messages as m
from rollout_server.api.engine_client import EngineClient, Generation
from rollout_server.api.errors import EngineError
from rollout_server.api.routing import PrefixRouter

T = TypeVar("T")

NOT_SUMMED = {"version": min, "adapters": min}
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
        self, prompt_ids: list[int], sampling: m.SamplingParams, *, n: int = 1, adapter: str = "", priority: int = 0
    ) -> Generation:
        """As `EngineClient.submit`; the choices of a request stay together."""
        route = self._router.route(prompt_ids, n, adapter)
        try:
            return self._clients[route.replica].submit(
                prompt_ids,
                sampling,
                n=n,
                adapter=adapter,
                priority=priority,
                ended=lambda: self._router.release(route),
            )
        except BaseException:
            self._router.release(route)
            raise

    async def score(self, ids: list[int], adapter: str = "") -> m.Scored:
        replica = self._router.least_loaded()
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

        `version` None is one more than the adapter's last.

        Raises:
            EngineError: `weights_rejected`: some replicas may hold the new weights when others refused them.
                `replicas_disagree`, `checksum_mismatch`: the weights are live.
        """
        sources = [_of_replica(source, number, len(self)) for number in range(len(self))]
        version = self._latest.get(adapter, 0) + 1 if version is None else version
        self._latest[adapter] = version
        answers = await asyncio.gather(
            *(
                client.update_weights(own, version, adapter=adapter, running=running)
                for client, own in zip(self._clients, sources, strict=True)
            )
        )
        if adapter:
            self.adapters[adapter] = version
        checksums = [answer.checksum for answer in answers]
        if len(set(checksums)) > 1:
            raise EngineError("replicas_disagree", f"the replicas hold different weights, checksums {checksums}")
        if expected_checksum is not None and checksums[0] != expected_checksum:
            raise EngineError(
                "checksum_mismatch",
                f"version {version} is live with checksum {checksums[0]}, expected was {expected_checksum}",
            )
        return answers[0]

    async def unload_adapter(self, adapter: str) -> None:
        if adapter not in self.adapters:
            raise EngineError("model_not_found", f"no adapter {adapter!r} is loaded")
        del self.adapters[adapter]
        await self._change(lambda client: client.unload_adapter(adapter))

    async def pause(self, running: m.Running) -> None:
        await self._change(lambda client: client.pause(running))

    async def resume(self) -> None:
        await self._change(lambda client: client.resume())

    async def sleep(self, level: int) -> None:
        await self._change(lambda client: client.sleep(level))

    async def wake(self) -> None:
        await self._change(lambda client: client.wake())

    async def stats(self, *, check: bool = False) -> dict[str, float]:
        """Summed; with more than one replica also each one's own, as `replica_0.running`."""
        return summed(await asyncio.gather(*(client.stats(check=check) for client in self._clients)))

    async def _change(self, work: Callable[[EngineClient], Awaitable[None]]) -> None:
        await asyncio.gather(*(work(client) for client in self._clients))


def summed(replicas: Sequence[Mapping[str, float]]) -> dict[str, float]:
    if len(replicas) == 1:
        return dict(replicas[0])
    names = dict.fromkeys(name for values in replicas for name in values)
    totals = {
        name: NOT_SUMMED.get(name, sum)([values[name] for values in replicas if name in values]) for name in names
    }
    each = {
        f"replica_{number}.{name}": value for number, values in enumerate(replicas) for name, value in values.items()
    }
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

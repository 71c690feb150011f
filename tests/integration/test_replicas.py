"""Several replicas as one when some of them refuse, lose their weights or go away: real sockets, scripted managers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from rollout_server import messages as m
from rollout_server.api.engine.engine_client import EngineClient
from rollout_server.api.engine.replicas import Replicas
from rollout_server.api.errors import EngineError
from tests.integration.scripted_manager import ScriptedManager, tokens

SAMPLING = m.SamplingParams(max_tokens=9)
SOURCE = m.Directory(path="/a")
REFUSAL = m.Failed(request_id="", code="weights_rejected", message="rank 9 is too much")
OF_ADAPTER = m.SharedMemory(block="/b", tensors=[], adapter_config={})
BROADCAST = m.Broadcast(init_method="tcp://x:1", world_size=3, rank=1, backend="gloo", tensors=[])

Scene = Callable[[Replicas, list[ScriptedManager]], Awaitable[None]]


def play(directory: Path, scene: Scene, replicas: int = 2) -> None:
    """With managers that answer every request with one token and its end."""
    directories = [directory / str(number) for number in range(replicas)]
    for each in directories:
        each.mkdir()
    managers = [ScriptedManager(each) for each in directories]
    for manager in managers:
        manager.script = lambda submit: [tokens(submit, [7], "stop", index=index) for index in range(submit.n)]

    async def run() -> None:
        engine = Replicas([EngineClient(each) for each in directories], 4096)
        engine.start()
        try:
            await engine.stats()
            async with asyncio.timeout(60):
                await scene(engine, managers)
        finally:
            engine.close()

    try:
        asyncio.run(run())
    finally:
        for manager in managers:
            manager.stop()


async def noticed(engine: Replicas, number: int) -> None:
    while engine._clients[number].down is None:
        await asyncio.sleep(0.01)


async def code_of(work: Awaitable[object]) -> str:
    with pytest.raises(EngineError) as caught:
        await work
    return caught.value.code


def test_a_new_adapter_that_one_replica_refuses_is_in_none(tmp_path: Path) -> None:
    async def scene(engine: Replicas, managers: list[ScriptedManager]) -> None:
        managers[1].refuses[m.UpdateWeights] = REFUSAL
        assert await code_of(engine.update_weights(SOURCE, 1, adapter="x")) == "weights_rejected"
        assert not engine.adapters
        assert [type(change) for change in managers[0].changes] == [m.UpdateWeights, m.UnloadAdapter]

    play(tmp_path, scene)


@pytest.mark.parametrize("adapter", ["", "x"])
def test_replicas_that_took_an_update_beside_others_that_did_not_are_named(tmp_path: Path, adapter: str) -> None:
    async def scene(engine: Replicas, managers: list[ScriptedManager]) -> None:
        await engine.update_weights(SOURCE, 1, adapter=adapter)
        managers[0].refuses[m.UpdateWeights] = REFUSAL
        with pytest.raises(EngineError, match=r"live in replicas \[1\], and was refused by \[0\]: rank 9") as caught:
            await engine.update_weights(SOURCE, 2, adapter=adapter)
        assert caught.value.code == "replicas_disagree"
        managers[1].refuses[m.UpdateWeights] = REFUSAL
        assert await code_of(engine.update_weights(SOURCE, 2, adapter=adapter)) == "weights_rejected"

    play(tmp_path, scene)


def test_the_others_serve_on_when_a_manager_goes(tmp_path: Path) -> None:
    async def scene(engine: Replicas, managers: list[ScriptedManager]) -> None:
        for manager in managers:
            manager.script = lambda submit: []
        waiting = [engine.submit([number] * 300, SAMPLING) for number in range(2)]
        managers[0].stop()
        await noticed(engine, 0)
        lost = next(generation for generation in waiting if generation.streams[0].finished)
        assert await code_of(lost.read()) == "engine_unavailable"
        assert list(await engine.health()) == [0]
        for number in range(6):
            engine.submit([number] * 300, SAMPLING).close()
        await engine.score([1, 2, 3])
        assert (await engine.stats())["replica_1.version"] == 3.0
        await engine.update_weights(SOURCE, 4)
        assert await code_of(engine.update_weights(BROADCAST, 5)) == "weights_rejected"
        await engine.pause("keep")
        assert len(managers[1].submitted) == 7
        managers[1].stop()
        await noticed(engine, 1)
        with pytest.raises(EngineError, match="replica 1") as caught:
            await engine.health()
        assert caught.value.code == "engine_unavailable"
        with pytest.raises(EngineError):
            engine.submit([1], SAMPLING)

    play(tmp_path, scene)


def test_a_replica_that_lost_its_weights_is_avoided_until_it_has_new_ones(tmp_path: Path) -> None:
    async def scene(engine: Replicas, managers: list[ScriptedManager]) -> None:
        served = managers[0].script
        managers[0].script = lambda submit: [
            m.Failed(request_id=submit.request_id, code="weights_lost", message="publish")
        ]
        managers[0].stats = {"version": 3.0, "worker_up": 1.0, "weights_lost": 1.0}
        assert list(await engine.health()) == [0]
        assert await code_of(engine.submit([1] * 300, SAMPLING).read()) == "weights_lost"
        for _ in range(4):
            await engine.submit([1] * 300, SAMPLING).read()
        managers[0].script = served
        await engine.update_weights(SOURCE, 4)
        for _ in range(4):
            await engine.submit([1] * 300, SAMPLING).read()
        assert len(managers[0].submitted) == 5
        for manager in managers:
            manager.stats = {"version": 3.0, "worker_up": 0.0}
        assert await code_of(engine.health()) == "engine_unavailable"

    play(tmp_path, scene)


def test_a_replica_that_lost_an_adapter_is_avoided_for_that_alone(tmp_path: Path) -> None:
    async def scene(engine: Replicas, managers: list[ScriptedManager]) -> None:
        for name in ("", "x", "y"):
            await engine.update_weights(OF_ADAPTER, 1, adapter=name)
        served = managers[0].script
        managers[0].script = lambda submit: (
            [m.Failed(request_id=submit.request_id, code="weights_lost", message="publish")]
            if submit.adapter == "x"
            else served(submit)
        )

        async def answers(adapter: str) -> int:
            """How many of four long prompts of the replica that lost it are served there."""
            before = len(managers[0].submitted)
            for _ in range(4):
                await engine.submit([1] * 300, SAMPLING, adapter=adapter).read()
            return len(managers[0].submitted) - before

        assert [await answers(name) for name in ("", "y")] == [4, 0]
        assert await code_of(engine.submit([1] * 300, SAMPLING, adapter="x").read()) == "weights_lost"
        assert [await answers(name) for name in ("", "x")] == [4, 0]
        await engine.update_weights(OF_ADAPTER, 2)
        await engine.update_weights(OF_ADAPTER, 2, adapter="y")
        assert await answers("x") == 0, "other weights do not bring it back"
        managers[0].script = served
        await engine.update_weights(OF_ADAPTER, 2, adapter="x")
        assert await answers("x") == 4

    play(tmp_path, scene)


def test_an_admin_call_that_is_cut_off_is_seen_through(tmp_path: Path) -> None:
    async def scene(engine: Replicas, managers: list[ScriptedManager]) -> None:
        update = asyncio.ensure_future(engine.update_weights(SOURCE, 3, adapter="x"))
        await asyncio.sleep(0)
        update.cancel()
        await asyncio.wait([update])
        while "x" not in engine.adapters:
            await asyncio.sleep(0.01)
        assert engine.adapters == {"x": 3}
        unload = asyncio.ensure_future(engine.unload_adapter("x"))
        await asyncio.sleep(0)
        unload.cancel()
        await asyncio.wait([unload])
        while engine.adapters:
            await asyncio.sleep(0.01)
        assert [type(change) for change in managers[0].changes] == [m.UpdateWeights, m.UnloadAdapter]

    play(tmp_path, scene)


def test_an_adapter_that_could_not_be_unloaded_can_be_unloaded_again(tmp_path: Path) -> None:
    async def scene(engine: Replicas, managers: list[ScriptedManager]) -> None:
        await engine.update_weights(SOURCE, 3, adapter="x")
        managers[1].refuses[m.UnloadAdapter] = m.Failed(request_id="", code="worker_failed", message="died")
        assert await code_of(engine.unload_adapter("x")) == "worker_failed"
        assert engine.adapters == {"x": 3}
        managers[0].refuses[m.UnloadAdapter] = m.Failed(request_id="", code="model_not_found", message="no adapter")
        del managers[1].refuses[m.UnloadAdapter]
        await engine.unload_adapter("x")
        assert not engine.adapters
        assert await code_of(engine.unload_adapter("x")) == "model_not_found"

    play(tmp_path, scene)


def test_a_choice_that_nobody_reads_is_cancelled_alone(tmp_path: Path) -> None:
    async def scene(engine: Replicas, managers: list[ScriptedManager]) -> None:
        heard: list[m.ToManager] = []
        answers = managers[0]._answers
        managers[0]._answers = lambda message: [heard.append(message), *answers(message)][1:]  # type: ignore[method-assign,func-returns-value,list-item]
        managers[0].script = lambda submit: [tokens(submit, [7], index=index) for index in range(submit.n)]
        generation = engine.submit([1, 2], SAMPLING, n=3, grammar="start: /a/", flow="episode")
        for stream in generation.streams:
            await stream.read()
        generation.streams[1].close()
        generation.streams[0].close()
        generation.streams[2].close()
        await engine.stats()
        key = generation.request_id
        assert [x for x in heard if isinstance(x, m.Cancel)] == [
            m.Cancel(request_id=key, index=1),
            m.Cancel(request_id=key, index=0),
            m.Cancel(request_id=key),
        ]
        (submitted,) = managers[0].submitted
        assert (submitted.grammar, submitted.flow) == ("start: /a/", "episode")

    play(tmp_path, scene, replicas=1)

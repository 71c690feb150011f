"""64 agents at once, in tasks, threads and processes, against a real web process: nothing of one gets into another's episode."""

import asyncio
import json
import os
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs
from openai import ConflictError, OpenAI

import lightning_rl as lrl
from lightning_rl.episode import Episode, EpisodeStart, Outcome, Task
from lightning_rl.errors import EpisodeEnded
from lightning_rl.store import Store
from tests.integration.many_agents import STALE, STEPS, Clients, agent, asked, in_processes, in_tasks, in_threads
from tests.integration.served_web import Served, served

EPISODES = 64


@pytest.fixture(scope="module")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Path]]:
    path = tmp_path_factory.mktemp("many") / "episodes.db"
    with Store.open(path) as store:
        store.begin(EpisodeStart(id=STALE, task=Task(id="t", input={}), phase="before", started_at=time.time()))
    with served(tiny_llama, store=str(path)) as web:
        yield web, path


@pytest.mark.parametrize("way", [in_tasks, in_threads, in_processes])
def test_nothing_of_one_episode_is_found_in_another(
    server: tuple[Served, Path], way: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    web, path = server
    monkeypatch.setenv("LRL_STORE", str(path))
    monkeypatch.setenv("LRL_SERVER", web.url)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    first = 1000 * [in_tasks, in_threads, in_processes].index(way)
    marks = [f"m{first + number}" for number in range(EPISODES)]
    assert way(marks, Clients(web.url)) == marks
    assert "OPENAI_BASE_URL" not in os.environ
    with Store.open(path) as store:
        assert store.call_count(STALE) == 0
        found = {str(episode.answer): episode for episode in store.episodes(phase="standalone")}
    for mark in marks:
        check(found[mark], mark)


def check(episode: Episode, mark: str) -> None:
    assert episode.outcome is Outcome.COMPLETED
    assert episode.start.task.input["args"][0] == mark
    names = {span.id: span.name for span in episode.spans}
    steps = [f"{mark}-step{at}" for at in range(STEPS)]
    assert Counter(name for name in names.values() if name.startswith(mark)) == Counter([*steps, f"{mark}-plain"])
    (root,) = [span.id for span in episode.spans if span.parent_id is None]
    assert {span.parent_id for span in episode.spans} == {None, root}
    said = Counter(call.request["messages"][-1]["content"] for call in episode.calls)
    assert said == Counter({f"{mark} {step}": 2 for step in steps} | {f"{mark} {mark}-plain": 1})
    for call in episode.calls:
        assert call.request["messages"][-1]["content"] == f"{mark} {names[str(call.span_id)]}"
    given = {reward.name: (reward.value, names.get(reward.span_id or "")) for reward in episode.rewards}
    value = float(mark[1:])
    assert given == {step: (value, step) for step in steps} | {"whole": (value, None)}


def test_one_that_crashes_takes_nothing_with_it(server: tuple[Served, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    web, path = server
    monkeypatch.setenv("LRL_STORE", str(path))
    monkeypatch.setenv("LRL_SERVER", web.url)
    clients = Clients(web.url)
    barrier = threading.Barrier(9)

    @lrl.rollout
    def crashing(mark: str) -> None:
        with lrl.span(mark):
            clients.stale.chat.completions.create(**asked(mark, mark))
            barrier.wait(30)
            raise MemoryError(mark)

    @lrl.rollout
    def sound(mark: str) -> str:
        barrier.wait(30)
        return agent(mark, clients)

    with ThreadPoolExecutor(9) as pool:
        marks = [f"m{9000 + number}" for number in range(8)]
        failed = pool.submit(crashing, "m8999")
        assert list(pool.map(sound, marks)) == marks
        assert isinstance(failed.exception(), MemoryError)
    with Store.open(path) as store:
        episodes = {episode.start.task.input["args"][0]: episode for episode in store.episodes(phase="standalone")}
    assert episodes["m8999"].outcome is Outcome.AGENT_ERROR
    assert [call.request["messages"][-1]["content"] for call in episodes["m8999"].calls] == ["m8999 m8999"]
    assert {episodes[mark].outcome for mark in marks} == {Outcome.COMPLETED}
    assert {len(episodes[mark].calls) for mark in marks} == {2 * STEPS + 1}


def test_an_episode_that_has_ended_takes_no_calls(server: tuple[Served, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither through a client that outlives it, nor when it ends while one is answered; what it knows is not asked anew."""
    web, path = server
    monkeypatch.setenv("LRL_STORE", str(path))
    monkeypatch.setenv("LRL_SERVER", web.url)
    kept: list[OpenAI] = []

    @lrl.rollout
    def keeping(mark: str) -> str:
        kept.append(OpenAI(base_url=lrl.base_url(), api_key="k", max_retries=2))
        kept[0].chat.completions.create(**asked(mark, "inside"))
        return mark

    keeping("kept")
    submitted = len(web.manager.submitted)
    with pytest.raises(ConflictError, match="has ended"):
        kept[0].chat.completions.create(**asked("kept", "outside"))
    assert len(web.manager.submitted) - submitted <= 1  # not tried again
    with pytest.raises(ConflictError, match="has ended"):
        kept[0].chat.completions.create(**asked("kept", "outside"))
    assert len(web.manager.submitted) - submitted <= 1  # the server knows by now
    with Store.open(path) as store:
        (episode,) = [each for each in store.episodes(phase="standalone") if each.answer == "kept"]
        assert [call.request["messages"][-1]["content"] for call in episode.calls] == ["kept inside"]
        store.add_call(episode.calls[0])
        late = structs.replace(episode.calls[0], id="late", index=9)
        with pytest.raises(EpisodeEnded):
            store.add_call(late)
        store.add_call(structs.replace(late, finish_reason="abort"))


def test_urllib_in_tasks_side_by_side_is_recorded(server: tuple[Served, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    web, path = server
    monkeypatch.setenv("LRL_STORE", str(path))
    monkeypatch.setenv("LRL_SERVER", web.url)

    def post(mark: str) -> None:
        url = f"{os.environ['OPENAI_BASE_URL']}/chat/completions"
        body = json.dumps(asked(mark, "plain")).encode()
        headers = {"content-type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(url, data=body, headers=headers)).close()

    @lrl.rollout
    async def plain(mark: str) -> str:
        await asyncio.sleep(0.01)
        await asyncio.to_thread(post, mark)
        return mark

    async def main() -> None:
        await asyncio.gather(*(plain(f"plain{number}") for number in range(3)))

    asyncio.run(main())
    with Store.open(path) as store:
        found = {episode.answer: episode for episode in store.episodes(phase="standalone")}
    for mark in ("plain0", "plain1", "plain2"):
        (root,) = found[mark].spans
        assert [(call.request["messages"][-1]["content"], call.span_id) for call in found[mark].calls] == [
            (f"{mark} plain", root.id)
        ]

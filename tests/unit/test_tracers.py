"""Spans, rewards and `@rollout`, with and without a rollout around them."""

import asyncio
import contextlib
import gc
import http.server
import io
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import urllib.request
import weakref
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest
import requests
import urllib3
from hypothesis import given
from hypothesis import strategies as st

from lightning_rl.episode import Outcome, Reward, Span
from lightning_rl.errors import LightningError
from lightning_rl.join import AGENT_HEADER, EPISODE_HEADER, SPAN_HEADER
from lightning_rl.store import Store
from tracers.context import NEVER_ENDED, Event, Rollout, current_rollout, open_span, place_sources, running
from tracers.frameworks.runs import FrameworkSpans
from tracers.install import HOOKS, install
from tracers.plain import as_json
from tracers.requests import base_url, join_headers
from tracers.rewards import reward
from tracers.rollout import is_rollout, rollout
from tracers.spans import span


def record(events: list[Event]) -> Any:
    return running(Rollout("e", events.append))


def spans_of(events: list[Event]) -> dict[str, Span]:
    return {event.name: event for event in events if isinstance(event, Span)}


# spans and rewards ----------------------------------------------------------------------------------------------------


def test_spans_nest_and_rewards_land_in_the_innermost() -> None:
    events: list[Event] = []
    with record(events), span("agent", kind="agent"):
        reward(1, "whole")
        with span("chain"), span("tool", kind="tool", query="q"):
            reward(0.5)
    spans = spans_of(events)
    assert spans["agent"].parent_id is None
    assert spans["chain"].parent_id == spans["agent"].id
    assert spans["tool"].parent_id == spans["chain"].id
    assert spans["tool"].attributes == {"query": "q"}
    assert spans["agent"].started_at <= spans["tool"].started_at <= spans["tool"].ended_at <= spans["agent"].ended_at
    rewards = [event for event in events if isinstance(event, Reward)]
    assert [(given.name, given.value, given.span_id) for given in rewards] == [
        ("whole", 1.0, None),
        ("reward", 0.5, spans["tool"].id),
    ]
    assert all(given.time > 0 for given in rewards)


def test_a_reward_can_name_its_span() -> None:
    events: list[Event] = []
    with record(events), span("agent", kind="agent"):
        with span("tool") as tool:
            pass
        reward(1, span=tool)
    given = next(event for event in events if isinstance(event, Reward))
    assert given.span_id == spans_of(events)["tool"].id


def test_a_failing_span_keeps_the_traceback_and_lets_it_pass() -> None:
    events: list[Event] = []
    with record(events), pytest.raises(KeyError), span("agent", kind="agent"), span("tool"):
        raise KeyError("lost")
    assert "KeyError: 'lost'" in str(spans_of(events)["tool"].error)
    assert "KeyError" in str(spans_of(events)["agent"].error)


def test_threads_of_the_agent_report_too() -> None:
    events: list[Event] = []
    with record(events):
        thread = threading.Thread(target=lambda: reward(1, "from a thread"))
        thread.start()
        thread.join()
    assert [event.name for event in events] == ["from a thread"]


def test_concurrent_tasks_keep_their_own_nesting() -> None:
    events: list[Event] = []

    async def branch(name: str) -> None:
        with span(name):
            await asyncio.sleep(0.01)
            with span(f"{name}-inner"):
                await asyncio.sleep(0.01)

    async def both() -> None:
        await asyncio.gather(branch("a"), branch("b"))

    with record(events):
        asyncio.run(both())
    spans = spans_of(events)
    assert spans["a-inner"].parent_id == spans["a"].id
    assert spans["b-inner"].parent_id == spans["b"].id


def test_outside_of_a_rollout_nothing_happens() -> None:
    with span("tool", kind="tool"):
        reward(1)
    assert current_rollout() is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", None, 1j, 10**400, [1.0]])
def test_a_reward_is_a_finite_number_even_outside(value: Any) -> None:
    with pytest.raises(ValueError, match="finite number"):
        reward(value)


def test_names_and_kinds_are_checked() -> None:
    with pytest.raises(ValueError, match="name"):
        reward(1, "")
    with pytest.raises(ValueError, match="name"), span(""):
        pass
    with pytest.raises(ValueError, match="agent, chain, tool"), span("x", kind="llm"):
        pass


def test_spans_that_nobody_ends_are_recorded_when_the_rollout_ends() -> None:
    events: list[Event] = []
    left = span("left")
    with record(events), span("agent", kind="agent"):
        left.__enter__()
        with span("inner"):
            pass
    left.__exit__(None, None, None)
    spans = spans_of(events)
    assert len([event for event in events if event.name == "left"]) == 1  # type: ignore[union-attr]
    assert (spans["left"].error, spans["inner"].error) == (NEVER_ENDED, None)
    assert spans["inner"].parent_id == spans["left"].id
    assert spans["left"].ended_at >= spans["left"].started_at > 0


@given(order=st.permutations(range(4)))
def test_spans_may_end_in_any_order(order: list[int]) -> None:
    events: list[Event] = []
    with record(events):
        opened = [span(str(at)) for at in range(4)]
        ids = [one.__enter__().id for one in opened]
        left = set(range(4))
        for at in order:
            opened[at].__exit__(None, None, None)
            left.remove(at)
            place = open_span.get()
            assert (place.id if place else None) == (ids[max(left)] if left else None)
    assert {span.error for span in spans_of(events).values()} == {None}
    assert [spans_of(events)[str(at)].parent_id for at in range(4)] == [None, *ids[:3]]


hostile = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())
    | st.binary()
    | st.builds(object),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text() | st.integers() | st.none(), inner),
)


@given(value=hostile)
def test_any_attribute_becomes_json_that_everything_can_hold(value: Any) -> None:
    plain = as_json(value)
    assert json.loads(json.dumps(plain, allow_nan=False, ensure_ascii=False).encode()) == plain
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(plain)) == plain
    assert as_json(plain) == plain


def test_what_json_cannot_hold_never_costs_the_span() -> None:
    class Evil:
        def __repr__(self) -> str:
            raise RuntimeError

    endless: list[Any] = []
    endless.append(endless)
    events: list[Event] = []
    with record(events), span("tool", kind="tool", evil=Evil(), endless=endless, text="\ud800", fine={"a": (1, 2)}):
        pass
    attributes = spans_of(events)["tool"].attributes
    assert attributes["evil"] == "<Evil whose repr raises RuntimeError>"
    assert attributes["text"] == "\\ud800"
    assert attributes["fine"] == {"a": [1, 2]}
    json.dumps(attributes, allow_nan=False)


def test_pools_work_for_whoever_gave_the_work() -> None:
    install()
    heard: dict[str, list[Event]] = {"a": [], "b": []}

    def agent(name: str, pool: ThreadPoolExecutor) -> None:
        with running(Rollout(name, heard[name].append)), span(name):
            list(pool.map(lambda at: reward(at, f"{name}{at}"), range(20)))

    with ThreadPoolExecutor(3) as shared, ThreadPoolExecutor(2) as agents:
        list(agents.map(lambda name: agent(name, shared), heard))
        assert shared.submit(current_rollout).result() is None
    for name, events in heard.items():
        rewards = [event for event in events if isinstance(event, Reward)]
        assert sorted(given.name for given in rewards) == sorted(f"{name}{at}" for at in range(20))
        assert {given.episode_id for given in rewards} == {name}


def in_a_thread(function: Callable[[], Any]) -> Any:
    """What it returns or raises in a bare thread."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(function())
        except LightningError as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return results[0]


def test_a_bare_thread_belongs_to_a_rollout_only_where_no_other_can_be_meant() -> None:
    go_on = threading.Event()
    left: list[Any] = []
    with running(Rollout("first", print)) as _:
        assert in_a_thread(current_rollout).episode_id == "first"
        leftover = threading.Thread(target=lambda: (go_on.wait(), left.append(current_rollout())))
        leftover.start()
        beside = in_a_thread(lambda: beside_another(current_rollout))
        assert isinstance(beside, LightningError)
        assert isinstance(in_a_thread(current_rollout), LightningError)  # it might be a leftover of the one beside
    with running(Rollout("second", print)):
        go_on.set()
        leftover.join()
    assert left == [None]


def beside_another(function: Callable[[], Any]) -> Any:
    with running(Rollout("beside", print)):
        result = in_a_thread(function)
        if isinstance(result, LightningError):
            raise result
        return result


def test_what_outlives_its_rollout_is_told_and_belongs_to_no_other() -> None:
    async def main() -> None:
        events: list[Event] = []
        go_on = asyncio.Event()

        async def late() -> Rollout | None:
            await go_on.wait()
            with span("late"):
                pass
            with pytest.raises(LightningError, match="after the end of its rollout"):
                reward(1)
            return current_rollout()

        with record(events):
            task = asyncio.create_task(late())
            await asyncio.sleep(0)
        with running(Rollout("next", events.append)):
            go_on.set()
            assert await task is None
        assert events == []

    asyncio.run(main())


# requests -------------------------------------------------------------------------------------------------------------

SERVER = "http://127.0.0.1:8123"


@pytest.mark.parametrize(
    ("url", "ours"),
    [
        (f"{SERVER}/v1/chat/completions", True),
        ("http://127.0.0.1:8123", True),
        ("HTTP://127.0.0.1:8123/e/stale/v1", True),
        ("https://127.0.0.1:8123/v1", False),
        ("http://127.0.0.1:81234/v1", False),
        ("http://127.0.0.1/v1", False),
        ("http://127.0.0.1.example.org:8123/v1", False),
        ("http://user@example.org/127.0.0.1:8123", False),
        ("http://[", False),
    ],
)
def test_only_requests_to_the_server_are_marked(url: str, ours: bool) -> None:
    assert join_headers(url) == {}
    with running(Rollout("e", print, SERVER)), span("planner\n ü", kind="agent") as agent:
        marked = {EPISODE_HEADER: "e", SPAN_HEADER: agent.id, AGENT_HEADER: "planner%0A%20%C3%BC"}
        assert join_headers(url) == (marked if ours else {})


def test_default_ports_are_the_same_as_none() -> None:
    with running(Rollout("e", print, "https://Example.org")):
        assert join_headers("https://example.org:443/v1")
        assert not join_headers("http://example.org/v1")


def test_a_request_that_may_be_anybodys_goes_out_as_it_is_and_says_so_once() -> None:
    with running(Rollout("e", print, SERVER)):
        assert in_a_thread(lambda: join_headers(SERVER)) == {EPISODE_HEADER: "e"}
        with pytest.warns(RuntimeWarning, match="belongs to no running rollout"):
            assert in_a_thread(lambda: beside_another(lambda: join_headers(SERVER))) == {}


def test_plain_http_clients_are_marked_and_a_mark_of_the_agents_own_stays() -> None:
    install()
    seen: list[httpx.Request] = []
    transport = httpx.MockTransport(lambda request: (seen.append(request), httpx.Response(200))[1])
    with httpx.Client(transport=transport) as client, running(Rollout("e", print, SERVER)):
        client.get(f"{SERVER}/v1/models")
        client.get(f"{SERVER}/v1/models", headers={EPISODE_HEADER: "mine"})
        client.get("http://example.org/v1/models")
    assert [request.headers.get(EPISODE_HEADER) for request in seen] == ["e", "mine", None]


def test_the_base_url_is_the_current_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert base_url() == "https://api.openai.com/v1"
    monkeypatch.setenv("OPENAI_BASE_URL", "http://mine/v1")
    assert base_url() == "http://mine/v1"
    with running(Rollout("e", print, f"{SERVER}/")):
        assert base_url() == f"{SERVER}/e/e/v1"


def test_a_hook_that_does_not_fit_warns_and_lets_the_import_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HOOKS, "this", "tracers.requests:no_such_hook")
    install()
    with contextlib.redirect_stdout(io.StringIO()), pytest.warns(RuntimeWarning, match="cannot follow this"):
        import this  # noqa: F401


# @rollout -------------------------------------------------------------------------------------------------------------


@rollout
def double(number: int) -> int:
    """Twice."""
    reward(number, "number")
    return 2 * number


@rollout(name="named")
async def double_async(number: int) -> int:
    await asyncio.sleep(0)
    return 2 * number


@pytest.fixture
def standalone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LRL_STORE", str(tmp_path / "episodes.db"))
    monkeypatch.setenv("LRL_SERVER", "http://127.0.0.1:9/")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "mine")
    return tmp_path / "episodes.db"


def test_without_us_the_function_is_just_called() -> None:
    assert double(4) == 8
    assert asyncio.run(double_async(4)) == 8
    assert double.__doc__ == "Twice."
    assert is_rollout(double)
    assert not is_rollout(len)


def test_under_a_runner_it_is_the_root_span() -> None:
    events: list[Event] = []
    with record(events):
        assert double(1) == 2
        assert asyncio.run(double_async(1)) == 2
    spans = spans_of(events)
    assert {(name, spans[name].kind, spans[name].parent_id) for name in spans} == {
        ("double", "agent", None),
        ("named", "agent", None),
    }
    assert next(event for event in events if isinstance(event, Reward)).span_id is None


def test_standalone_opens_an_episode_and_restores_the_environment(standalone: Path) -> None:
    seen = {}

    @rollout
    def agent(question: str) -> str:
        seen.update(base=os.environ["OPENAI_BASE_URL"], key=os.environ["OPENAI_API_KEY"])
        reward(0.5)
        return double_nested(question)

    @rollout
    def double_nested(question: str) -> str:
        return question * 2

    assert agent("ab") == "abab"
    assert "OPENAI_BASE_URL" not in os.environ
    with Store.open(standalone) as store:
        (episode,) = store.episodes()
    assert seen == {"base": "http://127.0.0.1:9/v1", "key": "mine"}  # clients outlive rollouts
    assert (episode.outcome, episode.answer, episode.counted) == (Outcome.COMPLETED, "abab", True)
    assert {span.name: span.kind for span in episode.spans} == {"agent": "agent", "double_nested": "agent"}
    assert [given.value for given in episode.rewards] == [0.5]


def test_standalone_records_a_failure(standalone: Path) -> None:
    @rollout
    def agent() -> None:
        raise ZeroDivisionError("oops")

    with pytest.raises(ZeroDivisionError):
        agent()
    with Store.open(standalone) as store:
        (episode,) = store.episodes()
    assert episode.outcome is Outcome.AGENT_ERROR
    assert "ZeroDivisionError: oops" in str(episode.error)
    assert not episode.counted


def test_half_an_address_is_refused(standalone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LRL_SERVER")
    with pytest.raises(LightningError, match="only one of"):
        double(1)


async def test_episodes_at_once_are_kept_apart_and_share_the_environment(standalone: Path) -> None:
    both_there = asyncio.Barrier(2)
    addresses: list[str] = []

    @rollout
    async def agent(number: int) -> int:
        await both_there.wait()
        addresses.append(os.environ["OPENAI_BASE_URL"])
        with span(f"step{number}"):
            await asyncio.to_thread(reward, number)
        await both_there.wait()
        return number

    @rollout
    async def failing(number: int) -> int:
        await both_there.wait()
        await both_there.wait()
        raise ValueError(number)

    assert await asyncio.gather(agent(1), agent(2)) == [1, 2]
    await asyncio.gather(agent(3), failing(4), return_exceptions=True)
    assert set(addresses) == {"http://127.0.0.1:9/v1"}
    assert "OPENAI_BASE_URL" not in os.environ
    with Store.open(standalone) as store:
        episodes = store.episodes()
    assert {episode.answer: episode.outcome for episode in episodes} == {
        1: Outcome.COMPLETED,
        2: Outcome.COMPLETED,
        3: Outcome.COMPLETED,
        None: Outcome.AGENT_ERROR,
    }
    for episode in episodes:
        number = episode.start.task.input["args"][0]
        spans = [span.name for span in episode.spans]
        assert spans == (["agent", f"step{number}"] if number != 4 else ["failing"])
        assert [given.value for given in episode.rewards] == ([number] if number != 4 else [])


def test_a_pool_of_rollouts_opens_one_episode_each(standalone: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(double, range(16))) == [2 * number for number in range(16)]
    with Store.open(standalone) as store:
        assert sorted(given.value for episode in store.episodes() for given in episode.rewards) == list(range(16))
        assert len(store.episodes()) == 16


async def test_a_cancelled_rollout_is_recorded_as_that(standalone: Path) -> None:
    @rollout
    async def agent() -> None:
        await asyncio.sleep(60)

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(agent(), 0.2)
    with Store.open(standalone) as store:
        (episode,) = store.episodes()
    assert episode.outcome is Outcome.CANCELLED
    assert not episode.counted


@rollout
def counting(to: int) -> Generator[int, int | None, str | None]:
    for number in range(to):
        with span(f"item{number}"):
            reward(number)
            asked = yield number
            assert asked is None or asked == number
    return None


@rollout
async def counting_async(to: int) -> AsyncGenerator[int, None]:
    for number in range(to):
        with span(f"item{number}"):
            await asyncio.sleep(0)
            reward(number)
            yield number


def test_a_generator_is_one_rollout_and_leaks_nothing_between_its_items(standalone: Path) -> None:
    one, other = counting(2), counting(3)
    assert [next(one), next(other), other.send(0), one.send(0), next(other)] == [0, 0, 1, 1, 2]
    assert current_rollout() is None
    assert open_span.get() is None
    assert [list(one), list(other)] == [[], []]
    stopped = counting(5)
    next(stopped)
    stopped.close()
    with Store.open(standalone) as store:
        episodes = {str(episode.answer): episode for episode in store.episodes()}
    assert {answer: episode.outcome for answer, episode in episodes.items()} == {
        "[0, 1]": Outcome.COMPLETED,
        "[0, 1, 2]": Outcome.COMPLETED,
        "[0]": Outcome.CANCELLED,
    }
    assert episodes["[0]"].error is None
    assert [span.error for span in episodes["[0]"].spans] == [None, None]
    whole = episodes["[0, 1, 2]"]
    assert [span.name for span in whole.spans] == ["counting", "item0", "item1", "item2"]
    assert {span.parent_id for span in whole.spans[1:]} == {whole.spans[0].id}
    assert [given.value for given in whole.rewards] == [0, 1, 2]


async def test_an_async_generator_too(standalone: Path) -> None:
    async def all_of(number: int) -> list[int]:
        return [item async for item in counting_async(number)]

    assert await asyncio.gather(all_of(2), all_of(3)) == [[0, 1], [0, 1, 2]]
    async with contextlib.aclosing(counting_async(9)) as stopped:
        assert await anext(stopped) == 0
        assert current_rollout() is None
        with pytest.raises(KeyError):
            await stopped.athrow(KeyError("no"))
    with Store.open(standalone) as store:
        episodes = {str(episode.answer): episode for episode in store.episodes()}
    assert {answer: (episode.outcome, len(episode.spans)) for answer, episode in episodes.items()} == {
        "[0, 1]": (Outcome.COMPLETED, 3),
        "[0, 1, 2]": (Outcome.COMPLETED, 4),
        "[0]": (Outcome.AGENT_ERROR, 2),
    }


def test_a_result_that_has_not_run_yet_is_refused(standalone: Path) -> None:
    @rollout
    def agent() -> Any:
        return double_async(1)

    with pytest.raises(LightningError, match="has not run yet"):
        agent()


def test_a_store_that_was_deleted_is_made_anew(standalone: Path) -> None:
    double(1)
    for file in standalone.parent.iterdir():
        file.unlink()
    double(2)
    with Store.open(standalone) as store:
        assert [episode.answer for episode in store.episodes()] == [4]


def test_a_forked_child_records_too(standalone: Path) -> None:
    double(1)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(double, [2, 3]) == [4, 6]
    with Store.open(standalone) as store:
        assert sorted(episode.answer for episode in store.episodes()) == [2, 4, 6]


def test_known_keys_and_self_are_no_part_of_the_task(standalone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "sk-0123456789abcdef"
    monkeypatch.setenv("OPENAI_API_KEY", key)

    class Agent:
        @rollout
        def solve(self, question: str, api_key: str) -> None:
            reward(1)

    Agent().solve("q", api_key=key)
    with Store.open(standalone) as store:
        (episode,) = store.episodes()
    assert episode.start.task.input == {"args": ["q"], "kwargs": {"api_key": "[redacted]"}}


def test_a_rollout_of_which_nothing_is_recorded_says_so(standalone: Path) -> None:
    @rollout
    def agent() -> None: ...

    with pytest.warns(RuntimeWarning, match="lrl.base_url"):
        agent()


def test_a_request_of_a_rollout_to_the_provider_itself_is_told(standalone: Path) -> None:
    install()
    transport = httpx.MockTransport(lambda request: httpx.Response(400, json={}))
    client = openai.OpenAI(
        api_key="k", base_url="https://api.openai.com/v1", http_client=httpx.Client(transport=transport)
    )

    @rollout
    def agent() -> None:
        reward(1)
        with contextlib.suppress(openai.BadRequestError):
            client.models.list()

    with pytest.warns(RuntimeWarning, match="api.openai.com .* OPENAI_BASE_URL"):
        agent()


def test_what_urllib_and_urllib3_send_is_marked_once() -> None:
    install()
    seen: list[list[str]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers.get_all(EPISODE_HEADER) or [])
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    with running(Rollout("e", print, url)):
        urllib.request.urlopen(url).close()
        urllib3.PoolManager().request("GET", url)
        requests.get(url, timeout=60)
        requests.get(url, headers={EPISODE_HEADER: "mine"}, timeout=60)
    with running(Rollout("e", print, SERVER)):
        urllib.request.urlopen(url).close()
    server.shutdown()
    server.server_close()
    assert seen == [["e"], ["e"], ["e"], ["mine"], []]


CHILD = """if True:
    import multiprocessing, sys, warnings
    import lightning_rl as lrl

    def emit(number):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with lrl.span("work"):
                try:
                    lrl.reward(number)
                except lrl.LightningError as error:
                    return str(error), [str(each.message) for each in said]

    @lrl.rollout
    def agent(method):
        lrl.reward(1)
        with multiprocessing.get_context(method).Pool(1) as pool:
            return pool.map(emit, [2])

    if __name__ == "__main__":
        for method in ("fork", "spawn"):
            ((error, said),) = agent(method)
            assert "cannot reach its rollout" in error, error
            assert len(said) == 1 and "'work' is not recorded" in said[0], said
"""


def test_what_a_child_process_emits_is_refused_and_not_lost(standalone: Path, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(CHILD)
    subprocess.run([sys.executable, tmp_path / "program.py"], check=True, timeout=60)
    with Store.open(standalone) as store:
        assert [[given.value for given in episode.rewards] for episode in store.episodes()] == [[1], [1]]


def test_what_runs_when_the_interpreter_ends_is_cancelled(standalone: Path) -> None:
    code = """if True:
        import lightning_rl as lrl
        @lrl.rollout
        def agent():
            lrl.reward(1)
            yield 1
            yield 2
        left = agent()
        next(left)"""
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    assert done.stderr == ""
    with Store.open(standalone) as store:
        (episode,) = store.episodes()
    assert (episode.outcome, episode.answer, len(episode.rewards)) == (Outcome.CANCELLED, [1], 1)


def test_runs_of_a_rollout_that_is_over_are_forgotten() -> None:
    spans = FrameworkSpans(lambda: None)
    place_sources.remove(spans.here)
    with record([]):
        spans.begin("a", None, "tool", "tool", attributes={"large": Large()})
        large = weakref.ref(spans._runs["a"].span.attributes["large"])  # type: ignore[union-attr]
        spans.end("a")
        gc.collect()
        assert large() is None
    assert (spans._runs, spans._of) == ({}, {})


class Large: ...

"""The runner pool with real processes: agents that fail in every way, and what becomes of their episodes."""

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lightning_rl.episode import EpisodeStart, Outcome, Sampling, Span, Task
from lightning_rl.recipe.functions import resolve_reference
from lightning_rl.store import Store
from trainers.runner.pool import EpisodeResult, RunnerPool, episode_id, next_attempt

ROOT = Path(__file__).parents[2]
AGENTS = '''
import asyncio, json, os, random, subprocess, sys, time
from pathlib import Path
import helper
import lightning_rl as lrl

def echo(task):
    with lrl.span("think"):
        lrl.reward(task["number"], "number")
    base = os.environ["OPENAI_BASE_URL"]
    return task | {"base": base, "draw": random.random(), "half": helper.half(task["number"])}

async def echo_async(task):
    await asyncio.sleep(0.001)
    return task["number"]

@lrl.rollout(name="solver")
def decorated(task):
    return task["number"]

def raises(task):
    print("about to fail")
    raise ValueError("no idea")

def exits(task):
    sys.exit(3)

def vanishes(task):
    print("good\\x1b[31mbye", flush=True)
    os._exit(7)

def too_deep(task):
    answer = []
    for _ in range(400):
        answer = [answer]
    return answer

def babbles(task):
    import socket, stat
    for number in range(3, 64):
        try:
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                os.write(number, b"\\0\\0\\0\\4babble")
        except OSError:
            pass
    time.sleep(300)

def segfaults(task):
    os.kill(os.getpid(), 11)

def hangs(task):
    with lrl.span("before"):
        lrl.reward(0.25, "before")
    Path(task["folder"], task["id"]).write_text(str(os.getpid()))
    child = subprocess.Popen(["sleep", "300"])
    Path(task["folder"], task["id"] + "-child").write_text(str(child.pid))
    time.sleep(300)

def leaves_daemons(task):
    """What an MCP server or a browser is: a session of its own, and one whose parent has gone."""
    child = subprocess.Popen(["sleep", "300"], start_new_session=True)
    Path(task["folder"], "direct").write_text(str(child.pid))
    subprocess.run(["sh", "-c", "setsid sleep 300 & echo $! > $0", task["folder"] + "/orphan"])
    return 1

def leaves_threads(task):
    import threading
    from concurrent.futures import ThreadPoolExecutor
    global pool
    pool = ThreadPoolExecutor(2)  # its idle workers are not waited for
    pool.submit(lambda: None)

    def late(name):
        time.sleep(0.3)
        with lrl.span("in " + name):
            lrl.reward(0.5, name)

    threading.Thread(target=late, args=["thread"]).start()
    pool.submit(late, "pool")
    return "words"

def nonsense(task):
    return {"a": object()}

def imports_late(task):
    was_there = "tabnanny" in sys.modules
    import tabnanny
    return was_there

def huge_number(task):
    return 2 ** 70

def not_a_number(task):
    return float("nan")

def garbage(task):
    for _ in range(200):
        os.write(1, os.urandom(5000))
        print("\\x1b[2J" * 100, file=sys.stderr)
    return "fine"

def closes_everything(task):
    os.closerange(0, 3)
    return "fine"

def flaky(task):
    """Dies at the first attempt, raises nothing at the second."""
    mark = Path(task["folder"], "mark-" + task["id"])
    lrl.reward(1.0, "attempt")
    if not mark.exists():
        mark.write_text("")
        os.kill(os.getpid(), 9)
    return random.random()

def calls_the_server(task):
    from openai import OpenAI
    client = OpenAI(max_retries=0)
    return client.chat.completions.create(model=os.environ["OPENAI_MODEL"], messages=[]).id

def strange(task):
    match task["number"]:
        case 0:
            os.kill(os.getpid(), 19)
        case 1:
            import ctypes
            ctypes.PyDLL(None).sleep(300)  # with the interpreter's lock
        case _:
            end = time.monotonic() + 4.5
            while time.monotonic() < end:
                pass
            return "busy"

def environment(task):
    return dict(os.environ)

def returns(task):
    return eval(task["value"])

def emits_and_returns(task):
    lrl.reward(0.25, "emitted")
    return "words"

def leaves_spans_open(task):
    lrl.span("forgotten", kind="tool").__enter__()
    return 1

def big_tool_result(task):
    with lrl.span("tool", kind="tool", result="x" * 10_000_000):
        return 1

def links(task):
    """Says what a framework's hook would, and writes what the server would."""
    from lightning_rl.episode import Call, CallLink, Span
    from lightning_rl.store import Store
    from tracers.context import current_rollout
    episode = os.environ["LRL_EPISODE"]
    call = Call(id="c1", episode_id=episode, index=0, model="m", prompt_ids=[1], sampled_ids=[2], logprobs=[-1.0],
                versions=[0], temperature=1.0, finish_reason="stop", response_id="r1")
    with Store.open(task["store"]) as store, lrl.span("node") as place:
        store.add_calls([call], [Span(id="s1", episode_id=episode, name="served", kind="tool")])
        current_rollout().emit(CallLink(episode_id=episode, response_id="r1", span_id=place.id))
    return 1

def items(task):
    yield 1
    yield 2

async def async_items(task):
    yield 1

def calls_elsewhere(task):
    from openai import OpenAI
    client = OpenAI(max_retries=0, base_url="http://127.0.0.1:99/v1")
    return client.chat.completions.create(model="m", messages=[]).id
'''
REWARDS = """
import lightning_rl as lrl

def score(task, episode):
    assert episode.outcome is not None
    emitted = sum(reward.value for reward in episode.rewards)
    return {"outcome": 1.0 if episode.outcome == "completed" else -1.0, "emitted": emitted}

def as_list(task, episode):
    return [lrl.Reward(episode_id=episode.id, name="spans", value=len(episode.spans))]

def broken(task, episode):
    raise RuntimeError("bad reward function")

async def linked(task, episode):
    (call,), spans = episode.calls, {span.name: span for span in episode.spans}
    assert call.span_id == spans["node"].id
    return [
        lrl.Reward(episode_id=episode.id, name="call", value=True, call_id=call.id),
        lrl.Reward(episode_id=episode.id, name="span", value=2, span_id=spans["served"].id),
    ]

def nowhere(task, episode):
    return [lrl.Reward(episode_id=episode.id, name="x", value=1, span_id="none such")]

def a_number(task, episode):
    return 1.0

def a_word(task, episode):
    return {"x": "high"}

def nan(task, episode):
    return {"x": float("nan")}

def hangs(task, episode):
    import time
    time.sleep(300)

def dies(task, episode):
    import os
    os._exit(0)
"""

MakePool = Callable[..., RunnerPool]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "episodes.db") as store:
        yield store


@pytest.fixture
def make_pool(tmp_path: Path, store: Store) -> Iterator[MakePool]:
    pools = []
    (tmp_path / "my_agents.py").write_text(AGENTS)
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    (tmp_path / "helper.py").write_text("def half(n): return n / 2")

    def make(agent: str, reward: str | None = "score", **settings: Any) -> RunnerPool:
        pool = RunnerPool(
            agent_function=(tmp_path / "my_agents.py", agent),
            reward_function=(tmp_path / "my_rewards.py", reward) if reward else None,
            store=store,
            **{"server_url": "http://127.0.0.1:9", "timeout_s": 120.0, "concurrency": 4} | settings,
        )
        pools.append(pool)
        return pool

    yield make
    for pool in pools:
        pool.__exit__(None, None, None)


def starts(count: int, **more: Any) -> list[EpisodeStart]:
    return [
        EpisodeStart(
            id=episode_id("train", 1, f"t{i}", 0),
            task=Task(id=f"t{i}", input={"number": i} | more),
            phase="train",
            step=1,
            sampling=Sampling(seed=i),
        )
        for i in range(count)
    ]


def one(pool: RunnerPool, **more: Any) -> EpisodeResult:
    (result,) = pool.run(starts(1, **more))
    return result


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(true: Callable[[], bool], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    return true()


# what works -----------------------------------------------------------------------------------------------------------


def test_64_episodes_at_once_never_mix(make_pool: MakePool, store: Store) -> None:
    heard: list[EpisodeResult] = []
    results = make_pool("echo", concurrency=64).run(starts(64), heard.append)
    assert sorted(result.start.id for result in heard) == sorted(result.start.id for result in results)
    for i, result in enumerate(results):
        assert result.outcome is Outcome.COMPLETED, result.error
        assert result.answer["id"] == f"t{i}"
        assert result.answer["number"] == i
        assert result.answer["half"] == i / 2
        assert result.answer["base"] == f"http://127.0.0.1:9/e/{result.start.id}/v1"
        assert {reward.name: reward.value for reward in result.rewards} == {"number": i, "outcome": 1, "emitted": i}
        assert {reward.episode_id for reward in result.rewards} == {result.start.id}
        episode = store.episode(result.start.id)
        assert episode.counted
        assert episode.answer == result.answer
        spans = {span.name: span for span in episode.spans}
        assert spans["think"].parent_id == spans["echo"].id
        assert spans["echo"].kind == "agent"
        by_name = {reward.name: reward for reward in episode.rewards}
        assert by_name["number"].span_id == spans["think"].id
        assert by_name["outcome"].span_id is None
    assert len({result.answer["draw"] for result in results}) == 64


def test_what_one_child_imports_the_next_ones_have(make_pool: MakePool) -> None:
    pool = make_pool("imports_late")
    assert [result.answer for result in pool.run(starts(1))] == [False]
    assert [result.answer for result in pool.run(starts(2)[1:])] == [True]


def test_randomness_follows_the_seed(make_pool: MakePool) -> None:
    again = [EpisodeStart(**{f: getattr(s, f) for f in s.__struct_fields__} | {"id": s.id + "b"}) for s in starts(3)]
    pool = make_pool("echo")
    first, second = pool.run(starts(3)), pool.run(again)
    assert [result.answer["draw"] for result in first] == [result.answer["draw"] for result in second]


@pytest.mark.parametrize(("agent", "root"), [("echo_async", "echo_async"), ("decorated", "solver")])
def test_async_and_decorated_agents(make_pool: MakePool, store: Store, agent: str, root: str) -> None:
    result = one(make_pool(agent, "as_list"))
    assert (result.outcome, result.answer) == (Outcome.COMPLETED, 0)
    assert [(span.name, span.kind) for span in store.episode(result.start.id).spans] == [(root, "agent")]
    assert {reward.name: reward.value for reward in result.rewards} == {"spans": 1}


def test_the_environment_points_every_sdk_at_the_episode(make_pool: MakePool) -> None:
    (first, second) = make_pool("environment", None, must_reward=False).run(starts(2))
    for result in (first, second):
        base = f"http://127.0.0.1:9/e/{result.start.id}"
        wanted = {
            "OPENAI_BASE_URL": f"{base}/v1",
            "ANTHROPIC_BASE_URL": base,
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{base}/v1/traces",
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            "OTEL_METRICS_EXPORTER": "none",
            "OTEL_LOGS_EXPORTER": "none",
            "LRL_EPISODE": result.start.id,
        }
        assert result.answer.items() >= wanted.items()
        assert "127.0.0.1" in result.answer["NO_PROXY"].split(",")


@pytest.mark.parametrize(("agent", "answer"), [("items", [1, 2]), ("async_items", [1])])
def test_an_agent_may_be_a_generator(make_pool: MakePool, agent: str, answer: list[int]) -> None:
    assert one(make_pool(agent)).answer == answer


def test_modules_are_loaded_as_imports_would(tmp_path: Path, store: Store) -> None:
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "agents.py").write_text("from .helper import half\ndef solve(task): return half(task['number'] + 1)")
    (package / "helper.py").write_text("def half(number): return number / 2")
    reference = resolve_reference(str(resolve_reference("my_package.agents:solve", tmp_path)), Path("/"))
    with RunnerPool(agent_function=reference, store=store, server_url="http://127.0.0.1:9") as pool:
        assert one(pool).answer == 0.5


def test_links_reach_the_store_and_the_reward_function(make_pool: MakePool, store: Store, tmp_path: Path) -> None:
    result = one(make_pool("links", "linked"), store=str(tmp_path / "episodes.db"))
    assert result.outcome is Outcome.COMPLETED, result.error
    episode = store.episode(result.start.id)
    spans = {span.name: span.id for span in episode.spans}
    assert [call.span_id for call in episode.calls] == [spans["node"]]
    assert {reward.name: (reward.value, reward.call_id, reward.span_id) for reward in episode.rewards} == {
        "call": (1.0, "c1", None),
        "span": (2.0, None, "s1"),
    }


# rewards that the agent gives -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "rewards"),
    [
        ("0.5", {"return": 0.5}),
        ("True", {"return": 1.0}),
        ("{'a': 1, 'b': 0.25}", {"a": 1.0, "b": 0.25}),
        ("{'a': __import__('numpy').float32(0.5)}", {"a": 0.5}),
        ("__import__('numpy').float32(0.5)", {"return": 0.5}),
        ("__import__('fractions').Fraction(1, 4)", {"return": 0.25}),
    ],
)
def test_returned_numbers_are_rewards(make_pool: MakePool, value: str, rewards: dict[str, float]) -> None:
    result = one(make_pool("returns", None, reward_names=["a"]), value=value)
    assert (result.outcome, result.counted) == (Outcome.COMPLETED, True), result.error
    assert {reward.name: reward.value for reward in result.rewards} == rewards


def test_numbers_by_names_that_the_recipe_does_not_have_are_an_answer(make_pool: MakePool) -> None:
    value = "{'rooms': __import__('numpy').int64(3), 'prices': [__import__('numpy').float32(0.5)]}"
    result = one(make_pool("returns", None, reward_names=["a"], must_reward=False), value=value)
    assert (result.outcome, result.rewards) == (Outcome.COMPLETED, []), result.error
    assert result.answer == {"rooms": 3, "prices": [0.5]}, "numbers of other libraries are numbers, however deep"
    (rooms,) = make_pool("returns", None, reward_names=["a"]).run([starts(2, value="{'rooms': 3}")[1]])
    assert "it returned dict {'rooms': 3} and emitted none" in str(rooms.error)
    assert "numbers by names of which reward.weights or evaluate.success has one" in str(rooms.error)


def test_a_task_that_cannot_be_recorded_costs_its_own_episode(make_pool: MakePool, store: Store) -> None:
    heard: list[EpisodeResult] = []
    bad, good = starts(2)
    bad = msgspec.structs.replace(bad, task=Task(id="t0", input={"text": "half of a letter: \ud83d"}))
    refused, fine = make_pool("echo").run([bad, good], heard.append)
    assert (refused.outcome, refused.counted, fine.counted) == (Outcome.INFRASTRUCTURE_ERROR, False, True)
    assert "the task cannot be recorded" in str(store.episode(refused.start.id).error)
    assert {result.start.id for result in heard} == {bad.id, good.id}


def test_an_agent_that_gives_no_proper_reward_fails_and_the_others_go_on(make_pool: MakePool, store: Store) -> None:
    bad = {
        "float('nan')": "the agent returned the reward return = nan; a reward must be a finite number",
        "{'a': 1, 'b': float('-inf')}": "the agent returned the reward b = -inf; a reward must be a finite number",
        "10 ** 400": "a reward must be a finite number",
        "'0.5'": "the agent gave no reward: it returned str '0.5' and emitted none. Return a number",
        "{'a': 'high'}": "it returned dict {'a': 'high'}",
        "None": "it returned NoneType None",
    }
    pool = make_pool("returns", None, reward_names=["a"])
    tasks = [
        msgspec.structs.replace(start, task=Task(id=start.task.id, input={"value": value}))
        for start, value in zip(starts(len(bad) + 2), [*bad, "1", ""], strict=True)
    ]
    *failed, good = pool.run(tasks[: len(bad) + 1])
    for result, said in zip(failed, bad.values(), strict=True):
        assert result.outcome is Outcome.AGENT_ERROR
        assert said in str(store.episode(result.start.id).error)
    assert good.counted
    (emitted,) = make_pool("emits_and_returns", None).run(tasks[-1:])
    assert emitted.counted, "emitted rewards are enough"


def test_what_an_agent_leaves_open_and_what_is_huge_is_recorded(make_pool: MakePool, store: Store) -> None:
    forgetful, large = starts(2)
    (forgot,) = make_pool("leaves_spans_open", None).run([forgetful])
    spans = {span.name: span for span in store.episode(forgot.start.id).spans}
    assert spans["forgotten"].error == "never ended"
    assert spans["leaves_spans_open"].error is None
    (big,) = make_pool("big_tool_result", None).run([large])
    (tool,) = [span for span in store.episode(big.start.id).spans if span.kind == "tool"]
    assert tool.attributes["result"] == "x" * 10_000_000


def test_a_number_that_no_message_holds_ends_no_run(make_pool: MakePool, store: Store) -> None:
    """A policy may write any number into a tool's arguments, and the server keeps what it wrote."""
    (start,) = starts(1)

    def seen_by_the_server(begun: EpisodeStart) -> None:
        arguments = {"a": 10**30, "b": "half of a pair: \ud83d"}
        store.add_spans([Span(id="t", episode_id=begun.id, name="t", kind="tool", attributes={"arguments": arguments})])

    (result,) = make_pool("echo").run([start], on_begin=seen_by_the_server)
    assert result.counted
    (span,) = [span for span in store.episode(start.id).spans if span.id == "t"]
    assert span.attributes["arguments"]["a"] == 10**30


# what fails -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("agent", "outcome", "said"),
    [
        ("raises", Outcome.AGENT_ERROR, ["ValueError: no idea", "about to fail"]),
        ("exits", Outcome.AGENT_ERROR, ["SystemExit: 3"]),
        ("vanishes", Outcome.AGENT_ERROR, ["exit code 7", "bye"]),
        ("segfaults", Outcome.INFRASTRUCTURE_ERROR, ["signal 11"]),
        ("babbles", Outcome.INFRASTRUCTURE_ERROR, ["something else than messages"]),
        ("nonsense", Outcome.AGENT_ERROR, ["not JSON", "dict"]),
        ("huge_number", Outcome.AGENT_ERROR, ["not JSON"]),
        ("too_deep", Outcome.AGENT_ERROR, ["not JSON", "64 levels"]),
        ("not_a_number", Outcome.AGENT_ERROR, ["not JSON"]),
        ("missing", Outcome.AGENT_ERROR, ["has no function 'missing'"]),
        ("calls_the_server", Outcome.INFRASTRUCTURE_ERROR, ["APIConnectionError"]),
        ("calls_elsewhere", Outcome.AGENT_ERROR, ["APIConnectionError"]),
    ],
)
def test_a_failure_is_recorded_and_is_not_a_zero_reward(
    make_pool: MakePool, store: Store, agent: str, outcome: Outcome, said: list[str]
) -> None:
    result = one(make_pool(agent, max_attempts=1))
    assert result.outcome is outcome
    assert not result.counted
    assert result.rewards == []
    episode = store.episode(result.start.id)
    assert episode.outcome is outcome
    for text in said:
        assert text in str(episode.error)


@pytest.mark.parametrize("agent", ["garbage", "closes_everything"])
def test_output_of_the_agent_stays_off_the_console(
    make_pool: MakePool, agent: str, capfd: pytest.CaptureFixture[str]
) -> None:
    result = one(make_pool(agent))
    assert (result.outcome, result.answer) == (Outcome.COMPLETED, "fine"), result.error
    assert capfd.readouterr() == ("", "")


def test_a_hanging_agent_is_killed_with_all_it_started(make_pool: MakePool, store: Store, tmp_path: Path) -> None:
    begun = time.monotonic()
    result = one(make_pool("hangs", timeout_s=3.0), folder=str(tmp_path))
    assert time.monotonic() - begun < 60
    assert result.outcome is Outcome.TIMEOUT
    assert "within 3 s" in str(result.error)
    assert [reward.name for reward in result.rewards] == ["before"], "what came before the end is kept"
    assert [span.name for span in store.episode(result.start.id).spans] == ["before"]
    for name in ("t0", "t0-child"):
        pid = int((tmp_path / name).read_text())
        assert wait_until(lambda pid=pid: not alive(pid))


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are adopted on Linux")
def test_processes_that_left_the_episodes_session_end_with_it(make_pool: MakePool, tmp_path: Path) -> None:
    assert one(make_pool("leaves_daemons", None), folder=str(tmp_path)).outcome is Outcome.COMPLETED
    for name in ("direct", "orphan"):
        pid = int((tmp_path / name).read_text())
        assert wait_until(lambda pid=pid: not alive(pid)), name


def test_threads_that_an_agent_has_left_running_are_waited_for(make_pool: MakePool, store: Store) -> None:
    result = one(make_pool("leaves_threads", None))
    assert (result.outcome, result.answer) == (Outcome.COMPLETED, "words"), result.error
    assert {reward.name: reward.value for reward in result.rewards} == {"thread": 0.5, "pool": 0.5}
    assert result.seconds < 60, "idle threads are not waited for"
    spans = {span.name: span for span in store.episode(result.start.id).spans}
    root = spans["leaves_threads"].id
    assert [spans[f"in {name}"].parent_id for name in ("thread", "pool")] == [root, root], "it is the root's work"


def test_silence_is_found_and_a_busy_agent_is_not_silent(make_pool: MakePool) -> None:
    stopped, stuck, busy = make_pool("strange", heartbeat_s=3.0, max_attempts=1).run(starts(3))
    for result in (stopped, stuck):
        assert result.outcome is Outcome.TIMEOUT
        assert "the agent showed no sign of life for 3 s and was killed" in str(result.error)
        assert 3.0 <= result.seconds < 60
    assert busy.answer == "busy", busy.error


def test_the_recipe_may_score_a_timeout(make_pool: MakePool, store: Store, tmp_path: Path) -> None:
    pool = make_pool("hangs", timeout_s=3.0, outcome_policy={Outcome.TIMEOUT: "score"})
    result = one(pool, folder=str(tmp_path))
    assert (result.outcome, result.counted) == (Outcome.TIMEOUT, True)
    rewards = {reward.name: reward.value for reward in result.rewards}
    assert rewards == {"before": 0.25, "outcome": -1.0, "emitted": 0.25}
    assert len(store.episodes(counted_only=True)) == 1


def test_the_recipe_may_score_an_agent_error(make_pool: MakePool) -> None:
    result = one(make_pool("raises", outcome_policy={Outcome.AGENT_ERROR: "score"}))
    assert (result.outcome, result.counted) == (Outcome.AGENT_ERROR, True)
    assert {reward.name: reward.value for reward in result.rewards} == {"outcome": -1.0, "emitted": 0}


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ("broken", "bad reward function"),
        ("nan", "finite number"),
        ("a_word", "reward 'x' must be a finite number, not str 'high'"),
        ("a_number", "return {name: number} or a list of rewards, not float 1.0"),
        ("nowhere", "put at the span 'none such', which this episode does not have"),
        ("dies", "exit code 0"),
        ("hangs", "within 2 s"),
    ],
)
def test_a_failing_reward_function_is_not_the_agents_fault(
    make_pool: MakePool, store: Store, reward: str, said: str
) -> None:
    short = {"timeout_s": 2.0} if reward == "hangs" else {}
    result = one(make_pool("echo_async", reward, max_attempts=1, outcome_policy={Outcome.TIMEOUT: "score"}, **short))
    assert result.outcome is Outcome.INFRASTRUCTURE_ERROR
    assert not result.counted
    assert said in str(store.episode(result.start.id).error)


# attempts -------------------------------------------------------------------------------------------------------------


def test_of_several_attempts_only_the_last_counts(make_pool: MakePool, store: Store, tmp_path: Path) -> None:
    heard: list[EpisodeResult] = []
    results = make_pool("flaky", max_attempts=3).run(starts(5, folder=str(tmp_path)), heard.append)
    assert len(heard) == 10
    assert all(result.counted and result.start.attempt == 1 for result in results)
    assert len({result.start.id for result in heard}) == 10
    for result in results:
        attempts = [episode for episode in store.episodes() if episode.start.task.id == result.start.task.id]
        assert [(episode.outcome, episode.counted) for episode in attempts] == [
            (Outcome.INFRASTRUCTURE_ERROR, False),
            (Outcome.COMPLETED, True),
        ]
        assert attempts[0].start.sampling == attempts[1].start.sampling, "a failure of ours repeats the same draws"
    assert len(store.episodes(counted_only=True)) == 5


def test_attempts_are_bounded(make_pool: MakePool, store: Store) -> None:
    result = one(make_pool("segfaults", max_attempts=3))
    assert (result.start.attempt, result.counted) == (2, False)
    assert [episode.counted for episode in store.episodes()] == [False] * 3


def test_a_retry_after_the_agents_own_failure_draws_anew(make_pool: MakePool, store: Store) -> None:
    one(make_pool("raises", outcome_policy={Outcome.AGENT_ERROR: "retry"}))
    first, second = store.episodes()
    assert first.start.sampling.seed != second.start.sampling.seed
    assert first.start.task == second.start.task


def test_what_an_interrupted_run_left_is_taken_up(make_pool: MakePool, store: Store) -> None:
    finished, cut_off, failed = starts(3)
    pool = make_pool("echo")
    (kept,) = pool.run([finished])
    store.begin(cut_off)
    store.begin(failed)
    store.end(failed.id, Outcome.AGENT_ERROR, error="as it was", counted=False, ended_at=1.0)
    heard: list[EpisodeResult] = []
    results = pool.run([finished, cut_off, failed], heard.append)
    assert [result.start.id for result in heard] == [next_attempt(cut_off, draw_anew=False).id]
    assert results[0].answer == kept.answer
    assert results[1].start.sampling == cut_off.sampling
    assert results[2].error == "as it was"
    assert store.episode(cut_off.id).outcome is Outcome.CANCELLED
    assert sorted(episode.start.task.id for episode in store.episodes(counted_only=True)) == ["t0", "t1"]


def test_a_resumed_run_tries_anew_what_failed_for_our_own_reasons(make_pool: MakePool, store: Store) -> None:
    (start,) = starts(1)
    store.begin(start)
    store.end(start.id, Outcome.INFRASTRUCTURE_ERROR, error="disk full", counted=False, ended_at=1.0)
    (result,) = make_pool("echo", max_attempts=1).run([start])
    assert result.counted
    assert result.start.id == next_attempt(start, draw_anew=False).id


# the end --------------------------------------------------------------------------------------------------------------


def test_an_exception_of_the_trainer_cancels_what_runs(make_pool: MakePool, store: Store, tmp_path: Path) -> None:
    def check() -> None:
        if len(list(tmp_path.glob("t*-child"))) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_pool("hangs", concurrency=2).run(starts(3, folder=str(tmp_path)), check=check)
    assert [episode.outcome for episode in store.episodes()] == [Outcome.CANCELLED] * 2
    for path in tmp_path.glob("t?"):
        assert wait_until(lambda path=path: not alive(int(path.read_text())))


def test_a_killed_fork_server_costs_attempts_only(make_pool: MakePool, store: Store, tmp_path: Path) -> None:
    pool = make_pool("flaky", max_attempts=3)
    one(pool, folder=str(tmp_path))
    os.kill(pool._forks._process.pid, signal.SIGKILL)
    more = [
        next_attempt(next_attempt(start, draw_anew=False), draw_anew=False) for start in starts(3, folder=str(tmp_path))
    ]
    assert all(result.counted for result in pool.run(more))


def test_nothing_outlives_a_killed_trainer(tmp_path: Path) -> None:
    (tmp_path / "my_agents.py").write_text(AGENTS)
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    (tmp_path / "helper.py").write_text("def half(n): return n / 2")
    script = f"""
from pathlib import Path
from lightning_rl.episode import EpisodeStart, Task
from lightning_rl.store import Store
from trainers.runner.pool import RunnerPool
here = Path({str(tmp_path)!r})
start = EpisodeStart(id="x", task=Task(id="t0", input={{"folder": str(here)}}), phase="train")
store = Store.open(here / "e.db")
pool = RunnerPool(agent_function=(here / "my_agents.py", "hangs"), reward_function=(here / "my_rewards.py", "score"),
                  store=store, server_url="http://127.0.0.1:9")
pool.run([start])
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    trainer = subprocess.Popen([sys.executable, "-c", script], env=environment)
    try:
        assert wait_until((tmp_path / "t0-child").exists)
        pids = [int((tmp_path / name).read_text()) for name in ("t0", "t0-child")]
        assert all(map(alive, pids))
    finally:
        trainer.kill()
        trainer.wait()
    assert wait_until(lambda: not any(map(alive, pids)))


def test_a_server_error_is_infrastructure_and_a_refusal_is_the_agents(make_pool: MakePool) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        status = 500

        def do_POST(self) -> None:
            payload = json.dumps({"error": {"message": "no", "type": "t", "code": "c"}}).encode()
            self.send_response(self.status)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        pool = make_pool("calls_the_server", max_attempts=1, server_url=f"http://127.0.0.1:{server.server_port}")
        broken, refused = starts(2)
        outcomes = [pool.run([broken])[0].outcome]
        Handler.status = 400
        outcomes.append(pool.run([refused])[0].outcome)
        server.shutdown()
        thread.join()
    assert outcomes == [Outcome.INFRASTRUCTURE_ERROR, Outcome.AGENT_ERROR]


def test_ids_are_unique_and_fit_a_url() -> None:
    ids = {
        episode_id(phase, step, task, sample, attempt)
        for phase in ("train", "eval-final")
        for step in (1, 11)
        for task in ("1", "a-1", "a/b c", "ä", "", "x" * 100, "1.1")
        for sample in (0, 1)
        for attempt in (0, 1)
    }
    assert len(ids) == 2 * 2 * 7 * 2 * 2
    assert all(len(name) < 100 and set(name) <= set(map(chr, range(33, 127))) - set("/?#%") for name in ids)

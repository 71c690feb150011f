"""Spans, rewards and `@rollout`, with and without a rollout around them."""

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from lightning_rl.episode import Outcome, Reward, Span
from lightning_rl.errors import LightningError
from lightning_rl.store import Store
from tracers.context import Event, Rollout, current_rollout, running
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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", None, 1j])
def test_a_reward_is_a_finite_number_even_outside(value: Any) -> None:
    with pytest.raises(ValueError, match="finite number"):
        reward(value)


def test_names_and_kinds_are_checked() -> None:
    with pytest.raises(ValueError, match="name"):
        reward(1, "")
    with pytest.raises(ValueError, match="agent, chain, tool"), span("x", kind="llm"):
        pass


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
    assert seen == {"base": f"http://127.0.0.1:9/e/{episode.id}/v1", "key": "mine"}
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


def test_two_standalone_rollouts_at_once_are_refused(standalone: Path) -> None:
    @rollout
    async def agent() -> None:
        await asyncio.sleep(0.05)

    async def both() -> list[Any]:
        return await asyncio.gather(agent(), agent(), return_exceptions=True)

    first, second = asyncio.run(both())
    assert first is None
    assert isinstance(second, LightningError)
    with Store.open(standalone) as store:
        assert len(store.episodes()) == 1


def test_half_an_address_is_refused(standalone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LRL_SERVER")
    with pytest.raises(LightningError, match="only one of"):
        double(1)

"""What is trained is what was sampled: a thousand conversations in five frameworks, each call an extension of the one before it,
and every recorded log-prob what the model gives to those very ids. And histories that were changed, each found at the right token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from lightning_rl.episode import Call, CallLink, Episode, EpisodeStart, Outcome, Sampling, Span, Task
from lightning_rl.store import Store
from lightning_rl.token_tree import label_calls
from rollout_server.launch import RolloutServer
from tests.agents import conversations
from tracers.context import Event, Rollout, running
from tracers.install import install
from tracers.spans import span

EPISODES = 200
AT_ONCE = 32
SUMMARY = {"role": "user", "content": "Summary: rain."}
FRAMEWORKS = [
    conversations.openai_sdk,
    conversations.langchain_agent,
    conversations.langgraph_graph,
    conversations.autogen_agent,
    conversations.agents_sdk,
]


@dataclass
class Served:
    url: str
    store: Store


@pytest.fixture(scope="module")
def served(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    install()
    folder = tmp_path_factory.mktemp("exactness")
    with (
        Store.open(folder / "episodes.db") as store,
        RolloutServer(
            tiny_llama,
            "tiny",
            "float32",
            log_dir=folder,
            store=folder / "episodes.db",
            kv_tokens=32768,
            device="cpu",
            threads=1,
        ) as server,
    ):
        yield Served(server.base_url, store)


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


@pytest.fixture(autouse=True)
def _environment(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", f"{served.url}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "none")


@pytest.mark.parametrize("agent", FRAMEWORKS, ids=lambda agent: agent.__name__)
def test_what_is_recorded_is_what_was_sampled(
    agent: Callable[[Any], Awaitable[None]], served: Served, loop: asyncio.Runner, model: Any
) -> None:
    episodes = loop.run(run_all(served, agent))
    assert len(episodes) == EPISODES
    for number, episode in enumerate(episodes):
        turns = len(task_of(number)["questions"])
        assert len(episode.calls) == turns
        assert [call.relation for call in episode.calls] == ["root"] + ["extension"] * (turns - 1)
        for before, call in zip(episode.calls, episode.calls[1:], strict=False):
            sequence = before.prompt_ids + before.sampled_ids
            assert call.parent_id == before.id
            assert call.prompt_ids[: len(sequence)] == sequence
        span_ids = {span.id for span in episode.spans}
        assert all(call.span_id in span_ids for call in episode.calls)
    check_logprobs(model, [episode.calls for episode in episodes])


def test_a_changed_history_is_found_at_the_right_token(served: Served, model: Any) -> None:
    system = {"role": "system", "content": "You know the weather."}
    asked = [{"role": "user", "content": f"Question {number}: what is the weather?"} for number in range(4)]
    changes: dict[str, tuple[Callable[[list[Any]], list[Any]], str]] = {
        "nothing": (lambda said: said, "extension"),
        "the last exchange taken back": (lambda said: said[:-2], "fork"),
        "the oldest exchange dropped": (lambda said: [said[0], *said[4:]], "edit"),
        "a reply changed": (lambda said: replaced(said, -1, "Something else."), "edit"),
        "an earlier reply changed": (lambda said: replaced(said, -3, "I do not know."), "edit"),
        "a tool's result changed": (lambda said: replaced(said, 3, "It snows."), "edit"),
        "a summary of the beginning": (lambda said: [said[0], SUMMARY, *said[-2:]], "edit"),
        "a summary instead": (lambda said: [said[0], SUMMARY], "root"),
        "another system prompt": (lambda said: replaced(said, 0, "You know the news."), "edit"),
    }
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none")
    for number, (change, relation) in enumerate(changes.values()):
        id = f"changed-{number}"
        served.store.begin(start(id, number))

        def ask(messages: list[Any], *, must_call: bool = False, id: str = id) -> dict[str, Any]:
            made = client.chat.completions.create(
                model="tiny",
                messages=messages,
                max_tokens=60 if must_call else 8,
                tools=[conversations.TOOL],
                tool_choice="required" if must_call else "auto",
                extra_headers={"x-lrl-episode": id},
                extra_body={"parallel_tool_calls": False},
            )
            return made.choices[0].message.model_dump(exclude_none=True)

        said: list[Any] = [system, asked[0]]
        said.append(ask(said, must_call=True))
        said.append({"role": "tool", "tool_call_id": said[-1]["tool_calls"][0]["id"], "content": "It rains."})
        said.append(ask(said))
        for question in asked[1:3]:
            said.append(question)
            said.append(ask(said))
        ask([*change(said), asked[3]])
        calls = served.store.episode(id).calls
        *earlier, last = calls
        assert [call.relation for call in earlier] == ["root"] + ["extension"] * 3
        assert last.relation == relation, list(changes)[number]
        if relation in ("fork", "edit"):
            assert last.parted_at == parting(last, earlier), list(changes)[number]
        else:
            assert last.parted_at is None
        if relation == "root":
            assert label_calls(calls)[last.id].parted_at == parting(last, earlier)
        check_logprobs(model, [[call] for call in calls])


async def run_all(served: Served, agent: Callable[[Any], Awaitable[None]]) -> list[Episode]:
    free = asyncio.Semaphore(AT_ONCE)

    async def run(number: int) -> Episode:
        id = f"{agent.__name__}-{number}"
        events: list[Event] = []
        async with free:
            served.store.begin(start(id, number))
            with running(Rollout(id, events.append, served.url)), span("solve", kind="agent"):
                await agent(task_of(number))
            spans = [event for event in events if isinstance(event, Span)]
            links = [event for event in events if isinstance(event, CallLink)]
            served.store.end(id, Outcome.COMPLETED, counted=True, spans=spans, links=links, ended_at=1.0)
            return served.store.episode(id)

    return await asyncio.gather(*map(run, range(EPISODES)))


def task_of(number: int) -> dict[str, Any]:
    questions = [f"{number}.{turn}: go on, please." for turn in range(2 + number % 2)]
    return {"id": number, "questions": questions, "stream": number % 4 == 2}


def start(id: str, seed: int) -> EpisodeStart:
    return EpisodeStart(id=id, task=Task(id="t", input={}), phase="train", sampling=Sampling(seed=seed))


def replaced(said: Sequence[Any], at: int, content: str) -> list[Any]:
    changed = list(said)
    changed[at] = {**changed[at], "content": content}
    return changed


def parting(call: Call, earlier: Sequence[Call]) -> int:
    """Token by token: where a fork leaves the longest call that is in it whole, or where nothing said before goes on."""
    rivals = [each.prompt_ids + each.sampled_ids for each in earlier]
    if call.relation == "fork":
        return max(len(each) for each in rivals if call.prompt_ids[: len(each)] == each)
    at = 0
    while rivals := [each for each in rivals if each[at : at + 1] == call.prompt_ids[at : at + 1] != []]:
        at += 1
    return at


def check_logprobs(model: Any, conversations: list[list[Call]]) -> None:
    """Each is a conversation whose last call has all ids. Where a grammar left fewer tokens to choose from, each of them was
    as likely as the model says, or likelier."""
    conversations = sorted(conversations, key=lambda calls: len(calls[-1].prompt_ids))
    for at in range(0, len(conversations), 50):
        batch = conversations[at : at + 50]
        rows = [calls[-1].prompt_ids + calls[-1].sampled_ids for calls in batch]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence(
            [torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True
        )
        places = [
            (row, len(call.prompt_ids) + place, call, place)
            for row, calls in enumerate(batch)
            for call in calls
            for place in range(len(call.sampled_ids))
        ]
        with torch.inference_mode():
            hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
            before = hidden[[row for row, *_ in places], [column - 1 for _, column, *_ in places]]
            logits = model.lm_head(before)
            for row, (*_, call, _) in enumerate(places):
                for token, bias in (call.request.get("logit_bias") or {}).items():
                    logits[row, int(token)] += bias
            chosen = torch.tensor([call.sampled_ids[place] for *_, call, place in places])
            found = logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(1)
        recorded = torch.tensor([call.logprobs[place] for *_, call, place in places])
        free = torch.tensor([call.request.get("tool_choice") != "required" for *_, call, _ in places])
        assert (recorded - found)[free].abs().max() < 1e-4
        assert (recorded - found).min() > -1e-4

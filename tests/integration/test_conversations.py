"""Conversations over HTTP in several templates: each next prompt begins with what was sampled, and the record says how every
call relates to those before it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from lightning_rl.episode import Call, EpisodeStart, Task
from lightning_rl.store import Store
from lightning_rl.token_tree import label_calls
from rollout_server import messages as m
from rollout_server.api.config import WebConfig
from rollout_server.api.front.endpoint import Endpoint
from rollout_server.api.rendering.render import Renderer
from tests.chat_templates import dir_of, kinds
from tests.integration.scripted_manager import ScriptedManager, one_by_one, serving_web, tokens
from tests.integration.served_web import eventually
from tests.unit.test_render import TOOL

CALLS = {
    "smollm2": '<tool_call>{{"name": "calculator", "arguments": {{"expression": "{}"}}}}</tool_call>',
    "qwen3": '<tool_call>\n{{"name": "calculator", "arguments": {{"expression": "{}"}}}}\n</tool_call>',
    "llama3_1": '{{"name": "calculator", "parameters": {{"expression": "{}"}}}}',
    "mistral": '[TOOL_CALLS] [{{"name": "calculator", "arguments": {{"expression": "{}"}}, "id": "abcdefghi"}}]',
    "gemma": '<tool_call>{{"name": "calculator", "arguments": {{"expression": "{}"}}}}</tool_call>',
}


@dataclass
class Server:
    kind: str
    url: str
    manager: ScriptedManager
    store: Store
    renderer: Renderer

    def begin(self, episode: str) -> openai.OpenAI:
        self.store.begin(EpisodeStart(id=episode, task=Task(id="t", input={}), phase="train"))
        return openai.OpenAI(base_url=f"{self.url}/e/{episode}/v1", api_key="x", max_retries=0, timeout=60)

    def says(self, *texts: str, end: bool = True) -> None:
        """In tokens that no tokeniser would make of it: one a character, where there is one."""
        end_ids = [self.renderer.stop_ids[0]] if end else []
        waiting = [[*(i for part in self.split(text) for i in self.renderer.encode(part)), *end_ids] for text in texts]
        reason = "stop" if end else "length"
        self.manager.script = lambda submit: self.answers(submit, waiting, reason)

    def split(self, text: str) -> list[str]:
        for special in ("[TOOL_CALLS]", "<tool_call>", "</tool_call>", "<think>", "</think>"):
            if special in text:
                before, _, after = text.partition(special)
                return [*self.split(before), special, *self.split(after)]
        return list(text)

    def answers(self, submit: m.Submit, waiting: list[list[int]], reason: str) -> list[m.FromManager]:
        return one_by_one(submit, [waiting.pop(0) for _ in range(submit.n)], reason)

    def ask(self, client: openai.OpenAI, messages: list[Any], **more: Any) -> Any:
        return client.chat.completions.create(model="m", messages=messages, tools=[TOOL], **more).choices[0].message

    def calls(self, episode: str) -> list[Call]:
        return self.store.episode(episode).calls


@pytest.fixture(scope="module", params=list(CALLS))
def server(
    request: pytest.FixtureRequest, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with serving(request.param, tiny_llama, tmp_path_factory.mktemp("web")) as running:
        yield running


@pytest.fixture(scope="module")
def thinking(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving("qwen3", tiny_llama, tmp_path_factory.mktemp("thinking")) as running:
        yield running


@contextmanager
def serving(kind: str, tiny_llama: Path, folder: Path) -> Iterator[Server]:
    model = dir_of(kinds()[kind], tiny_llama, folder / "model")

    def config(listen_fd: int) -> WebConfig:
        return WebConfig(
            ipc_dirs=[str(folder)],
            model_dir=str(model),
            parent_pid=os.getpid(),
            kv_tokens=8192,
            served_name="m",
            listen_fd=listen_fd,
            admin_key="admin",
            store=str(folder / "episodes.db"),
        )

    manager = ScriptedManager(folder)
    with Store.open(folder / "episodes.db") as store, serving_web(config) as url:
        yield Server(kind, url, manager, store, Renderer(model))
    manager.stop()


def test_a_conversation_with_tools_extends_call_by_call(server: Server) -> None:
    client = server.begin("extends")
    messages: list[Any] = [{"role": "user", "content": "How much is it?"}]
    for number in range(4):
        server.says(CALLS[server.kind].format(f"{number}*7"))
        reply = server.ask(client, messages)
        assert reply.tool_calls
        messages += [reply, {"role": "tool", "tool_call_id": reply.tool_calls[0].id, "content": f"{number * 7}"}]
        server.says(f" It is {number * 7}. ", end=number % 2 == 0)
        messages += [server.ask(client, messages), {"role": "user", "content": "And then?"}]
    calls = server.calls("extends")
    assert [call.relation for call in calls] == ["root"] + ["extension"] * 7
    assert [call.parted_at for call in calls] == [None] * 8
    assert [call.parent_id for call in calls] == [None, *(call.id for call in calls[:-1])]
    for before, after in pairwise(calls):
        said = before.prompt_ids + before.sampled_ids
        assert after.prompt_ids[: len(said)] == said
    assert len(server.renderer.encode(server.renderer.decode(calls[1].sampled_ids))) < len(calls[1].sampled_ids)


def test_forks_and_edits_are_recorded_as_such(server: Server) -> None:
    client = server.begin("labels")
    question = {"role": "user", "content": "How much is it?"}
    server.says("One.", "Two.")
    client.chat.completions.create(model="m", messages=[question], n=2)
    server.says("Three.")
    (third,) = client.chat.completions.create(model="m", messages=[question]).choices  # a retry
    asked = [question, {"role": "assistant", "content": "Two."}, {"role": "user", "content": "Sure?"}]
    server.says("Yes.", "No.", "Well.")
    client.chat.completions.create(model="m", messages=asked)
    client.chat.completions.create(model="m", messages=[*asked[:2], {"role": "user", "content": "Really?"}])
    asked += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Then?"}]
    client.chat.completions.create(model="m", messages=[asked[0], {**asked[1], "content": "Twelve."}, *asked[2:]])
    one, two, three, four, five, six = server.calls("labels")
    relations = ["root", "fork", "fork", "extension", "fork", "edit"]
    assert [call.relation for call in (one, two, three, four, five, six)] == relations
    assert three.parted_at == two.parted_at == len(one.prompt_ids)
    assert four.parent_id == five.parent_id == two.id
    assert five.parted_at == len(two.prompt_ids) + len(two.sampled_ids)
    labels = label_calls([one, two, three, four, five, six])
    assert [labels[call.id].relation for call in (one, two, three, four, five)] == relations[:5]
    assert six.parted_at == labels[six.id].parted_at
    assert third.message.content == "Three."


def test_what_is_refused_does_not_count(server: Server) -> None:
    client = server.begin("refused")
    question = {"role": "user", "content": "How much is it?"}
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="m", messages=[question], logit_bias={"99999": 1})
    server.says("One.")
    client.chat.completions.create(model="m", messages=[question])
    assert [call.relation for call in server.calls("refused")] == ["root"]


QUESTION: dict[str, Any] = {"role": "user", "content": "How much is it?"}


def chat(server: Server, messages: list[Any], key: str = "x", **more: Any) -> Any:
    """Without an episode."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60)
    return client.chat.completions.create(model="m", messages=messages, **more).choices[0].message


def asked(server: Server) -> list[int]:
    """The ids of the last prompt."""
    return server.manager.submitted[-1].prompt_ids


def test_clients_do_not_meet_and_nobody_is_told_what_a_stranger_thought(thinking: Server) -> None:
    thinking.says("<think>secret</think>Yes.", "Well.", "Well.", "Well.")
    chat(thinking, [{"role": "user", "content": "Is one odd?"}], key="a")
    answered = [{"role": "user", "content": "Is one odd?"}, {"role": "assistant", "content": "Yes."}, QUESTION]
    chat(thinking, [{**answered[0], "content": "Is two even?"}, *answered[1:]], key="a")
    assert "secret" not in thinking.renderer.decode(asked(thinking))
    chat(thinking, answered, key="b")
    assert "secret" not in thinking.renderer.decode(asked(thinking))
    chat(thinking, answered, key="a")
    assert "secret" in thinking.renderer.decode(asked(thinking))


def test_another_model_is_another_conversation(thinking: Server) -> None:
    client = thinking.begin("models")
    loaded = httpx.post(
        f"{thinking.url}/v1/load_lora_adapter",
        json={"lora_name": "other", "lora_path": "/nowhere"},
        headers={"authorization": "Bearer admin"},
    )
    assert loaded.status_code == 200
    for model, said in (("m", "He llo"), ("other", "Hello")):
        thinking.says(said.replace(" ", ""))
        client.chat.completions.create(model=model, messages=[QUESTION])
    history = [QUESTION, {"role": "assistant", "content": "Hello"}, QUESTION]
    for model in ("m", "other"):
        thinking.says("Well.")
        client.chat.completions.create(model=model, messages=history)
    policy, adapter, of_policy, of_adapter = thinking.calls("models")
    assert [call.relation for call in thinking.calls("models")] == ["root", "root", "extension", "extension"]
    assert (of_policy.parent_id, of_adapter.parent_id) == (policy.id, adapter.id)


@pytest.mark.parametrize("said", ["It is forty-", "<think>Let me s", "Well: <tool_c", "Grüße 🌍"])
def test_what_a_client_got_of_a_stream_that_it_left_is_extended(thinking: Server, said: str) -> None:
    episode = f"left-{len(said)}"
    client = thinking.begin(episode)
    sampled = [i for part in thinking.split(said) for i in thinking.renderer.encode(part)]
    thinking.manager.script = lambda submit: [tokens(submit, [i]) for i in sampled]
    shown = {"role": "assistant", "content": "", "reasoning_content": ""}
    complete = said.removesuffix(" <tool_c").removeprefix("<think>")  # what may be a call is held back
    with client.chat.completions.create(model="m", messages=[QUESTION], tools=[TOOL], stream=True) as stream:
        for chunk in stream:
            delta = chunk.choices[0].delta
            shown["content"] += delta.content or ""
            shown["reasoning_content"] += getattr(delta, "reasoning_content", None) or ""
            if shown["content"] + shown["reasoning_content"] == complete:
                break
    eventually(lambda: len(thinking.calls(episode)) == 1)
    thinking.says("Yes.")
    thinking.ask(client, [QUESTION, shown, QUESTION])
    left, after = thinking.calls(episode)
    assert (left.finish_reason, left.sampled_ids) == ("abort", sampled)
    assert (after.relation, after.parent_id) == ("extension", left.id)
    assert after.prompt_ids[: len(left.prompt_ids) + len(sampled)] == left.prompt_ids + sampled


def failing(submit: m.Submit) -> list[m.FromManager]:
    return [m.Failed(request_id=submit.request_id, code="worker_failed", message="gone")]


@pytest.mark.parametrize("script", [failing, lambda submit: []], ids=["engine error", "timeout"])
@pytest.mark.parametrize("raw", [False, True])
def test_what_was_asked_in_vain_was_not_asked(
    thinking: Server,
    script: Callable[[m.Submit], list[m.FromManager]],
    raw: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    episode = f"vain-{script is failing}-{raw}"
    client = thinking.begin(episode)

    def ask() -> Any:
        if raw:
            return client.completions.create(model="m", prompt=[300, 301], n=2)
        return client.chat.completions.create(model="m", messages=[QUESTION], n=2)

    thinking.manager.script = script
    with monkeypatch.context() as hasty:
        hasty.setattr(Endpoint, "_time", lambda *_: 2.0)
        with pytest.raises(openai.APIError):
            ask()
    eventually(lambda: len(thinking.calls(episode)) == 2)
    for _ in range(2):
        thinking.says("One.", "Two.")
        ask()
    assert [call.relation for call in thinking.calls(episode)[2:]] == ["root", "fork", "fork", "fork"]
    assert all(not call.sampled_ids for call in thinking.calls(episode)[:2])


def test_a_reply_cut_inside_its_reasoning_goes_on_there(thinking: Server) -> None:
    client = thinking.begin("thoughts")
    thinking.says("<think>Six times ", end=False)
    begun = thinking.ask(client, [QUESTION])
    shown = {"role": "assistant", "content": begun.content, "reasoning_content": begun.reasoning_content}
    assert begun.reasoning_content == "Six times "
    more = {"continue_final_message": True, "add_generation_prompt": False}
    thinking.says("seven, ", end=False)
    rest = thinking.ask(client, [QUESTION, shown], extra_body=more)
    assert (rest.content, rest.reasoning_content) == ("", "seven, ")
    shown["reasoning_content"] += rest.reasoning_content
    thinking.says("that is</think>42")
    last = thinking.ask(client, [QUESTION, shown], extra_body=more, response_format={"type": "json_object"})
    assert (last.content, last.reasoning_content) == ("42", "that is")
    assert thinking.manager.submitted[-1].grammar.startswith("start: thought ")
    shown |= {"content": "42", "reasoning_content": "Six times seven, that is"}
    thinking.says("Yes.")
    thinking.ask(client, [QUESTION, shown, QUESTION])
    calls = thinking.calls("thoughts")
    assert [call.relation for call in calls] == ["root"] + ["extension"] * 3
    assert calls[-1].prompt_ids[: len(calls[2].prompt_ids)] == calls[2].prompt_ids

"""Conversations over HTTP in several templates: each next prompt begins with what was sampled, and the record says how every
call relates to those before it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import openai
import pytest

from lightning_rl.episode import Call, EpisodeStart, Task
from lightning_rl.store import Store
from lightning_rl.token_tree import label_calls
from rollout_server import messages as m
from rollout_server.api.config import WebConfig
from rollout_server.api.rendering.render import Renderer
from tests.chat_templates import dir_of, kinds
from tests.integration.scripted_manager import ScriptedManager, one_by_one, serving_web
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
        return openai.OpenAI(base_url=f"{self.url}/e/{episode}/v1", api_key="x", max_retries=0, timeout=20)

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
    folder = tmp_path_factory.mktemp("web")
    model = dir_of(kinds()[request.param], tiny_llama, folder / "model")

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
        yield Server(request.param, url, manager, store, Renderer(model))
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

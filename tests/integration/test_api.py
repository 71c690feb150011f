"""The web process against a scripted manager: what the openai SDK sends and gets, and what is recorded of it."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import httpx
import openai
import pytest

from lightning_rl.episode import EpisodeStart, Sampling, Task
from lightning_rl.errors import ServerError
from lightning_rl.store import Store
from rollout_server import messages as m
from rollout_server.admin_client import AdminClient
from rollout_server.api.config import WebConfig
from rollout_server.api.rendering.render import Renderer
from rollout_server.api.sampling import derive_seed
from tests.integration.scripted_manager import ScriptedManager, one_by_one, serving_web, tokens
from tests.unit.test_render import TOOL

END = 2
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "6*7"}}</tool_call>'


@dataclass
class Web:
    url: str
    manager: ScriptedManager
    store: Store
    renderer: Renderer

    def client(self, episode: str | None = None, key: str = "secret") -> openai.OpenAI:
        prefix = f"/e/{episode}" if episode else ""
        return openai.OpenAI(base_url=f"{self.url}{prefix}/v1", api_key=key, max_retries=0, timeout=60)

    def says(self, *texts: str, end: bool = True) -> None:
        """Answer the coming choices with these texts, token by token."""
        waiting = [self.renderer.encode(text) + ([END] if end else []) for text in texts]
        reason = "stop" if end else "length"
        self.manager.script = lambda submit: one_by_one(submit, [waiting.pop(0) for _ in range(submit.n)], reason)

    def begin(self, episode: str, **sampling: Any) -> openai.OpenAI:
        task = Task(id="t", input={})
        self.store.begin(EpisodeStart(id=episode, task=task, phase="train", sampling=Sampling(**sampling)))
        return self.client(episode)


@pytest.fixture(scope="module")
def renderer(tiny_llama: Path) -> Renderer:
    return Renderer(tiny_llama)


@dataclass
class Setting:
    model_dir: Path
    ipc_dir: Path

    def __call__(self, listen_fd: int) -> WebConfig:
        return WebConfig(
            ipc_dirs=[str(self.ipc_dir)],
            model_dir=str(self.model_dir),
            parent_pid=os.getpid(),
            kv_tokens=4096,
            served_name="tiny",
            aliases=["gpt-*"],
            listen_fd=listen_fd,
            admin_key="admin",
            api_key="secret",
            store=str(self.ipc_dir / "episodes.db"),
        )


@contextmanager
def fresh_web(setting: Setting, renderer: Renderer) -> Iterator[Web]:
    manager = ScriptedManager(setting.ipc_dir)
    with Store.open(setting.ipc_dir / "episodes.db") as store, serving_web(setting) as url:
        yield Web(url, manager, store, renderer)
    manager.stop()


@pytest.fixture(scope="module")
def shared_web(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory, renderer: Renderer) -> Iterator[Web]:
    with fresh_web(Setting(tiny_llama, tmp_path_factory.mktemp("web")), renderer) as web:
        yield web


@pytest.fixture
def web(shared_web: Web) -> Web:
    """Tests share the server; each has episodes of its own and a manager that has heard nothing yet."""
    shared_web.manager.submitted.clear()
    shared_web.manager.cancelled.clear()
    return shared_web


def test_a_chat(web: Web) -> None:
    web.says("Grüße 世界")
    made = web.client().chat.completions.create(
        model="gpt-5", messages=HELLO, max_tokens=50, extra_body={"return_token_ids": True}
    )
    ids = [*web.renderer.encode("Grüße 世界"), END]
    assert made.choices[0].message.content == "Grüße 世界"
    assert made.choices[0].finish_reason == "stop"
    assert made.choices[0].message.tool_calls is None
    assert made.model == "tiny"
    assert made.model_extra is not None
    assert made.model_extra["prompt_token_ids"] == web.renderer.prompt(HELLO, [])
    assert made.choices[0].model_extra == {
        "stop_reason": None,
        "token_ids": ids,
        "weight_versions": [{"version": 3, "start": 0, "end": len(ids)}],
    }
    assert made.usage is not None
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (len(web.renderer.prompt(HELLO, [])), len(ids))
    sampling = web.manager.submitted[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.stop_ids) == (1.0, 1.0, 50, (END,))


def test_a_streamed_chat(web: Web) -> None:
    web.says("Grüße 世界")
    with web.client().chat.completions.create(
        model="tiny",
        messages=HELLO,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        extra_body={"return_token_ids": True},
    ) as stream:
        chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Grüße 世界"
    ids = [i for c in chunks if c.choices for i in (c.choices[0].model_extra or {}).get("token_ids", [])]
    assert ids == [*web.renderer.encode("Grüße 世界"), END]
    logprobs = [
        e.logprob for c in chunks if c.choices and c.choices[0].logprobs for e in c.choices[0].logprobs.content or []
    ]
    assert logprobs == [-i / 1000 for i in ids]
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(ids)


def test_tools_round_trip_and_extend(web: Web) -> None:
    client = web.begin("ep-1", seed=5, max_tokens=40, temperature=0.5)
    messages: list[Any] = [{"role": "user", "content": "6*7?"}]
    web.says(f"Let me see. {CALL}", "It is 42.")
    first = client.chat.completions.create(
        model="tiny", messages=messages, tools=[TOOL], temperature=0.1, max_tokens=100
    )
    choice = first.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    assert choice.message.tool_calls is not None
    call = choice.message.tool_calls[0]
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("calculator", {"expression": "6*7"})
    messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": "42"}]
    second = client.chat.completions.create(model="tiny", messages=messages, tools=[TOOL])
    assert second.choices[0].message.content == "It is 42."

    one, two = web.manager.submitted
    assert (one.sampling.temperature, one.sampling.max_tokens, one.sampling.seed) == (0.5, 40, derive_seed(5, 0, 0))
    assert (two.sampling.temperature, two.sampling.max_tokens, two.sampling.seed) == (0.5, 40, derive_seed(5, 1, 0))
    episode = web.store.episode("ep-1")
    a, b = episode.calls
    assert (a.index, b.index, a.parent_id, b.parent_id) == (0, 1, None, a.id)
    assert a.prompt_ids == one.prompt_ids
    assert b.prompt_ids[: len(a.prompt_ids) + len(a.sampled_ids)] == a.prompt_ids + a.sampled_ids
    assert web.renderer.decode(b.prompt_ids, special=True).endswith(
        "</tool_call><|im_end|>\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n"
    )
    assert a.sampled_ids == [*web.renderer.encode(f"Let me see. {CALL}"), END]
    assert a.logprobs == pytest.approx([-i / 1000 for i in a.sampled_ids])
    assert a.versions == [3] * len(a.sampled_ids)
    assert (a.finish_reason, b.finish_reason) == ("tool_calls", "stop")
    assert a.temperature == 0.5
    assert a.request["max_tokens"] == 100
    assert a.response["tool_calls"][0]["id"] == call.id
    (span,) = episode.spans
    assert (span.kind, span.name) == ("tool", "calculator")
    assert span.attributes["arguments"] == {"expression": "6*7"}
    assert span.attributes["result"] == "42"
    assert span.attributes["call_id"] == a.id
    assert a.ended_at <= span.started_at <= span.ended_at <= b.ended_at


def test_streamed_tool_calls_are_those_recorded(web: Web) -> None:
    client = web.begin("ep-2")
    web.says(f"So: {CALL}\n{CALL}")
    with client.chat.completions.create(model="tiny", messages=HELLO, tools=[TOOL], stream=True) as stream:
        choices = [chunk.choices[0] for chunk in stream]
    calls = [call for choice in choices for call in choice.delta.tool_calls or []]
    assert "".join(choice.delta.content or "" for choice in choices) == "So:"
    assert [call.index for call in calls] == [0, 1]
    assert choices[-1].finish_reason == "tool_calls"
    recorded = web.store.episode("ep-2").calls[0].response
    assert [call.id for call in calls] == [call["id"] for call in recorded["tool_calls"]]
    assert recorded["content"] == "So:"


def test_malformed_tool_calls_stay_content(web: Web) -> None:
    text = "<tool_call>{'name': 'calculator'}</tool_call>"
    web.says(text)
    made = web.client().chat.completions.create(model="tiny", messages=HELLO, tools=[TOOL])
    assert made.choices[0].message.content == text
    assert made.choices[0].finish_reason == "stop"


def test_tool_choice_none_and_one_call_at_a_time(web: Web) -> None:
    create = web.client().chat.completions.create
    web.says(CALL, CALL + CALL)
    assert create(model="tiny", messages=HELLO, tools=[TOOL], tool_choice="none").choices[0].message.content == CALL
    one = create(model="tiny", messages=HELLO, tools=[TOOL], parallel_tool_calls=False).choices[0]
    assert len(one.message.tool_calls or []) == 1
    assert (one.finish_reason, one.model_extra, one.message.content) == ("tool_calls", {"stop_reason": None}, None)
    tricky = '<tool_call>{"name": "calculator", "arguments": {"expression": "</tool_call>"}}</tool_call>'
    web.says(tricky + CALL)
    (call,) = (
        create(model="tiny", messages=HELLO, tools=[TOOL], parallel_tool_calls=False).choices[0].message.tool_calls
        or ()
    )
    assert call.function.arguments == '{"expression": "</tool_call>"}'  # type: ignore[union-attr]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_cut_text_and_tokens(web: Web, stream: bool) -> None:
    client = web.begin(f"ep-stop-{stream}")
    ids = web.renderer.encode("one two STOP three four")
    web.manager.script = lambda submit: [tokens(submit, ids[:3]), tokens(submit, ids[3:])]
    made: Any = client.chat.completions.create(model="tiny", messages=HELLO, stop=["STOP", "zzz"], stream=stream)
    text = "".join(c.choices[0].delta.content or "" for c in made) if stream else made.choices[0].message.content
    assert text == "one two "
    (call,) = web.store.episode(f"ep-stop-{stream}").calls
    assert web.renderer.decode(call.sampled_ids) == "one two STOP"
    assert call.finish_reason == "stop"
    wait_for(lambda: web.manager.cancelled == [web.manager.submitted[0].request_id])


@pytest.mark.parametrize("stream", [False, True])
def test_n_choices_are_one_request_to_the_engine(web: Web, stream: bool) -> None:
    episode = f"ep-n-{stream}"
    client = web.begin(episode, seed=1)
    web.says("a", "b c d e", "c")
    made: Any = client.chat.completions.create(model="tiny", messages=HELLO, n=3, stream=stream)
    if stream:
        texts = ["", "", ""]
        for chunk in made:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        assert texts == ["a", "b c d e", "c"]
    else:
        assert [choice.message.content for choice in made.choices] == ["a", "b c d e", "c"]
        assert [choice.index for choice in made.choices] == [0, 1, 2]
        assert made.usage.prompt_tokens == len(web.manager.submitted[0].prompt_ids)
    assert [(s.n, s.sampling.seed) for s in web.manager.submitted] == [(3, derive_seed(1, 0, 0))]
    calls = sorted(web.store.episode(episode).calls, key=lambda call: call.index)
    assert [(call.index, call.response["content"]) for call in calls] == [(0, "a"), (1, "b c d e"), (2, "c")]
    web.says("d")
    client.chat.completions.create(model="tiny", messages=HELLO)
    assert web.manager.submitted[-1].sampling.seed == derive_seed(1, 3, 0)
    assert web.manager.cancelled == []


def test_one_choice_that_stops_does_not_end_the_others(web: Web) -> None:
    """The request is cancelled only once every choice has met its stop string or its end."""
    client = web.begin("ep-n-stop")
    ids = [web.renderer.encode(text) for text in ("one STOP two", "a b c d e f", "x STOP y")]
    web.manager.script = lambda submit: [
        message for message in one_by_one(submit, ids) if message.index != 2 or message.finish_reason is None
    ]
    made = client.chat.completions.create(model="tiny", messages=HELLO, n=3, stop="STOP")
    assert [choice.message.content for choice in made.choices] == ["one ", "a b c d e f", "x "]
    assert [choice.finish_reason for choice in made.choices] == ["stop"] * 3
    wait_for(lambda: web.manager.cancelled == [web.manager.submitted[0].request_id])


def test_every_prompt_is_a_request_of_n_choices(web: Web) -> None:
    web.says("a", "b", "c", "d")
    made = web.client().completions.create(model="tiny", prompt=["p", "q"], n=2, seed=4)
    assert [choice.text for choice in made.choices] == ["a", "b", "c", "d"]
    assert [(s.n, s.sampling.seed) for s in web.manager.submitted] == [(2, derive_seed(4, p)) for p in (0, 1)]


def test_a_failure_ends_all_choices_and_keeps_what_they_had(web: Web) -> None:
    client = web.begin("ep-n-fail")
    web.manager.script = lambda submit: [
        tokens(submit, [100], "stop", index=1),
        tokens(submit, [101], index=0),
        m.Failed(request_id=submit.request_id, code="aborted", message="new weights"),
    ]
    with pytest.raises(openai.InternalServerError, match="new weights") as caught:
        client.chat.completions.create(model="tiny", messages=HELLO, n=2)
    assert (caught.value.status_code, caught.value.code) == (503, "aborted")
    wait_for(lambda: web.store.call_count("ep-n-fail") == 2)
    calls = sorted(web.store.episode("ep-n-fail").calls, key=lambda call: call.index)
    assert [(call.sampled_ids, call.finish_reason) for call in calls] == [([101], "abort"), ([100], "stop")]
    assert web.manager.cancelled == []


def test_requests_without_seed_differ_and_with_seed_agree(web: Web) -> None:
    web.says(*"abcd")
    for seed in (None, None, 7, 7):
        web.client().chat.completions.create(model="tiny", messages=HELLO, seed=seed)
    seeds = [submit.sampling.seed for submit in web.manager.submitted]
    assert seeds[0] != seeds[1]
    assert seeds[2] == seeds[3]


def test_completions(web: Web) -> None:
    web.says("x y", "z", end=False)
    made = web.client().completions.create(
        model="tiny", prompt=["a b", "c"], logprobs=1, extra_body={"return_token_ids": True}
    )
    assert [choice.text for choice in made.choices] == ["x y", "z"]
    assert made.choices[0].finish_reason == "length"
    assert made.choices[0].logprobs is not None
    assert made.choices[0].logprobs.tokens == ["x", " y"]
    assert made.choices[0].logprobs.text_offset == [0, 1]
    assert (made.choices[0].model_extra or {})["prompt_token_ids"] == web.renderer.encode("a b")
    assert web.manager.submitted[0].sampling.max_tokens == 16
    web.says("again")
    with web.client().completions.create(model="tiny", prompt=[5, 6, 7], stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == "again"
    assert web.manager.submitted[-1].prompt_ids == [5, 6, 7]


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"presence_penalty": -2.5}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 1e300}, "repetition_penalty"),
        ({"top_k": 2**63}, "top_k"),
        ({"priority": 10**30}, "priority"),
        ({"stop_token_ids": [2**64]}, "stop_token_ids.0"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}}, "response_format"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"five": 1}}, "logit_bias.five"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"made_up": 1}, "made_up"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes", "tools": [TOOL]}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}, "tools": [TOOL]}, "tool_choice"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"temperature": -1}, "temperature"),
        ({"n": 0}, "n"),
        ({"stop": 5}, "stop"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"messages": [{"role": "wizard", "content": ""}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
    ],
)
def test_what_is_not_served_is_refused_by_name(web: Web, extra: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        web.client().chat.completions.create(model="tiny", messages=HELLO, extra_body=extra)
    assert caught.value.param == param
    assert param in caught.value.message
    assert caught.value.code is not None


def test_a_misspelt_parameter_is_refused_with_the_right_name(web: Web) -> None:
    with pytest.raises(openai.BadRequestError, match="'max_completion_token'; did you mean 'max_completion_tokens'"):
        web.client().chat.completions.create(model="tiny", messages=HELLO, extra_body={"max_completion_token": 5})


def test_a_call_says_what_restricted_its_sampling(web: Web) -> None:
    """As the engine applied it: the recipe's top_p counts, and replaces the client's."""
    web.says('{"a": 1}', "ok", "ok")
    web.begin("free").chat.completions.create(
        model="tiny", messages=HELLO, temperature=0.5, response_format={"type": "json_object"}
    )
    client = web.begin("imposed", top_p=0.5, temperature=1.0)
    client.chat.completions.create(model="tiny", messages=HELLO, frequency_penalty=0.5)
    unrestricted = web.begin("unrestricted", top_p=1.0, temperature=1.0)
    unrestricted.chat.completions.create(model="tiny", messages=HELLO, top_p=0.1, temperature=0.5)
    recorded = [web.store.episode(id).calls[0].restricted for id in ("free", "imposed", "unrestricted")]
    assert recorded == [["grammar"], ["top_p", "penalties"], []]


def test_sampling_parameters_reach_the_engine(web: Web) -> None:
    web.says("ok")
    web.client().chat.completions.create(
        model="tiny",
        messages=HELLO,
        temperature=0.7,
        top_p=0.9,
        frequency_penalty=0.5,
        presence_penalty=-1,
        logit_bias={"5": 1, "0": -100},
        extra_body={"repetition_penalty": 1.2, "top_k": 40, "min_p": 0.05, "priority": -3},
    )
    (submit,) = web.manager.submitted
    sampling = submit.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.7, 0.9, 40, 0.05)
    assert (sampling.frequency_penalty, sampling.presence_penalty, sampling.repetition_penalty) == (0.5, -1.0, 1.2)
    assert sampling.logit_bias == {5: 1.0, 0: -100.0}
    assert submit.priority == -3


def test_harmless_fields_and_values_are_let_through(web: Web) -> None:
    web.says("ok")
    web.client().chat.completions.create(
        model="tiny",
        messages=[{"role": "developer", "content": [{"type": "text", "text": "S"}]}, *HELLO],
        frequency_penalty=0,
        response_format={"type": "text"},
        user="u",
        metadata={"a": "b"},
        store=False,
        parallel_tool_calls=True,
        extra_body={"top_k": 5, "min_p": 0.1, "ignore_eos": True, "stop_token_ids": [9], "logit_bias": None},
    )
    submit = web.manager.submitted[0]
    assert submit.prompt_ids == web.renderer.prompt([{"role": "system", "content": "S"}, *HELLO], [])
    assert (submit.sampling.top_k, submit.sampling.min_p, submit.sampling.stop_ids) == (5, 0.1, (9,))


@pytest.mark.parametrize("stream", [False, True])
def test_generate_with_all_that_clients_send(web: Web, stream: bool) -> None:
    """Names that the client gives come back; minima reach the engine."""
    web.says("one", "two", "three", "four")
    params = {"max_new_tokens": 9, "min_new_tokens": 2, "stop": None, "skip_special_tokens": True, "n": 2}
    body = {
        "input_ids": [[5, 6], [7]],
        "sampling_params": {**params, "spaces_between_special_tokens": False, "no_stop_trim": False},
        "rid": ["first", "second"],
        "logprob_start_len": -1,
        "return_logprob": True,
        "return_text_in_logprobs": False,
        "stream": stream,
    }
    headers = {"authorization": "Bearer secret"}
    reply = httpx.post(f"{web.url}/generate", json=body, headers=headers, timeout=60)
    assert reply.status_code == 200, reply.text
    if stream:
        lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
        answers = [json.loads(line) for line in lines[:-1]]
    else:
        answers = reply.json()
    assert {(answer["index"], answer["meta_info"]["id"]) for answer in answers} == {
        (0, "first"),
        (1, "first"),
        (2, "second"),
        (3, "second"),
    }
    assert [submit.sampling.min_tokens for submit in web.manager.submitted] == [2, 2]
    for wrong, param in (({"rid": ["one"]}, "rid"), ({"rid": "x" * 257}, "rid")):
        refused = httpx.post(f"{web.url}/generate", json={**body, **wrong}, headers=headers, timeout=60)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_errors_are_the_sdks_own(web: Web) -> None:
    chat = web.client().chat.completions
    with pytest.raises(openai.NotFoundError, match=r"'other'.*tiny, gpt-\*") as missing:
        chat.create(model="other", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        web.client(key="wrong").chat.completions.create(model="tiny", messages=HELLO)
    with pytest.raises(openai.NotFoundError, match="no episode 'nobody'"):
        web.client("nobody").chat.completions.create(model="tiny", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match=r"has 3\d\d\d tokens, .* may have 2048") as long:
        chat.create(model="tiny", messages=[{"role": "user", "content": "Hello " * 3000}])
    assert long.value.code == "context_length_exceeded"
    for code, kind in (("too_large", openai.BadRequestError), ("worker_failed", openai.InternalServerError)):
        web.manager.script = lambda submit, code=code: [  # type: ignore[misc]
            m.Failed(request_id=submit.request_id, code=code, message="so it is")
        ]
        for stream in (False, True):
            with pytest.raises(kind, match="so it is"):
                chat.create(model="tiny", messages=HELLO, stream=stream)


def test_a_failure_half_way_ends_the_stream_with_an_error(web: Web) -> None:
    web.manager.script = lambda submit: [
        tokens(submit, [100]),
        m.Failed(request_id=submit.request_id, code="worker_failed", message="so it is"),
    ]
    client = web.begin("ep-fail")
    with (
        pytest.raises(openai.APIError, match="so it is"),
        client.chat.completions.create(model="tiny", messages=HELLO, stream=True) as stream,
    ):
        list(stream)
    (call,) = web.store.episode("ep-fail").calls
    assert (call.sampled_ids, call.finish_reason) == ([100], "abort")


def test_every_http_error_has_openais_shape(web: Web) -> None:
    key = {"Authorization": "Bearer secret"}
    answers = [
        (httpx.get(f"{web.url}/nowhere"), 404),
        (httpx.get(f"{web.url}/v1/chat/completions", headers=key), 405),
        (httpx.post(f"{web.url}/v1/chat/completions", headers=key, content=b"{"), 400),
        (httpx.post(f"{web.url}/v1/chat/completions", headers=key, content=b"[]"), 400),
        (httpx.post(f"{web.url}/v1/chat/completions", headers=key, json={}), 400),
        (httpx.post(f"{web.url}/v1/completions", headers=key, json={"model": "tiny", "prompt": ""}), 400),
        (
            httpx.post(f"{web.url}/v1/completions", headers=key, json={"model": "tiny", "prompt": "a", "echo": 3}),
            400,
        ),
        (httpx.get(f"{web.url}/v1/models"), 401),
        (httpx.get(f"{web.url}/stats", headers=key), 401),
    ]
    for answer, status in answers:
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_client_that_goes_away_is_cancelled_and_recorded(web: Web) -> None:
    client = web.begin("ep-gone")
    web.manager.script = lambda submit: [tokens(submit, [100, 101])]
    stream = client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
    next(iter(stream))
    stream.close()
    wait_for(lambda: len(web.manager.cancelled) == 1)
    asyncio.run(ask_and_leave(web, "ep-gone"))
    wait_for(lambda: len(web.manager.cancelled) == 2)
    wait_for(lambda: web.store.call_count("ep-gone") == 2)
    calls = web.store.episode("ep-gone").calls
    assert [(c.sampled_ids, c.finish_reason) for c in calls] == [([100, 101], "abort")] * 2


async def ask_and_leave(web: Web, episode: str) -> None:
    """As soon as the request has reached the manager."""
    already = len(web.manager.submitted)
    async with openai.AsyncOpenAI(base_url=f"{web.url}/e/{episode}/v1", api_key="secret", max_retries=0) as client:
        asking = asyncio.ensure_future(client.chat.completions.create(model="tiny", messages=HELLO))
        while len(web.manager.submitted) == already:
            assert not asking.done()
            await asyncio.sleep(0.01)
        asking.cancel()
        await asyncio.wait([asking])


def test_a_dead_manager_fails_those_who_wait(tiny_llama: Path, tmp_path: Path, renderer: Renderer) -> None:
    failures: list[openai.APIError] = []

    def ask(web: Web) -> None:
        with pytest.raises(openai.InternalServerError) as caught:
            web.client().chat.completions.create(model="tiny", messages=HELLO)
        failures.append(caught.value)

    with fresh_web(Setting(tiny_llama, tmp_path), renderer) as web:
        thread = threading.Thread(target=ask, args=(web,))
        thread.start()
        wait_for(lambda: len(web.manager.submitted) == 1)
        web.manager.stop()
        thread.join(60)
    assert failures[0].code == "engine_unavailable"


def test_shutting_down_fails_those_who_wait_and_keeps_their_tokens(
    tiny_llama: Path, tmp_path: Path, renderer: Renderer
) -> None:
    with fresh_web(Setting(tiny_llama, tmp_path), renderer) as web:
        client = web.begin("ep")
        web.manager.script = lambda submit: [tokens(submit, [100])]
        stream = client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
        next(iter(stream))
    with pytest.raises(openai.APIError, match="shutting down"):
        list(stream)
    with Store.open(tmp_path / "episodes.db") as store:
        (call,) = store.episode("ep").calls
    assert (call.sampled_ids, call.finish_reason) == ([100], "abort")


def test_calls_go_on_counting_after_a_restart(tiny_llama: Path, tmp_path: Path, renderer: Renderer) -> None:
    for round_ in range(2):
        with fresh_web(Setting(tiny_llama, tmp_path), renderer) as web:
            web.says("a")
            client = web.begin("ep", seed=3) if round_ == 0 else web.client("ep")
            client.chat.completions.create(model="tiny", messages=HELLO)
            assert [call.index for call in web.store.episode("ep").calls] == list(range(round_ + 1))
            assert web.manager.submitted[0].sampling.seed == derive_seed(3, round_, 0)


def test_the_trainers_routes(web: Web) -> None:
    admin = AdminClient(web.url, "admin")
    assert admin.update_weights("/some/where", 4) == "sum-4"
    assert web.manager.changes.pop() == m.UpdateWeights(
        request_id=ANY, source=m.Directory(path="/some/where"), version=4
    )
    assert admin.score([[1, 2, 3], [4, 5]]) == [[-2.0, -3.0], [-5.0]]
    assert admin.stats() == {"version": 3.0}
    admin.health()
    with pytest.raises(ServerError, match="API key"):
        AdminClient(web.url, "secret").stats()
    assert web.client().models.list().data[0].id == "tiny"


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)

"""Agent frameworks against the real server with a real, small model: LangChain's standard tests, AutoGen's client and agents.

The model is too small to choose tools well by itself, so where a test depends on a choice it is made by constrained decoding:
`tool_choice` and `response_format`. Nothing else is adapted to the model.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.messages import ToolCallRequestEvent
from autogen_core.models import CreateResult, SystemMessage, UserMessage
from autogen_core.tools import FunctionTool
from autogen_ext.models.openai import OpenAIChatCompletionClient
from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests
from pydantic import BaseModel

from rollout_server.api.rendering.render import Renderer
from rollout_server.launch import RolloutServer
from tests.integration.scripted_manager import one_by_one
from tests.integration.test_api import END, Setting, fresh_web

MODEL = "smollm2-135m"


@pytest.fixture(scope="module")
def server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutServer]:
    with RolloutServer(
        smollm2,
        MODEL,
        "bfloat16",
        log_dir=tmp_path_factory.mktemp("frameworks"),
        aliases=["gpt-*"],
        kv_tokens=16384,
        device="cpu",
    ) as running:
        yield running


class TestLangChain(ChatModelIntegrationTests):
    """LangChain's own tests. The model repeats itself inside strings without a penalty, and calls a tool as often as it may."""

    @pytest.fixture(autouse=True)
    def _at(self, server: RolloutServer, request: pytest.FixtureRequest) -> None:
        self._url = f"{server.base_url}/v1"
        self._penalty = 1.1 if "structured" in request.node.name else 1.0
        self._choice = {"tool_choice": "required"} if "agent_loop" in request.node.name else {}
        # what is filled in is filled in to its end; of what is only said, the beginning will do
        self._tokens = 160 if any(word in request.node.name for word in ("tool", "structured", "agent")) else 24

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "model": "gpt-4o",
            "base_url": self._url,
            "api_key": "x",
            "temperature": 0,
            "max_tokens": self._tokens,
            "stream_usage": True,
            "max_retries": 0,
            "model_kwargs": {"parallel_tool_calls": False, **self._choice},
            "extra_body": {"repetition_penalty": self._penalty},
        }

    @property
    def model_override_value(self) -> str:
        return MODEL


def test_json_mode_gives_an_object_whatever_the_model(server: RolloutServer) -> None:
    """LangChain's test of it wants two keys by name, which the prompt alone does not get out of this model."""
    model = ChatOpenAI(
        model="gpt-4o",
        base_url=f"{server.base_url}/v1",
        api_key="x",  # type: ignore[arg-type]
        temperature=0,
        max_completion_tokens=160,
        extra_body={"repetition_penalty": 1.05},
    )
    said = model.bind(response_format={"type": "json_object"}).invoke(
        "Tell me a joke about cats. Return the result as a JSON with 'setup' and 'punchline' keys. "
        "Return nothing other than JSON."
    )
    assert said.response_metadata["finish_reason"] == "stop"
    assert isinstance(json.loads(str(said.content)), dict)


def autogen_client(url: str, key: str = "x") -> OpenAIChatCompletionClient:
    return OpenAIChatCompletionClient(
        model="gpt-4o",
        base_url=f"{url}/v1",
        api_key=key,
        temperature=0,
        max_tokens=64,
        model_info={
            "vision": False,
            "function_calling": True,
            "json_output": True,
            "structured_output": True,
            "family": "unknown",
            "multiple_system_messages": False,
        },
    )


async def weather(city: str) -> str:
    """The weather in a city."""
    return f"It rains in {city}."


class Animal(BaseModel):
    name: str
    legs: int


def test_autogens_client_streams_and_counts(server: RolloutServer) -> None:
    async def talk() -> tuple[CreateResult, list[str | CreateResult]]:
        client = autogen_client(server.base_url)
        said: list[Any] = [SystemMessage(content="Be brief."), UserMessage(content="Name a colour.", source="user")]
        whole = await client.create(said)
        streamed = [
            chunk
            async for chunk in client.create_stream(said, extra_create_args={"stream_options": {"include_usage": True}})
        ]
        await client.close()
        return whole, streamed

    whole, streamed = asyncio.run(talk())
    assert isinstance(whole.content, str)
    assert whole.finish_reason in ("stop", "length")
    last = streamed[-1]
    assert isinstance(last, CreateResult)
    assert last.content == whole.content == "".join(chunk for chunk in streamed if isinstance(chunk, str))
    assert last.usage == whole.usage
    assert whole.usage.completion_tokens > 0


def test_autogens_client_calls_tools_and_fills_schemas(server: RolloutServer) -> None:
    async def talk() -> tuple[CreateResult, CreateResult]:
        client = autogen_client(server.base_url)
        tool = FunctionTool(weather, description="The weather in a city.", name="weather")
        asked: list[Any] = [UserMessage(content="What is the weather in Paris?", source="user")]
        called = await client.create(asked, tools=[tool], tool_choice="required")
        filled = await client.create([UserMessage(content="Describe a cat.", source="user")], json_output=Animal)
        await client.close()
        return called, filled

    called, filled = asyncio.run(talk())
    assert called.finish_reason == "function_calls"
    assert [call.name for call in called.content if not isinstance(call, str)] == ["weather"] * len(called.content)
    assert isinstance(filled.content, str)
    Animal.model_validate_json(filled.content)


def test_an_autogen_agent_runs_its_tool(tiny_llama: Path, tmp_path: Path) -> None:
    """Against a scripted manager: what the model says is given, the way there and back is not."""
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'

    async def run(url: str) -> list[Any]:
        client = autogen_client(url, "secret")
        agent = AssistantAgent("helper", client, tools=[weather], reflect_on_tool_use=True)
        messages = list((await agent.run(task="What is the weather in Paris?")).messages)
        await client.close()
        return messages

    renderer = Renderer(tiny_llama)
    with fresh_web(Setting(tiny_llama, tmp_path), renderer) as web:
        said = [[*renderer.encode(text), END] for text in (call, "Take an umbrella.")]
        web.manager.script = lambda submit: one_by_one(submit, [said.pop(0)])
        messages = asyncio.run(run(web.url))
        first, second = (submit.prompt_ids for submit in web.manager.submitted)
    calls = [call for message in messages if isinstance(message, ToolCallRequestEvent) for call in message.content]
    assert [(call.name, call.arguments) for call in calls] == [("weather", '{"city": "Paris"}')]
    assert messages[-1].content == "Take an umbrella."
    sampled = [*renderer.encode(call), END]
    assert any(second[at : at + len(sampled)] == sampled for at in range(len(second)))  # though the tools are gone
    assert second != first
    assert "It rains in Paris." in renderer.decode(second)

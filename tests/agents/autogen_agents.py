"""AutoGen agents: one, a team, a team in a team, as their users write them. `task`: instructions, question, stream, tools."""

from __future__ import annotations

from typing import Any

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.base import TaskResult, Team
from autogen_agentchat.conditions import MaxMessageTermination, TextMentionTermination
from autogen_agentchat.teams import RoundRobinGroupChat, Swarm
from autogen_ext.models.openai import OpenAIChatCompletionClient


async def weather(city: str) -> str:
    """The weather in a city."""
    return f"It rains in {city}."


def client_of(task: dict[str, Any]) -> OpenAIChatCompletionClient:
    return OpenAIChatCompletionClient(model="gpt-4o")


def member(name: str, task: dict[str, Any], client: OpenAIChatCompletionClient, **more: Any) -> AssistantAgent:
    return AssistantAgent(
        name,
        client,
        description=name,
        system_message=task["instructions"],
        tools=[weather] if task["tools"] else None,
        reflect_on_tool_use=task["tools"],
        model_client_stream=task["stream"],
        **more,
    )


async def finished(runner: AssistantAgent | Team, task: dict[str, Any]) -> str:
    result: Any = None
    if task["stream"]:
        async for event in runner.run_stream(task=task["question"]):
            result = event
    else:
        result = await runner.run(task=task["question"])
    assert isinstance(result, TaskResult)
    return str(result.messages[-1].content)  # type: ignore[union-attr]


async def single(task: dict[str, Any]) -> str:
    return await finished(member("helper", task, client_of(task)), task)


async def team(task: dict[str, Any]) -> str:
    client = client_of(task)
    members: list[Any] = [member(name, task, client) for name in ("writer", "critic")]
    return await finished(RoundRobinGroupChat(members, termination_condition=MaxMessageTermination(3)), task)


async def nested(task: dict[str, Any]) -> str:
    client = client_of(task)
    inner: list[Any] = [member(name, task, client) for name in ("writer", "critic")]
    authors = RoundRobinGroupChat(inner, name="authors", termination_condition=MaxMessageTermination(3))
    outer: list[Any] = [authors, member("editor", task, client)]
    return await finished(RoundRobinGroupChat(outer, termination_condition=MaxMessageTermination(4)), task)


async def swarm(task: dict[str, Any]) -> str:
    client = client_of(task)
    desk = AssistantAgent("desk", client, handoffs=["expert"], system_message=task["instructions"])
    expert = AssistantAgent("expert", client, system_message=task["expert"])
    return await finished(Swarm([desk, expert], termination_condition=TextMentionTermination("Fine.")), task)

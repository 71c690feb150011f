"""Agents on OpenAI's Agents SDK, as its users write them. `task`: instructions, expert, question, stream, tools."""

from __future__ import annotations

from typing import Any

from agents import (
    Agent,
    GuardrailFunctionOutput,
    RunConfig,
    Runner,
    custom_span,
    function_tool,
    input_guardrail,
    trace,
)


@function_tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"It rains in {city}."


@function_tool
def broken(city: str) -> str:
    """The weather in a city, from a station that is down."""
    raise RuntimeError(f"no answer from {city}")


@input_guardrail
async def polite(context: Any, agent: Any, said: Any) -> GuardrailFunctionOutput:
    return GuardrailFunctionOutput(output_info=None, tripwire_triggered=False)


async def answer(agent: Agent[Any], task: dict[str, Any], **options: Any) -> str:
    if task["stream"]:
        run = Runner.run_streamed(agent, task["question"], **options)
        async for _ in run.stream_events():
            pass
        return str(run.final_output)
    return str((await Runner.run(agent, task["question"], **options)).final_output)


async def single(task: dict[str, Any]) -> str:
    tools: Any = [weather] if task["tools"] else []
    return await answer(Agent("helper", instructions=task["instructions"], model="gpt-4o", tools=tools), task)


async def desk(task: dict[str, Any]) -> str:
    """Hands over to an expert; a guardrail watches what comes in."""
    tools: Any = [weather] if task["tools"] else []
    expert = Agent("expert", instructions=task["expert"], model="gpt-4o", tools=tools)
    front = Agent(
        "desk", instructions=task["instructions"], model="gpt-4o", handoffs=[expert], input_guardrails=[polite]
    )
    return await answer(front, task)


async def untraced(task: dict[str, Any]) -> str:
    """As people do who serve a model themselves."""
    agent = Agent("helper", instructions=task["instructions"], model="gpt-4o", tools=[weather])
    return await answer(agent, task, run_config=RunConfig(tracing_disabled=True))


async def unlucky(task: dict[str, Any]) -> str:
    with trace("work"), custom_span("preparation", {"step": 1}):
        pass
    return await answer(Agent("helper", instructions=task["instructions"], model="gpt-4o", tools=[broken]), task)

"""An agent that its author has instrumented with OpenTelemetry, its own provider and all."""

from __future__ import annotations

from typing import Any

from openai import AsyncOpenAI
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

tracer = trace.get_tracer("early")
PROVIDER = TracerProvider()


def weather(city: str) -> str:
    with tracer.start_as_current_span(
        "weather", attributes={"openinference.span.kind": "TOOL", "tool.name": "weather"}
    ):
        return f"It rains in {city}."


async def agent(task: dict[str, Any]) -> str:
    trace.set_tracer_provider(PROVIDER)
    attributes = {"gen_ai.operation.name": "invoke_agent", "gen_ai.agent.name": "helper"}
    with trace.get_tracer("late").start_as_current_span("invoke_agent helper", attributes=attributes):
        if task["tools"]:
            weather("Paris")
        with tracer.start_as_current_span("thinking"):
            return await think(task)


async def think(task: dict[str, Any]) -> str:
    asked: list[Any] = [{"role": "user", "content": task["instructions"] + task["question"]}]
    with tracer.start_as_current_span("chat gpt-4o", attributes={"gen_ai.operation.name": "chat"}) as span:
        async with AsyncOpenAI() as client:
            made = await client.chat.completions.create(model="gpt-4o", messages=asked)
        span.set_attribute("gen_ai.response.id", made.id)
    return made.choices[0].message.content or ""

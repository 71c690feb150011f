"""Agents on the plain openai SDK, as its users write them. `task`: instructions, question, stream, tools."""

from __future__ import annotations

import json
from typing import Any

from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CHAT_TOOL: Any = {"type": "function", "function": {"name": "weather", "description": "", "parameters": PARAMETERS}}
RESPONSES_TOOL: Any = {
    "type": "function",
    "name": "weather",
    "description": "",
    "parameters": PARAMETERS,
    "strict": False,
}


class Animal(BaseModel):
    name: str
    legs: int


def weather(city: str) -> str:
    return f"It rains in {city}."


def messages_of(task: dict[str, Any]) -> list[Any]:
    return [{"role": "system", "content": task["instructions"]}, {"role": "user", "content": task["question"]}]


def with_results(messages: list[Any], reply: Any) -> list[Any]:
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": weather(**json.loads(call.function.arguments))}
        for call in reply.tool_calls
    ]
    return [*messages, reply.model_dump(exclude_none=True), *results]


def chat(task: dict[str, Any]) -> str:
    client, messages = OpenAI(), messages_of(task)
    while True:
        if task["stream"]:
            with client.chat.completions.create(model="gpt-4o", messages=messages, stream=True) as stream:
                return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        tools: Any = {"tools": [CHAT_TOOL]} if task["tools"] else {}
        reply = client.chat.completions.create(model="gpt-4o", messages=messages, **tools).choices[0].message
        if not reply.tool_calls:
            return reply.content or ""
        messages = with_results(messages, reply)


async def async_chat(task: dict[str, Any]) -> str:
    messages = messages_of(task)
    async with AsyncOpenAI() as client:
        while True:
            if task["stream"]:
                stream = await client.chat.completions.create(model="gpt-4o", messages=messages, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
            tools: Any = {"tools": [CHAT_TOOL]} if task["tools"] else {}
            made = await client.chat.completions.create(model="gpt-4o", messages=messages, **tools)
            reply = made.choices[0].message
            if not reply.tool_calls:
                return reply.content or ""
            messages = with_results(messages, reply)


def responses(task: dict[str, Any]) -> str:
    client = OpenAI()
    said: list[Any] = [{"role": "user", "content": task["question"]}]
    while True:
        tools: Any = {"tools": [RESPONSES_TOOL]} if task["tools"] else {}
        asked: Any = {"model": "gpt-4o", "instructions": task["instructions"], "input": said, **tools}
        if task["stream"]:
            with client.responses.stream(**asked) as stream:
                return stream.get_final_response().output_text
        made = client.responses.create(**asked)
        calls = [item for item in made.output if item.type == "function_call"]
        if not calls:
            return made.output_text
        said += [item.model_dump(exclude_none=True) for item in made.output]
        said += [
            {"type": "function_call_output", "call_id": call.call_id, "output": weather(**json.loads(call.arguments))}
            for call in calls
        ]


def structured(task: dict[str, Any]) -> dict[str, Any]:
    client, messages = OpenAI(), messages_of(task)
    if task["stream"]:
        with client.chat.completions.stream(model="gpt-4o", messages=messages, response_format=Animal) as stream:
            parsed = stream.get_final_completion().choices[0].message.parsed
    else:
        made = client.chat.completions.parse(model="gpt-4o", messages=messages, response_format=Animal)
        parsed = made.choices[0].message.parsed
    assert parsed is not None
    return parsed.model_dump()


def raw(task: dict[str, Any]) -> str:
    client, messages = OpenAI(), messages_of(task)
    if task["stream"]:
        with client.chat.completions.with_streaming_response.create(model="gpt-4o", messages=messages) as response:
            body = b"".join(response.iter_bytes())
    else:
        body = client.chat.completions.with_raw_response.create(model="gpt-4o", messages=messages).content
    return json.loads(body)["choices"][0]["message"]["content"]

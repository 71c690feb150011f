"""The agent that `lrl bench tracing` runs, with the openai SDK and nothing else, and the process around it.

`python tracing_agent.py SETTINGS` (JSON) reads one `{"episodes": …, "at_once": …}` a line and answers each with one line: the
seconds of every call, those of the whole, and the processor's. It imports nothing of ours unless it is traced, so that tracers
of others can run the very same agent in an environment of their own.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

from openai import AsyncOpenAI

TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds two numbers.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
        },
    }
]
Solve = Callable[[dict[str, Any]], Awaitable[list[float]]]


def agent(settings: dict[str, Any]) -> Solve:
    """Asks `calls` times; after each answer a tool's result is appended. It returns the seconds of each call."""
    client = AsyncOpenAI(base_url=f"{settings['url']}/v1", api_key="bench", max_retries=0, timeout=600)
    fixed: Any = {"model": settings["model"], "tools": TOOLS, "max_tokens": 64, "extra_body": settings["extra"]}

    async def solve(task: dict[str, Any]) -> list[float]:
        messages: list[Any] = [
            {"role": "system", "content": "You add numbers with the tool."},
            {"role": "user", "content": f"Task {task['id']}: what is 17 + {task['number']}, step by step?"},
        ]
        seconds = []
        for _ in range(settings["calls"]):
            began = time.perf_counter()
            reply = await client.chat.completions.create(messages=messages, **fixed)
            seconds.append(time.perf_counter() - began)
            said = reply.choices[0].message
            messages.append(said.model_dump(exclude_none=True))
            for use in said.tool_calls or []:
                messages.append({"role": "tool", "tool_call_id": use.id, "content": "59"})
            if not said.tool_calls:
                messages.append({"role": "user", "content": "Go on."})
        return seconds

    return solve


async def play(solve: Solve, episodes: int, at_once: int, first: int) -> dict[str, Any]:
    tasks = iter(range(first, first + episodes))
    calls: list[float] = []

    async def worker() -> None:
        for number in tasks:
            calls.extend(await solve({"id": f"task-{number}", "number": number}))

    began, processor = time.perf_counter(), time.process_time()
    await asyncio.gather(*(worker() for _ in range(at_once)))
    return {
        "calls": calls,
        "seconds": time.perf_counter() - began,
        "processor_s": time.process_time() - processor,
    }


async def take_orders(solve: Solve) -> None:
    """One play a line of stdin, until it ends."""
    played = 0
    print("ready", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        order = json.loads(line)
        gc.collect()
        print(json.dumps(await play(solve, order["episodes"], order["at_once"], played)), flush=True)
        played += order["episodes"]


def main() -> None:
    settings = json.loads(sys.argv[1])
    solve = agent(settings)
    if settings["traced"]:
        import lightning_rl as lrl

        os.environ |= {"LRL_STORE": settings["store"], "LRL_SERVER": settings["url"]}
        solve = lrl.rollout(solve)
    asyncio.run(take_orders(solve))


if __name__ == "__main__":
    main()

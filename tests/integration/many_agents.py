"""Agents that run many at once, and three ways to run them so. Every prompt, span and reward of one holds its mark."""

import asyncio
import itertools
import json
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from openai import AsyncOpenAI, OpenAI

import lightning_rl as lrl

STEPS = 2
STALE = "stale"
"""An episode whose path is in a client that everybody uses."""


class Clients:
    """What agents share: clients that were made before any rollout, one of them with another episode's path."""

    def __init__(self, url: str) -> None:
        self.shared = OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0)
        self.stale = OpenAI(base_url=f"{url}/e/{STALE}/v1", api_key="k", max_retries=0)
        self.shared_async = AsyncOpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0)
        self.stale_async = AsyncOpenAI(base_url=f"{url}/e/{STALE}/v1", api_key="k", max_retries=0)
        self.http = httpx.Client(verify=False)
        self.pool = ThreadPoolExecutor(8)


def asked(mark: str, step: str) -> dict[str, Any]:
    return {"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": f"{mark} {step}"}]}


@lrl.rollout
def agent(mark: str, clients: Clients) -> str:
    draw = random.Random(mark)
    own = OpenAI(max_retries=0)

    def ask(at: int, name: str) -> None:
        client = draw.choice([clients.shared, clients.stale, own])
        if at % 2:
            client.chat.completions.create(**asked(mark, name))
        else:
            with client.chat.completions.create(**asked(mark, name), stream=True) as stream:
                list(stream)

    for at in range(STEPS):
        name = f"{mark}-step{at}"
        with lrl.span(name, kind="tool"):
            time.sleep(draw.random() / 50)
            ask(at, name)
            lrl.reward(float(mark[1:]), name)
            list(clients.pool.map(ask, [1], [name]))
    with lrl.span(f"{mark}-plain"):
        clients.http.post(f"{lrl.base_url()}/chat/completions", json=asked(mark, f"{mark}-plain")).raise_for_status()
    lrl.reward(float(mark[1:]), "whole")
    return mark


@lrl.rollout
async def agent_async(mark: str, clients: Clients) -> str:
    draw = random.Random(mark)
    async with AsyncOpenAI(max_retries=0) as own, httpx.AsyncClient(verify=False) as http:

        async def step(at: int) -> None:
            name = f"{mark}-step{at}"
            with lrl.span(name, kind="tool"):
                await asyncio.sleep(draw.random() / 50)
                client = draw.choice([clients.shared_async, clients.stale_async, own])
                if at % 2:
                    await client.chat.completions.create(**asked(mark, name))
                else:
                    async with await client.chat.completions.create(**asked(mark, name), stream=True) as stream:
                        async for _ in stream:
                            pass
                lrl.reward(float(mark[1:]), name)
                await asyncio.to_thread(clients.shared.chat.completions.create, **asked(mark, name))

        await asyncio.gather(*(step(at) for at in range(STEPS)))
        with lrl.span(f"{mark}-plain"):
            url = f"{lrl.base_url()}/chat/completions"
            (await http.post(url, json=asked(mark, f"{mark}-plain"))).raise_for_status()
    lrl.reward(float(mark[1:]), "whole")
    return mark


def in_threads(marks: list[str], clients: Clients) -> list[str]:
    with ThreadPoolExecutor(len(marks)) as pool:
        return list(pool.map(lambda mark: agent(mark, clients), marks))


def in_tasks(marks: list[str], clients: Clients) -> list[str]:
    async def main() -> list[str]:
        return await asyncio.gather(*(agent_async(mark, clients) for mark in marks))

    return asyncio.run(main())


def in_processes(marks: list[str], clients: Clients) -> list[str]:
    """Half of them in the threads of one process, half in the tasks of another."""
    code = (
        "import sys, json; from tests.integration import many_agents as t; "
        "url, way, marks = json.loads(sys.argv[1]); print(json.dumps(getattr(t, way)(marks, t.Clients(url))))"
    )
    url = str(clients.shared.base_url).removesuffix("/v1/")
    halves = [(url, "in_threads", marks[::2]), (url, "in_tasks", marks[1::2])]
    running = [
        subprocess.Popen([sys.executable, "-c", code, json.dumps(half)], stdout=subprocess.PIPE, text=True)
        for half in halves
    ]
    answers = [json.loads(process.communicate(timeout=120)[0]) for process in running]
    return [mark for pair in itertools.zip_longest(*answers) for mark in pair if mark is not None]

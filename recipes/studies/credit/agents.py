"""The three agents: conversations of six turns, each answered with one of four letters. One letter decides; five do not matter.

Ordinary functions on the `openai` SDK. `chance` is the luck of the environment, `client` saves making one for each episode.
What an agent returns is what it did; `rewards.py` says what that earns.
"""

import random

from openai import AsyncOpenAI

import lightning_rl as lrl

LETTERS = "ABCD"
TAIL = 5
"""Turns that decide nothing."""


async def ask(client: AsyncOpenAI, messages: list[dict], observation: str) -> str:
    """One turn: the observation is appended, and the reply. Returns the reply."""
    messages.append({"role": "user", "content": observation})
    completion = await client.chat.completions.create(model="policy", messages=messages, max_tokens=1)
    reply = completion.choices[0].message.content or ""
    messages.append({"role": "assistant", "content": reply})
    return reply


async def early_key(task: dict, client: AsyncOpenAI | None = None, chance: random.Random | None = None) -> dict:
    """A door is chosen at first; the way behind it has forks that all lead to the same place."""
    client, messages = client or AsyncOpenAI(), []
    said = [await ask(client, messages, "door")]
    said += [await ask(client, messages, f"fork {turn}") for turn in range(TAIL)]
    return {"said": said}


async def long_tail(task: dict, client: AsyncOpenAI | None = None, chance: random.Random | None = None) -> dict:
    """A purchase that pays at once; then days on which the weather pays or costs, whatever is said."""
    client, messages, chance = client or AsyncOpenAI(), [], chance or random.Random(random.random())
    said, luck = [await ask(client, messages, "buy")], []
    for turn in range(TAIL):
        said.append(await ask(client, messages, f"day {turn}"))
        luck.append(chance.choice((-1, 1)))
    return {"said": said, "luck": luck}


async def two_agents(task: dict, client: AsyncOpenAI | None = None, chance: random.Random | None = None) -> dict:
    """A planner's word decides whether they succeed together; a worker is paid for errands whose worth is luck."""
    client, chance = client or AsyncOpenAI(), chance or random.Random(random.random())
    with lrl.span("planner", kind="agent"):
        said, luck = [await ask(client, [], "plan")], []
    with lrl.span("worker", kind="agent"):
        messages: list[dict] = []
        for turn in range(TAIL):
            said.append(await ask(client, messages, f"job {turn}"))
            luck.append(chance.choice((-1, 1)))
    return {"said": said, "luck": luck}


def make_tasks(seed: int) -> dict[str, list[dict]]:
    """One task, and the letter that is right in it, drawn by the seed. The agent is not told."""
    key = random.Random(seed).choice(LETTERS)
    return {"train": [{"id": "t", "key": key}], "eval": [{"id": "e", "key": key}]}

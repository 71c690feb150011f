"""Runs `lrl bench tracing`'s agent under agentlightning 0.3.0, in its own environment (`make.sh DIR agentlightning`).

Settings, the cheapest that record calls: its default tracer (AgentOps, told to send nothing anywhere), `LitAgentRunner.step`
on an asynchronous agent, and the store in the memory of the same process. It traces one rollout at a time in a process. Untraced,
the agent is called directly. No LLM proxy stands between agent and server.
"""

import asyncio
import importlib.util
import json
import logging
import sys
from typing import Any


def load(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("tracing_agent", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def main() -> None:
    settings = json.loads(sys.argv[1])
    bench = load(settings["agent"])
    solve = bench.agent(settings)
    if not settings["traced"]:
        await bench.take_orders(solve)
        return

    import agentlightning as agl

    logging.disable(logging.WARNING)
    seconds: list[float] = []

    @agl.rollout
    async def traced(task: dict[str, Any], llm: agl.LLM) -> float:
        seconds.extend(await solve(task))
        return 1.0

    store = agl.InMemoryLightningStore()
    runner = agl.LitAgentRunner(agl.AgentOpsTracer())
    await store.add_resources({"llm": agl.LLM(endpoint=f"{settings['url']}/v1", model=settings["model"])})

    async def step(task: dict[str, Any]) -> list[float]:
        seconds.clear()
        rollout = await runner.step(task)
        if rollout.status != "succeeded":
            raise RuntimeError(f"the rollout {rollout.status}")
        return list(seconds)

    with runner.run_context(agent=traced, store=store):
        rehearsal = await runner.step({"id": "rehearsal", "number": 0})
        spans = await store.query_spans(rehearsal.rollout_id)
        calls = [span for span in spans if "chat" in span.name]
        if len(calls) != settings["calls"]:
            raise RuntimeError(f"{len(calls)} of {settings['calls']} calls were traced: {[s.name for s in spans]}")
        await bench.take_orders(step)


if __name__ == "__main__":
    asyncio.run(main())

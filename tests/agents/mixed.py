"""Three frameworks in one agent: a LangGraph node runs an agent of the Agents SDK, whose tool asks an AutoGen agent."""

from __future__ import annotations

from typing import Any, TypedDict

from agents import Agent, Runner, function_tool
from autogen_agentchat.agents import AssistantAgent
from autogen_ext.models.openai import OpenAIChatCompletionClient
from langgraph.graph import END, START, StateGraph


class State(TypedDict):
    task: dict[str, Any]
    answer: str


async def step(state: State) -> dict[str, Any]:
    task = state["task"]

    @function_tool
    async def consult() -> str:
        """Ask the expert."""
        client = OpenAIChatCompletionClient(model="gpt-4o")
        expert = AssistantAgent("expert", client, system_message=task["expert"])
        result = await expert.run(task=task["question"])
        return str(result.messages[-1].content)  # type: ignore[union-attr]

    desk = Agent("desk", instructions=task["instructions"], model="gpt-4o", tools=[consult])
    if not task["stream"]:
        return {"answer": (await Runner.run(desk, task["question"])).final_output}
    run = Runner.run_streamed(desk, task["question"])
    async for _ in run.stream_events():
        pass
    return {"answer": run.final_output}


async def agent(task: dict[str, Any]) -> str:
    graph = StateGraph(State)
    graph.add_node("step", step)
    graph.add_edge(START, "step")
    graph.add_edge("step", END)
    return (await graph.compile(name="pipeline").ainvoke({"task": task, "answer": ""}))["answer"]

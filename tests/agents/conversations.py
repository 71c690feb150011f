"""Conversations of several turns in every framework, as chat programs hold them. `task`: id, questions, stream."""

from __future__ import annotations

import os
from functools import cache
from typing import Annotated, Any, TypedDict

from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner
from autogen_agentchat.agents import AssistantAgent
from autogen_ext.models.openai import OpenAIChatCompletionClient
from langchain.agents import create_agent
from langchain_core.messages import AnyMessage, HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from openai import AsyncOpenAI

TOKENS = 6
ENDS = {"2": 11}
"""Makes the end of a turn likely, which is token 2."""
CITY = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
TOOL: Any = {"type": "function", "function": {"name": "weather", "description": "", "parameters": CITY}}


@cache
def client() -> AsyncOpenAI:
    return AsyncOpenAI()


async def weather(city: str) -> str:
    """The weather in a city."""
    return f"It rains in {city}."


async def openai_sdk(task: dict[str, Any]) -> None:
    """By chat completions, in every fourth by responses; every other with a tool that must be called at first."""
    if task["id"] % 4 == 3:
        return await openai_responses(task)
    messages: list[Any] = []
    with_tool = task["id"] % 2 == 1
    for turn, question in enumerate(task["questions"]):
        messages.append({"role": "user", "content": question})
        asked: Any = {"model": "tiny", "messages": messages, "max_tokens": TOKENS}
        asked |= {"logit_bias": ENDS} if task["id"] % 4 == 0 else {}
        if with_tool:
            asked |= {"tools": [TOOL], "tool_choice": "auto" if turn else "required"}
            asked |= {} if turn else {"max_tokens": 60}
        if task["stream"]:
            stream = await client().chat.completions.create(stream=True, **asked)
            parts = [part.choices[0].delta.content or "" async for part in stream if part.choices]
            messages.append({"role": "assistant", "content": "".join(parts)})
            continue
        reply = (await client().chat.completions.create(**asked)).choices[0].message
        messages.append(reply.model_dump(exclude_none=True))
        for call in reply.tool_calls or []:
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "It rains."})
    return None


async def openai_responses(task: dict[str, Any]) -> None:
    said: list[Any] = []
    for question in task["questions"]:
        said.append({"role": "user", "content": question})
        made = await client().responses.create(model="tiny", input=said, max_output_tokens=16)
        said += [item.model_dump(exclude_none=True) for item in made.output]


def langchain_model(task: dict[str, Any]) -> ChatOpenAI:
    url = os.environ["OPENAI_BASE_URL"]  # LangChain keeps one set of connections for each
    return ChatOpenAI(model="tiny", base_url=url, max_completion_tokens=TOKENS, streaming=task["stream"], max_retries=0)


async def langchain_agent(task: dict[str, Any]) -> None:
    agent = create_agent(langchain_model(task), [tool(weather)], system_prompt="Be brief.", name="helper")
    messages: list[Any] = []
    for question in task["questions"]:
        messages = (await agent.ainvoke({"messages": [*messages, HumanMessage(question)]}))["messages"]


class State(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]
    left: list[str]


async def langgraph_graph(task: dict[str, Any]) -> None:
    model = langchain_model(task)

    async def ask(state: State) -> dict[str, Any]:
        return {"messages": [HumanMessage(state["left"][0])], "left": state["left"][1:]}

    async def answer(state: State) -> dict[str, Any]:
        return {"messages": [await model.ainvoke(state["messages"])]}

    graph = StateGraph(State)
    graph.add_node("ask", ask)
    graph.add_node("answer", answer)
    graph.add_edge(START, "ask")
    graph.add_edge("ask", "answer")
    graph.add_conditional_edges("answer", lambda state: "ask" if state["left"] else END)
    await graph.compile().ainvoke({"messages": [], "left": task["questions"]})


@cache
def autogen_client() -> OpenAIChatCompletionClient:
    return OpenAIChatCompletionClient(
        model="tiny",
        max_tokens=TOKENS,
        model_info={
            "vision": False,
            "function_calling": True,
            "json_output": False,
            "structured_output": False,
            "family": "unknown",
        },
    )


async def autogen_agent(task: dict[str, Any]) -> None:
    agent = AssistantAgent(
        "helper",
        autogen_client(),
        tools=[weather],
        system_message="Be brief.",
        model_client_stream=task["stream"],
    )
    for question in task["questions"]:
        await agent.run(task=question)


async def agents_sdk(task: dict[str, Any]) -> None:
    """By chat completions, or by responses: there the SDK takes none that is cut short, and the model must end by itself."""
    if task["id"] % 3 == 0:
        model: Any = OpenAIChatCompletionsModel("tiny", client())
        settings = ModelSettings(max_tokens=TOKENS)
    else:
        model = OpenAIResponsesModel("tiny", client())
        settings = ModelSettings(extra_body={"logit_bias": ENDS})
    agent = Agent("helper", instructions="Be brief.", model=model, model_settings=settings)
    said: list[Any] = []
    for question in task["questions"]:
        asked = [*said, {"role": "user", "content": question}]
        if task["stream"]:
            run: Any = Runner.run_streamed(agent, asked)
            async for _ in run.stream_events():
                pass
        else:
            run = await Runner.run(agent, asked)
        said = run.to_input_list()

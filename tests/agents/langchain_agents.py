"""A LangChain agent, a chain and a LangGraph graph, as their users write them. `task`: instructions, question, stream, tools."""

from __future__ import annotations

import operator
import os
from typing import Annotated, Any, TypedDict

from langchain.agents import create_agent
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableParallel
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from langgraph.types import Send


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"It rains in {city}."


@tool
def broken(city: str) -> str:
    """The weather in a city, from a station that is down."""
    raise RuntimeError(f"no answer from {city}")


def model_of(task: dict[str, Any]) -> ChatOpenAI:
    return ChatOpenAI(model="gpt-4o", base_url=os.environ["OPENAI_BASE_URL"], streaming=task["stream"], max_retries=0)


async def agent(task: dict[str, Any]) -> str:
    helper = create_agent(
        model_of(task),
        [weather] if task["tools"] else [],
        system_prompt=task["instructions"],
        name="helper",
    )
    asked: Any = {"messages": [("user", task["question"])]}
    if task["stream"]:
        chunks = [chunk async for chunk, _ in helper.astream(asked, stream_mode="messages")]
        return "".join(str(chunk.content) for chunk in chunks)
    return str((await helper.ainvoke(asked))["messages"][-1].content)


def chain(task: dict[str, Any]) -> dict[str, str]:
    prompt = ChatPromptTemplate.from_messages([("system", "{instructions}"), ("user", "{question}")])
    one = prompt | model_of(task) | StrOutputParser()
    both = RunnableParallel(short=one, long=one)
    if task["stream"]:
        return dict(part for parts in both.stream(task) for part in parts.items())
    if task["tools"]:
        return {"short": one.invoke(task), "long": weather.invoke({"city": "Paris"})}
    return both.invoke(task)


class State(TypedDict):
    task: dict[str, Any]
    drafts: Annotated[list[str], operator.add]


def plan(state: State) -> list[Send]:
    return [Send("write", state) for _ in range(2)]


async def write(state: State) -> dict[str, Any]:
    task = state["task"]
    if task["tools"]:
        await weather.ainvoke({"city": "Paris"})
    said = await model_of(task).ainvoke([SystemMessage(task["instructions"]), HumanMessage(task["question"])])
    return {"drafts": [str(said.content)]}


async def judge(state: State) -> dict[str, Any]:
    """Speaks to the model without LangChain."""
    from openai import AsyncOpenAI

    async with AsyncOpenAI() as client:
        made = await client.chat.completions.create(
            model="gpt-4o",
            messages=[{"role": "user", "content": state["task"]["instructions"] + state["task"]["question"]}],
        )
    return {"drafts": [made.choices[0].message.content or ""]}


def graph() -> Any:
    review = StateGraph(State)
    review.add_node("judge", judge)
    review.add_edge(START, "judge")
    review.add_edge("judge", END)
    paper = StateGraph(State)
    paper.add_node("write", write)
    paper.add_node("review", review.compile(name="reviewers"))
    paper.add_conditional_edges(START, plan, ["write"])
    paper.add_edge("write", "review")
    paper.add_edge("review", END)
    return paper.compile(name="paper")


async def parallel(task: dict[str, Any]) -> list[str]:
    state: Any = {"task": task, "drafts": []}
    if task["stream"]:
        values = [value async for value in graph().astream(state, stream_mode="values")]
        return values[-1]["drafts"]
    return (await graph().ainvoke(state))["drafts"]


def failing(task: dict[str, Any]) -> str:
    """Its tool raises, and so does the agent."""
    helper = create_agent(model_of(task), [broken], system_prompt=task["instructions"], name="helper")
    return str(helper.invoke({"messages": [("user", task["question"])]})["messages"][-1].content)

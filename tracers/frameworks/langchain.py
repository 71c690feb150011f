"""LangChain's and LangGraph's runs as spans, by a callback handler that LangChain itself adds to every run.

Agents, graphs, nodes, chains, retrievers and tools become spans under their own names; prompts, parsers, unnamed sequences and
what LangGraph hides do not, what they contain belongs to the run around them. A model's run becomes a link from the answer's id to
the span around it. The handler is the default of a context variable, so it is there in every task and thread.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any
from uuid import UUID

from langchain_core.callbacks.base import BaseCallbackHandler, BaseCallbackManager
from langchain_core.tracers.context import register_configure_hook

from tracers.frameworks.runs import FrameworkSpans

HIDDEN = "langsmith:hidden"
NODE_TAG = "graph:step:"
BRANCH_TAG = "map:key:"
CREATE_AGENT = "langchain_create_agent"
UNNAMED_AGENT = "LangGraph"
PLUMBING = (
    "RunnableSequence",
    "RunnablePassthrough",
    "RunnableAssign<",
    "RunnableBinding",
    "ChannelWrite<",
    "ChannelRead<",
)


def install() -> None:
    handler = SpanHandler()
    variable: ContextVar[BaseCallbackHandler | None] = ContextVar("lightning_rl_langchain", default=handler)
    register_configure_hook(variable, inheritable=True)


class SpanHandler(BaseCallbackHandler):
    """Called in the context of the run, before it starts and after it has ended."""

    run_inline = True

    def __init__(self) -> None:
        self._spans = FrameworkSpans(_current_run)

    def on_chain_start(
        self,
        serialized: Mapping[str, Any] | None,
        inputs: Any,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        **more: Any,
    ) -> None:
        name, tags, metadata = _name(serialized, more), tags or [], metadata or {}
        if HIDDEN in tags or more.get("run_type") in ("prompt", "parser"):
            self._spans.begin(run_id, parent_run_id, name, None)
            return
        if _is_agent(name, tags, metadata, parent_run_id):
            self._spans.begin(run_id, parent_run_id, name, "agent")
            return
        branch = next((tag.removeprefix(BRANCH_TAG) for tag in tags if tag.startswith(BRANCH_TAG)), None)
        if name.startswith(PLUMBING):
            name = branch or ""
        self._spans.begin(
            run_id,
            parent_run_id,
            name,
            "chain" if name else None,
            attributes={"branch": branch} if branch is not None else None,
            names=_is_node(tags) and metadata.get("ls_integration") != CREATE_AGENT,
        )

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **more: Any) -> None:
        self._spans.end(run_id)

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **more: Any) -> None:
        if isinstance(error, GeneratorExit):  # whoever asked for the stream has had enough of it
            self._spans.end(run_id)
        elif _is_control_flow(error):
            self._spans.end(run_id, attributes={"interrupted": type(error).__name__})
        else:
            self._spans.end(run_id, error=_traceback(error))

    def on_tool_start(
        self,
        serialized: Mapping[str, Any] | None,
        input_str: str,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        inputs: dict[str, Any] | None = None,
        tool_call_id: str | None = None,
        **more: Any,
    ) -> None:
        attributes: dict[str, Any] = {"arguments": inputs if inputs is not None else input_str}
        if tool_call_id is not None:
            attributes["tool_call_id"] = tool_call_id
        self._spans.begin(run_id, parent_run_id, _name(serialized, more), "tool", attributes=attributes)

    def on_tool_end(self, output: Any, *, run_id: UUID, **more: Any) -> None:
        content = getattr(output, "content", output)
        failed = getattr(output, "status", None) == "error"
        self._spans.end(run_id, attributes={"result": content}, error=str(content) if failed else None)

    def on_tool_error(self, error: BaseException, *, run_id: UUID, **more: Any) -> None:
        self.on_chain_error(error, run_id=run_id)

    def on_retriever_start(
        self,
        serialized: Mapping[str, Any] | None,
        query: str,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        **more: Any,
    ) -> None:
        self._spans.begin(run_id, parent_run_id, _name(serialized, more), "chain", attributes={"query": query})

    def on_retriever_end(self, documents: Any, *, run_id: UUID, **more: Any) -> None:
        self._spans.end(run_id)

    def on_retriever_error(self, error: BaseException, *, run_id: UUID, **more: Any) -> None:
        self.on_chain_error(error, run_id=run_id)

    def on_chat_model_start(
        self, serialized: Any, messages: Any, *, run_id: UUID, parent_run_id: UUID | None = None, **more: Any
    ) -> None:
        self._spans.begin(run_id, parent_run_id, "", None)

    def on_llm_start(
        self, serialized: Any, prompts: Any, *, run_id: UUID, parent_run_id: UUID | None = None, **more: Any
    ) -> None:
        self._spans.begin(run_id, parent_run_id, "", None)

    def on_llm_end(self, response: Any, *, run_id: UUID, **more: Any) -> None:
        for response_id in _response_ids(response):
            self._spans.link(run_id, response_id)


def _current_run() -> UUID | None:
    """The run that LangChain would make the parent of one that began here."""
    from langchain_core.runnables.config import var_child_runnable_config  # which may import what imports us

    callbacks = (var_child_runnable_config.get() or {}).get("callbacks")
    return callbacks.parent_run_id if isinstance(callbacks, BaseCallbackManager) else None


def _name(serialized: Mapping[str, Any] | None, more: Mapping[str, Any]) -> str:
    said = more.get("name") or (serialized or {}).get("name") or (serialized or {}).get("id", ["run"])[-1]
    return str(said)


def _is_node(tags: list[str]) -> bool:
    return any(tag.startswith(NODE_TAG) for tag in tags)


def _is_agent(name: str, tags: list[str], metadata: Mapping[str, Any], parent: UUID | None) -> bool:
    """Whether this is the graph that `create_agent` made: what runs in it carries the same metadata."""
    if metadata.get("ls_integration") != CREATE_AGENT or _is_node(tags):
        return False
    return parent is None or name in (metadata.get("lc_agent_name"), UNNAMED_AGENT)


def _is_control_flow(error: BaseException) -> bool:
    """Whether it is how LangGraph interrupts a graph or goes on in the graph around it."""
    errors = sys.modules.get("langgraph.errors")
    return errors is not None and isinstance(error, errors.GraphBubbleUp)


def _traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def _response_ids(result: Any) -> set[str]:
    """The ids under which the server knows its answers: models give them as the message's id or in its metadata."""
    said = [(result.llm_output or {}).get("id")]
    for generation in (each for batch in result.generations for each in batch):
        message = getattr(generation, "message", None)
        if message is not None:
            said += [message.response_metadata.get("id"), message.id]
    return {each for each in said if isinstance(each, str) and not each.startswith(("run-", "run--", "lc_"))}

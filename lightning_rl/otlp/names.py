"""The attributes that say what a span is, by the conventions that instrumentations follow.

`gen_ai.*` are OpenTelemetry's semantic conventions for generative AI; OpenInference (Arize) and OpenLLMetry (Traceloop) have
names of their own. The first of several names that is there counts. `lrl.*` are ours, where no convention has a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

OPERATION = "gen_ai.operation.name"
PROVIDER = "gen_ai.provider.name"
SYSTEM = "gen_ai.system"
"""What `PROVIDER` was called before; tools still look for it."""
AGENT_NAME = "gen_ai.agent.name"
TOOL_NAME = "gen_ai.tool.name"
TOOL_CALL_ID = "gen_ai.tool.call.id"
TOOL_ARGUMENTS = "gen_ai.tool.call.arguments"
TOOL_RESULT = "gen_ai.tool.call.result"
REQUEST_MODEL = "gen_ai.request.model"
RESPONSE_MODEL = "gen_ai.response.model"
RESPONSE_ID = "gen_ai.response.id"
FINISH_REASONS = "gen_ai.response.finish_reasons"
TEMPERATURE = "gen_ai.request.temperature"
TOP_P = "gen_ai.request.top_p"
MAX_TOKENS = "gen_ai.request.max_tokens"
INPUT_TOKENS = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
CACHED_TOKENS = "gen_ai.usage.cache_read.input_tokens"
INPUT_MESSAGES = "gen_ai.input.messages"
OUTPUT_MESSAGES = "gen_ai.output.messages"

EPISODE = "lrl.episode"
KIND = "lrl.span.kind"
"""A kind of ours, or `episode`: the root of an exported episode."""
REWARD = "lrl.reward"
"""Name of events and spans that are a reward: attributes `name` and `value`."""

Kind = Literal["agent", "chain", "tool", "handoff", "call", "episode", "creation"]
"""A span's kind, or what becomes no span: a call of a model, the episode itself, the making of an agent, which is no run of it."""
NO_SPANS: tuple[Kind, ...] = ("call", "episode", "creation")

_OPERATIONS: dict[str, Kind] = {
    "invoke_agent": "agent",
    "create_agent": "creation",
    "execute_tool": "tool",
    "chat": "call",
    "text_completion": "call",
    "generate_content": "call",
}
_OPEN_INFERENCE: dict[str, Kind] = {"AGENT": "agent", "TOOL": "tool", "LLM": "call"}
_TRACELOOP: dict[str, Kind] = {"agent": "agent", "tool": "tool"}
_OWN: dict[str, Kind] = {kind: kind for kind in get_args(Kind)}

_AGENT_NAMES = (AGENT_NAME, "agent.name")
_TOOL_NAMES = (TOOL_NAME, "tool.name")
_ENTITY = "traceloop.entity.name"

TOOL_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "tool_call_id": (TOOL_CALL_ID, "tool_call.id", "tool.id"),
    "arguments": (
        TOOL_ARGUMENTS,
        "tool_call.function.arguments",
        "tool.parameters",
        "input.value",
        "traceloop.entity.input",
    ),
    "result": (TOOL_RESULT, "output.value", "traceloop.entity.output"),
}
"""By our name for it, what it may be called."""
RESPONSE_IDS = (RESPONSE_ID, "llm.response.id")


def kind_of(attributes: Mapping[str, Any]) -> Kind:
    """`chain` for what no convention knows."""
    for name, kinds in (
        (KIND, _OWN),
        (OPERATION, _OPERATIONS),
        ("openinference.span.kind", _OPEN_INFERENCE),
        ("traceloop.span.kind", _TRACELOOP),
    ):
        said = attributes.get(name)
        if isinstance(said, str):
            return kinds.get(said, "chain")
    return "call" if "llm.request.type" in attributes else "chain"


def name_of(kind: Kind, attributes: Mapping[str, Any]) -> str | None:
    """What an agent or a tool is called, as routes and rewards ask for it; None if only the span's name is known."""
    names: tuple[str, ...] = {"agent": _AGENT_NAMES, "tool": _TOOL_NAMES}.get(kind, ())
    said = first(attributes, (*names, _ENTITY))
    return said if isinstance(said, str) and said else None


def first(attributes: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """The value of the first name that is there; None without one."""
    return next((attributes[name] for name in names if attributes.get(name) is not None), None)

"""The body of `POST /v1/messages`, Anthropic's dialect, and the turn that it asks for.

Conversations are put together as the API says: neighbouring messages of one role are one turn, tool results become
messages of their own, an unfinished last message of the assistant's is continued. What has no meaning here but asks for
nothing (`cache_control`, `metadata`, `service_tier`) is accepted; what is not served is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from rollout_server.api.dialects.fields import (
    LIMIT,
    Lenient,
    Natural,
    StopList,
    Strict,
    invalid,
    parse,
    stop_texts,
    unsupported,
)
from rollout_server.api.replies.reply import ToolCall
from rollout_server.api.turn import Constraint, JsonSchema, Message, SamplingOptions, Tool, ToolChoice, Turn


class _Turn(Lenient):
    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class _Text(Lenient):
    text: str


class _Thinking(Lenient):
    thinking: str


class _ToolUse(Lenient):
    id: str
    name: str
    input: dict[str, Any]


class _ToolResult(Lenient):
    tool_use_id: str
    content: str | list[dict[str, Any]] = ""
    is_error: bool = False


class _Tool(Strict):
    type: Literal["custom"] = "custom"
    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    cache_control: dict[str, Any] | None = None
    eager_input_streaming: bool | None = None
    allowed_callers: list[Literal["direct"]] | None = None
    defer_loading: Literal[False] = False

    def as_tool(self) -> Tool:
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        function["parameters"] = self.input_schema
        if self.strict is not None:
            function["strict"] = self.strict
        return {"type": "function", "function": function}


class _ToolChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class _ThinkingConfig(Strict):
    type: Literal["enabled", "disabled", "adaptive"]
    """`adaptive` leaves it to the model and its template."""
    budget_tokens: Natural | None = None
    """What the model should aim at; nothing enforces it, here or elsewhere."""
    display: Literal["summarized", "omitted"] | None = None
    """`omitted` leaves blocks of thinking without their text; else they are shown whole."""


class _Kept(Strict):
    type: Literal["all", "thinking_turns"]
    value: Natural | None = None


class _ClearThinking(Strict):
    type: Literal["clear_thinking_20251015"]
    keep: Literal["all"] | _Kept = "all"


class _ContextManagement(Strict):
    edits: list[dict[str, Any]] = []
    """Only of thinking, and nothing follows from them: what an earlier turn's thinking is in a prompt, the template says."""


class _Format(Strict):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class _OutputConfig(Strict):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    """Handed to the template, if it asks for `reasoning_effort`."""
    format: _Format | None = None


class ConversationFields(Strict):
    """What makes a prompt: all that `count_tokens` takes."""

    off = {"mcp_servers": ([],), "speed": ("standard",), "betas": ([],)}

    model: Annotated[str, Field(max_length=512)]
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    system: str | list[dict[str, Any]] = ""
    tools: Annotated[list[dict[str, Any]], Field(max_length=1024)] = []
    tool_choice: _ToolChoice = _ToolChoice(type="auto")
    thinking: _ThinkingConfig | None = None
    output_config: _OutputConfig = _OutputConfig()
    cache_control: dict[str, Any] | None = None
    context_management: _ContextManagement | None = None

    def conversation(self) -> list[Message]:
        """Raises ApiError 400 that names the block, or the edit, at fault."""
        if self.context_management is not None:
            _check_edits(self.context_management.edits)
        system = _texts(self.system, "system")
        messages = messages_of([parse(_Turn, each, at=f"messages.{at}") for at, each in enumerate(self.messages)])
        return [{"role": "system", "content": system}, *messages] if system else messages

    def tool_definitions(self) -> list[Tool]:
        return [_tool(entry, f"tools.{at}") for at, entry in enumerate(self.tools)]

    def template_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if self.thinking is not None and self.thinking.type != "adaptive":
            options["enable_thinking"] = self.thinking.type == "enabled"
        if self.output_config.effort is not None:
            options["reasoning_effort"] = self.output_config.effort
        return options

    def continues(self, conversation: list[Message]) -> bool:
        """Whether the reply goes on with the last message. Raises ApiError when nothing can go on there."""
        last = conversation[-1]
        if last["role"] != "assistant":
            return False
        if last.get("tool_calls"):
            at = f"messages.{len(self.messages) - 1}"
            raise invalid(at, f"{at}: the last message calls tools, and their results are missing")
        return True


class MessagesRequest(ConversationFields):
    max_tokens: Natural
    stop_sequences: StopList = []
    stream: bool = False
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=LIMIT)] = 0
    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "standard_only"] | None = None

    @property
    def omits_thinking(self) -> bool:
        return self.thinking is not None and self.thinking.display == "omitted"

    @property
    def stops(self) -> tuple[str, ...]:
        return stop_texts(self.stop_sequences)

    def turn(self) -> Turn:
        """Raises ApiError 400 that names the field."""
        messages, tools = self.conversation(), self.tool_definitions()
        return Turn(
            model=self.model,
            messages=messages,
            sampling=SamplingOptions(
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                max_tokens=self.max_tokens,
                stops=self.stops,
            ),
            tools=tools,
            tool_choice=_tool_choice(self.tool_choice, {tool["function"]["name"] for tool in tools}),
            parallel_tool_calls=not self.tool_choice.disable_parallel_tool_use,
            constraint=self._constraint(),
            template_options=self.template_options(),
            continues=self.continues(messages),
        )

    def _constraint(self) -> Constraint | None:
        wanted = self.output_config.format
        return None if wanted is None else JsonSchema(wanted.schema_)


class CountRequest(ConversationFields):
    pass


def parse_messages(body: Mapping[str, Any]) -> MessagesRequest:
    return parse(MessagesRequest, body)


def parse_count(body: Mapping[str, Any]) -> CountRequest:
    return parse(CountRequest, body)


def messages_of(turns: Sequence[_Turn]) -> list[Message]:
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        at = f"messages.{number}.content"
        if turn.role == "system":
            messages.append({"role": "system", "content": _texts(turn.content, at)})
            continue
        blocks = [{"type": "text", "text": turn.content}] if isinstance(turn.content, str) else turn.content
        if not blocks and turn.role == "user":
            raise invalid(at, f"{at} must not be empty")
        if turn.role == "assistant" and (not messages or messages[-1]["role"] != "assistant"):
            messages.append({"role": "assistant", "content": ""})
        for place, block in enumerate(blocks):
            add = _say if turn.role == "assistant" else _hear
            add(messages, block, f"{at}.{place}")
    return messages


def _say(messages: list[Message], block: dict[str, Any], at: str) -> None:
    """One more block of the assistant's last message; what it says is put together as it was sampled."""
    turn = messages[-1]
    match block.get("type"):
        case "text":
            turn["content"] = (turn["content"] or "") + parse(_Text, block, at=at).text
        case "thinking":
            thought = parse(_Thinking, block, at=at).thinking
            if thought:  # else it was omitted
                turn["reasoning_content"] = turn.get("reasoning_content", "") + thought
        case "redacted_thinking":
            pass  # of another model's, and sealed: nothing that a template could show
        case "tool_use":
            use = parse(_ToolUse, block, at=at)
            call = ToolCall(use.id, use.name, json.dumps(use.input, ensure_ascii=False))
            turn.setdefault("tool_calls", []).append(call.as_openai())
        case kind:
            raise unsupported(f"{at}.type", kind)
    if turn.get("tool_calls"):
        turn["content"] = turn["content"] or None


def _hear(messages: list[Message], block: dict[str, Any], at: str) -> None:
    """One more block of a user's message; texts beside one another are lines."""
    match block.get("type"):
        case "text":
            text = parse(_Text, block, at=at).text
            if messages and messages[-1]["role"] == "user":
                messages[-1]["content"] += "\n" + text
            else:
                messages.append({"role": "user", "content": text})
        case "tool_result":
            result = parse(_ToolResult, block, at=at)
            content = _texts(result.content, f"{at}.content")
            if result.is_error and not content.lower().startswith("error"):
                content = f"Error: {content}"
            messages.append({"role": "tool", "tool_call_id": result.tool_use_id, "content": content})
        case kind:
            raise unsupported(f"{at}.type", kind)


def _texts(content: str | list[dict[str, Any]], at: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for number, block in enumerate(content):
        if block.get("type") != "text":
            raise unsupported(f"{at}.{number}.type", block.get("type"), "'text'")
        texts.append(parse(_Text, block, at=f"{at}.{number}").text)
    return "\n".join(texts)


def _tool(entry: dict[str, Any], at: str) -> Tool:
    if entry.get("type") not in (None, "custom"):
        raise unsupported(f"{at}.type", entry["type"], "'custom'")
    return parse(_Tool, entry, at=at).as_tool()


def _check_edits(edits: Sequence[Mapping[str, Any]]) -> None:
    for number, edit in enumerate(edits):
        at = f"context_management.edits.{number}"
        if edit.get("type") != "clear_thinking_20251015":
            raise unsupported(f"{at}.type", edit.get("type"), "'clear_thinking_20251015'")
        parse(_ClearThinking, edit, at=at)


def _tool_choice(choice: _ToolChoice, known: set[str]) -> ToolChoice:
    if (choice.type == "tool") != (choice.name is not None):
        raise invalid("tool_choice.name", "a name belongs to the type 'tool', and to no other")
    match choice.type:
        case "auto" | "none":
            return ToolChoice(choice.type)
        case _ if not known:
            raise invalid("tool_choice", "a tool is required, and there are none")
        case "any":
            return ToolChoice("required")
    assert choice.name is not None
    if choice.name not in known:
        raise invalid("tool_choice.name", f"the tool {choice.name[:100]!r} is not among the tools")
    return ToolChoice("required", (choice.name,))

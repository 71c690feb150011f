"""The body of `POST /v1/chat/completions`, and the turn that it asks for.

OpenAI's fields, and what vLLM and SGLang agree on beside them. Harmless, since nothing here depends on them: `user`, `metadata`,
`store`, `service_tier`, `safety_identifier`, `prompt_cache_key`, `prompt_cache_retention`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from rollout_server.api.dialects.fields import Lenient, Natural, SampledFields, Strict, invalid, parse
from rollout_server.api.errors import ApiError
from rollout_server.api.turn import Constraint, JsonSchema, Message, OneOf, Regex, ToolChoice, Turn


class FunctionCall(Lenient):
    name: str
    arguments: str


class ToolCallMessage(Lenient):
    id: str = ""
    function: FunctionCall


class ChatMessage(Lenient):
    """One message; what a reply carries beyond this (refusal, annotations, …) is of no use in a prompt."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[ToolCallMessage] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    """vLLM's name for `reasoning_content`."""


class FunctionDefinition(Lenient):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDefinition(Lenient):
    type: Literal["function"]
    function: FunctionDefinition


class SchemaFormat(Strict):
    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    name: str = ""
    description: str | None = None
    schema_: Annotated[dict[str, Any] | bool, Field(alias="schema")] = {}
    strict: bool | None = None
    """True or not: the reply always fits the schema."""


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None


class StructuredOutputs(Strict):
    """vLLM's: exactly one of these."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    json_: Annotated[dict[str, Any] | None, Field(alias="json")] = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None

    def constraint(self) -> Constraint:
        """Raises ApiError unless there is exactly one."""
        given: list[Constraint] = []
        if self.json_ is not None:
            given.append(JsonSchema(self.json_))
        if self.json_object:
            given.append(JsonSchema({"type": "object"}))
        if self.regex is not None:
            given.append(Regex(self.regex))
        if self.choice is not None:
            given.append(OneOf(self.choice))
        if len(given) != 1:
            raise invalid("structured_outputs", "give exactly one of json, json_object, regex and choice")
        return given[0]


class ChatRequest(SampledFields):
    off = {
        **SampledFields.off,
        "modalities": (["text"],),
        "echo": (False,),
        "include_reasoning": (True,),
        "separate_reasoning": (True,),
        "functions": ([],),
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    tools: Annotated[list[ToolDefinition], Field(max_length=1024)] = []
    tool_choice: str | dict[str, Any] = "auto"
    """`auto`, `none`, `required`, `{"type": "function", "function": {"name": …}}`, or `{"type": "allowed_tools", …}`."""
    parallel_tool_calls: bool = True
    """False ends a reply at its first tool call."""
    max_tokens: Natural | None = None
    max_completion_tokens: Natural | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    chat_template_kwargs: dict[str, Any] = {}
    """Further variables of the chat template, as `enable_thinking`."""
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    """Handed to the template, if it asks for it; `none` is `enable_thinking: false` and `thinking: false`."""
    verbosity: Literal["low", "medium", "high"] | None = None
    """Handed to the template, if it asks for it."""
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    """The last message is the assistant's own, and the reply goes on with it."""

    def turn(self) -> Turn:
        """Raises ApiError for what does not fit together."""
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs", "top_logprobs needs logprobs to be true")
        if self.continue_final_message and self.add_generation_prompt:
            raise invalid("continue_final_message", "continue_final_message needs add_generation_prompt to be false")
        if self.add_generation_prompt is False and not self.continue_final_message:
            raise invalid("add_generation_prompt", "a reply needs its opening, unless it continues the final message")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise invalid("continue_final_message", "the final message is not the assistant's")
        return Turn(
            model=self.model,
            messages=[plain_message(message, at) for at, message in enumerate(self.messages)],
            sampling=self.sampling(
                max_tokens=self.max_completion_tokens or self.max_tokens, top_logprobs=self.top_logprobs
            ),
            tools=[tool.model_dump(exclude_none=True) for tool in self.tools],
            tool_choice=read_tool_choice(self.tool_choice, [tool.function.name for tool in self.tools]),
            parallel_tool_calls=self.parallel_tool_calls,
            constraint=response_constraint(self.response_format, self.structured_outputs),
            constraint_param="response_format" if self.structured_outputs is None else "structured_outputs",
            template_options=self._template_options(),
            continues=self.continue_final_message,
        )

    def _template_options(self) -> Mapping[str, Any]:
        options = dict(self.chat_template_kwargs)
        taken = sorted(_TEMPLATE_OWN.intersection(options))
        if taken:
            raise invalid("chat_template_kwargs", f"{taken[0]!r} is not a template's option here")
        if self.reasoning_effort == "none":
            options = {"enable_thinking": False, "thinking": False, **options}
        elif self.reasoning_effort is not None:
            options.setdefault("reasoning_effort", self.reasoning_effort)
        if self.verbosity is not None:
            options.setdefault("verbosity", self.verbosity)
        return options


_TEMPLATE_OWN = {
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "tokenize",
}


def parse_chat(body: dict[str, Any]) -> ChatRequest:
    return parse(ChatRequest, body)


def response_constraint(wanted: ResponseFormat | None, structured: StructuredOutputs | None) -> Constraint | None:
    """Raises ApiError when both are given, or a json_schema is missing."""
    if structured is not None:
        if wanted is not None and wanted.type != "text":
            raise invalid("structured_outputs", "give either response_format or structured_outputs")
        return structured.constraint()
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return JsonSchema({"type": "object"})
    if wanted.json_schema is None:
        raise invalid("response_format.json_schema", "the type json_schema needs a json_schema")
    return JsonSchema(wanted.json_schema.schema_)


def read_tool_choice(choice: str | Mapping[str, Any], names: Sequence[str]) -> ToolChoice:
    """OpenAI's forms, of its chat API: a word, one named function, or some allowed ones. `names` are the tools offered.

    Raises ApiError for another form, or for a tool that is not offered.
    """
    match choice:
        case "auto" | "none":
            return ToolChoice(choice)
        case "required" | "any":
            made = ToolChoice("required")
        case {"type": "function", "function": {"name": str(name)}}:
            made = ToolChoice("required", (name,))
        case {"type": "allowed_tools", "allowed_tools": {"mode": "auto" | "required" as mode, "tools": list(tools)}}:
            made = ToolChoice(mode, tuple(_allowed_name(tool) for tool in tools))
        case _:
            raise ApiError(
                400,
                "tool_choice is auto, none, required, a function by its name, or allowed_tools",
                param="tool_choice",
                code="invalid_value",
            )
    unknown = sorted(set(made.names).difference(names))
    if unknown:
        raise invalid("tool_choice", f"the tool {unknown[0][:100]!r} is not among the tools")
    if made.mode == "required" and not names:
        raise invalid("tool_choice", "a tool is required, and there are none")
    return made


def _allowed_name(tool: Any) -> str:
    match tool:
        case {"type": "function", "function": {"name": str(name)}}:
            return name
        case _:
            raise invalid("tool_choice", "allowed_tools are functions by their names")


def plain_message(message: ChatMessage, at: int) -> Message:
    """The message as templates take it: text only, `developer` as `system`."""
    role = "system" if message.role == "developer" else message.role
    plain: Message = {"role": role, "content": _text(message.content, at)}
    if message.tool_calls:
        plain["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.function.name, "arguments": c.function.arguments}}
            for c in message.tool_calls
        ]
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    reasoning = message.reasoning_content or message.reasoning
    if reasoning and role == "assistant":
        plain["reasoning_content"] = reasoning
    return plain


def _text(content: str | list[dict[str, Any]] | None, at: int) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.get("type") not in ("text", "refusal") or not isinstance(part.get(part["type"]), str):
            where = f"messages.{at}.content"
            kind = str(part.get("type"))[:100]
            raise ApiError(
                400,
                f"{where}: parts of type {kind!r} are not supported, only 'text'",
                param=where,
                code="unsupported_content",
            )
    return "".join(part[part["type"]] for part in content)

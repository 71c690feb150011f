"""The body of `POST /v1/responses`: OpenAI's fields, those that vLLM has beside them, and what they ask of the policy.

Fields that concern what is not served (built-in tools, background runs, stored conversations and prompts) are refused by
name. What a stored response needs besides its items is not kept: instructions hold for one response.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from rollout_server.api.dialects.fields import (
    Lenient,
    Natural,
    SampledFields,
    Strict,
    invalid,
    parse,
    unsupported,
)
from rollout_server.api.dialects.response_items import Item, messages_of
from rollout_server.api.turn import Constraint, JsonSchema, Message, Tool, ToolChoice, Turn

LOGPROBS = "message.output_text.logprobs"

Include = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "message.input_image.image_url",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
"""All but the first ask for parts of things that never occur here; reasoning is always given in the clear."""


class _FunctionTool(Strict):
    type: Literal["function"]
    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    output_schema: dict[str, Any] | None = None
    defer_loading: Literal[False] = False

    def as_tool(self) -> Tool:
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        if self.parameters is not None:
            function["parameters"] = self.parameters
        if self.strict is not None:
            function["strict"] = self.strict
        return {"type": "function", "function": function}


class _Named(Lenient):
    type: Literal["function"]
    name: str


class _Allowed(Strict):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[dict[str, Any]], Field(min_length=1)]


class _Plain(Strict):
    type: Literal["text"]


class _Object(Strict):
    type: Literal["json_object"]


class _Schema(Strict):
    type: Literal["json_schema"]
    name: str
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None
    """Replies always fit the schema."""


class _Text(Strict):
    format: dict[str, Any] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    """Handed to the template, if it asks for it."""


class _Reasoning(Strict):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    """Reasoning is given whole, as content; there are no summaries."""
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class ResponsesRequest(SampledFields):
    off = {**SampledFields.off, "background": (False,), "truncation": ("disabled",), "context_management": ([],)}

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    previous_response_id: Annotated[str, Field(max_length=128)] | None = None
    max_output_tokens: Natural | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=1024)] = []
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    text: _Text = _Text()
    reasoning: _Reasoning = _Reasoning()
    include: list[Include] = []
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    n: Literal[1] = 1

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in self.include

    @property
    def stored(self) -> bool:
        return self.store is not False

    def items(self) -> list[Item]:
        if isinstance(self.input, str):
            return [{"type": "message", "role": "user", "content": self.input}]
        return self.input

    def turn(self, earlier: list[Message]) -> Turn:
        """What comes after the messages of the previous response. Raises ApiError 400 that names the field."""
        messages = earlier + messages_of(self.items())
        if not messages:
            raise invalid("input", "input must not be empty")
        if self.instructions is not None:
            messages = [{"role": "system", "content": self.instructions}, *messages]
        tools = [_tool(entry, f"tools.{number}") for number, entry in enumerate(self.tools)]
        effort = self.reasoning.effort
        options: dict[str, Any] = {} if effort is None else {"reasoning_effort": effort}
        if effort == "none":
            options = {"enable_thinking": False}
        if self.text.verbosity is not None:
            options["verbosity"] = self.text.verbosity
        return Turn(
            model=self.model,
            messages=messages,
            sampling=self.sampling(max_tokens=self.max_output_tokens, top_logprobs=self.top_logprobs),
            tools=tools,
            tool_choice=_tool_choice(self.tool_choice, {tool["function"]["name"] for tool in tools}),
            parallel_tool_calls=self.parallel_tool_calls,
            constraint=_constraint(self.text.format),
            template_options=options,
        )


def parse_responses(body: Mapping[str, Any]) -> ResponsesRequest:
    request = parse(ResponsesRequest, body)
    if request.top_logprobs and not request.wants_logprobs:
        raise invalid("top_logprobs", f"top_logprobs needs {LOGPROBS!r} in include")
    return request


def _tool(entry: dict[str, Any], at: str) -> Tool:
    if entry.get("type") != "function":
        raise unsupported(f"{at}.type", entry.get("type"), "'function'")
    return parse(_FunctionTool, entry, at=at).as_tool()


def _tool_choice(choice: str | dict[str, Any], known: set[str]) -> ToolChoice:
    at = "tool_choice"
    if isinstance(choice, str):
        if choice == "required" and not known:
            raise invalid(at, "a tool is required, and there are none")
        return ToolChoice(choice)  # type: ignore[arg-type]  # the request's type admits nothing else
    match choice.get("type"):
        case "function":
            return ToolChoice("required", (_known(parse(_Named, choice, at=at).name, known, at),))
        case "allowed_tools":
            allowed = parse(_Allowed, choice, at=at)
            named = [parse(_Named, tool, at=f"{at}.tools.{number}") for number, tool in enumerate(allowed.tools)]
            return ToolChoice(allowed.mode, tuple(_known(tool.name, known, f"{at}.tools") for tool in named))
        case kind:
            raise unsupported(f"{at}.type", kind, "'function' and 'allowed_tools'")


def _known(name: str, known: set[str], at: str) -> str:
    if name not in known:
        raise invalid(at, f"the tool {name[:100]!r} is not among the tools")
    return name


def _constraint(given: dict[str, Any] | None) -> Constraint | None:
    at = "text.format"
    if given is None:
        return None
    match given.get("type"):
        case "text":
            parse(_Plain, given, at=at)
            return None
        case "json_object":
            parse(_Object, given, at=at)
            return JsonSchema({"type": "object"})
        case "json_schema":
            return JsonSchema(parse(_Schema, given, at=at).schema_)
        case kind:
            raise unsupported(f"{at}.type", kind, "'text', 'json_object' and 'json_schema'")

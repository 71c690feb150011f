"""What clients may ask for: the request bodies of `/v1/chat/completions` and `/v1/completions`.

Every field is honoured, harmless, or refused by its name; none is silently ignored. Null means absent, as in OpenAI's
API. Harmless, since nothing here depends on them: `user`, `metadata`, `store`, `service_tier`, `safety_identifier`,
`prompt_cache_key`. Fields that are not served are let through at the value that means "off".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from rollout_server.api.errors import ApiError
from rollout_server.api.tool_prompt import Message

_OFF: dict[str, Sequence[Any]] = {
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
}

_TYPES = {"str", "int"}
"""What pydantic puts into the path of an error inside a union."""

Natural = Annotated[int, Field(ge=1)]
LIMIT = 2**31
"""Of whole numbers: what the engine's 32-bit fields hold."""
TokenNumber = Annotated[int, Field(ge=0, lt=LIMIT)]
TokenId = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class StreamOptions(_Strict):
    include_usage: bool = False


class _Sampled(_Strict):
    """What both dialects share."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=LIMIT)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] = {}
    priority: Annotated[int, Field(gt=-LIMIT, lt=LIMIT)] = 0
    """Lower goes first."""
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=256)] = 1
    stop: str | list[str] = []
    stop_token_ids: list[TokenNumber] = []
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    return_token_ids: bool = False

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def bias(self) -> dict[int, float]:
        """JSON's keys are strings."""
        return {int(token_id): bias for token_id, bias in self.logit_bias.items()}

    @property
    def stops(self) -> list[str]:
        return [text for text in ([self.stop] if isinstance(self.stop, str) else self.stop) if text]


class FunctionCall(BaseModel):
    name: str
    arguments: str


class ToolCallMessage(BaseModel):
    id: str = ""
    function: FunctionCall


class ChatMessage(BaseModel):
    """One message; what a reply carries beyond this (refusal, annotations, …) is of no use in a prompt."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[ToolCallMessage] | None = None
    tool_call_id: str | None = None


class FunctionDefinition(BaseModel):
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    type: Literal["function"]
    function: FunctionDefinition


class ChatRequest(_Sampled):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    tools: list[Tool] = []
    tool_choice: Any = "auto"
    parallel_tool_calls: bool = True
    """False ends a reply at its first tool call."""
    max_tokens: Natural | None = None
    max_completion_tokens: Natural | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def parses_tools(self) -> bool:
        return bool(self.tools) and self.tool_choice == "auto"

    def conversation(self) -> list[Message]:
        """The messages as templates take them: text only, `developer` as `system`."""
        return [_plain(message, at) for at, message in enumerate(self.messages)]

    def tool_definitions(self) -> list[dict[str, Any]]:
        return [tool.model_dump(exclude_none=True) for tool in self.tools]


class CompletionRequest(_Sampled):
    prompt: str | list[str] | list[TokenNumber] | list[list[TokenNumber]]
    max_tokens: Natural = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if all(isinstance(item, int) for item in self.prompt):
            return [list(self.prompt)]  # type: ignore[arg-type]
        return list(self.prompt)  # type: ignore[arg-type]


R = TypeVar("R", bound=_Sampled)


def parse_chat(body: dict[str, Any]) -> ChatRequest:
    request = _validate(ChatRequest, body)
    if request.tool_choice not in ("auto", "none"):
        raise ApiError(
            400,
            f"tool_choice {request.tool_choice!r} is not supported: only 'auto' and 'none' are",
            param="tool_choice",
            code="unsupported_value",
        )
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs", code="invalid_value")
    return request


def parse_completion(body: dict[str, Any]) -> CompletionRequest:
    request = _validate(CompletionRequest, body)
    if not request.prompts() or not all(request.prompts()):
        raise ApiError(400, "prompt must not be empty", param="prompt", code="invalid_value")
    return request


def _validate(kind: type[R], body: dict[str, Any]) -> R:
    given = {name: value for name, value in body.items() if value is not None}
    for name, harmless in _OFF.items():
        if name in given and given[name] in harmless:
            del given[name]
    try:
        return kind.model_validate(given)
    except pydantic.ValidationError as error:
        raise _refusal(error) from error


def _refusal(error: pydantic.ValidationError) -> ApiError:
    first = error.errors()[0]
    path = [part for part in first["loc"] if isinstance(part, int) or (part.isidentifier() and part not in _TYPES)]
    param = ".".join(str(part) for part in path)
    match first["type"]:
        case "extra_forbidden":
            return ApiError(400, f"unsupported parameter: {param!r}", param=param, code="unsupported_parameter")
        case "missing":
            return ApiError(400, f"missing required parameter: {param!r}", param=param, code="missing_parameter")
        case _:
            message = f"invalid value for {param!r}: {first['msg']}"
            return ApiError(400, message, param=param, code="invalid_value")


def _plain(message: ChatMessage, at: int) -> Message:
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
    return plain


def _text(content: str | list[dict[str, Any]] | None, at: int) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            where = f"messages.{at}.content"
            raise ApiError(
                400,
                f"{where}: parts of type {part.get('type')!r} are not supported, only 'text'",
                param=where,
                code="unsupported_content",
            )
    return "".join(part["text"] for part in content)

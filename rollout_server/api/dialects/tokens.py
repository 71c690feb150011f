"""`POST /tokenize` and `POST /detokenize`, as vLLM and SGLang have them: what a prompt is in ids, and ids in text.

A conversation is rendered as the chat endpoint would render it if it began here: `messages`, `tools` and `chat_template_kwargs`
mean what they mean there.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from rollout_server.api.dialects.chat_request import ChatMessage, ToolDefinition, plain_message
from rollout_server.api.dialects.fields import Strict, TokenIds, parse
from rollout_server.api.errors import ApiError
from rollout_server.api.front.wire import json_body, json_response
from rollout_server.api.rendering.render import RenderError
from rollout_server.api.services import Services


class TokenizeRequest(Strict):
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: list[ToolDefinition] = []
    chat_template_kwargs: dict[str, Any] = {}
    add_special_tokens: bool = True
    """Of a `prompt`; a conversation has those of its template."""
    return_token_strs: bool = False


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: TokenIds
    skip_special_tokens: bool = False


async def tokenize(services: Services, http: Request, episode_id: str | None) -> Response:
    request = parse(TokenizeRequest, await json_body(http))
    ids = await _ids(services, http, request)
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": services.context_limit, "tokens": ids}
    if request.return_token_strs:
        answer["token_strs"] = [services.renderer.tokenizer.id_to_token(token_id) for token_id in ids]
    return json_response(answer)


async def detokenize(services: Services, http: Request, episode_id: str | None) -> Response:
    request = parse(DetokenizeRequest, await json_body(http))
    if request.tokens and max(request.tokens) >= services.vocab_size:
        raise ApiError(
            400, f"token ids must lie in 0 … {services.vocab_size - 1}", param="tokens", code="invalid_token_ids"
        )
    return json_response({"prompt": services.renderer.decode(request.tokens, special=not request.skip_special_tokens)})


async def _ids(services: Services, http: Request, request: TokenizeRequest) -> list[int]:
    if (request.prompt is None) == (request.messages is None):
        raise ApiError(400, "give either prompt or messages", param="prompt", code="invalid_value")
    if request.messages is None:
        assert request.prompt is not None
        (ids,) = await services.text_size.encode([request.prompt], add_special_tokens=request.add_special_tokens)
        return ids
    services.text_size.check_messages(len(request.messages))
    await services.text_size.check_parts(http, request.model_dump(), "messages")
    messages = [plain_message(message, at) for at, message in enumerate(request.messages)]
    tools = [tool.model_dump(exclude_none=True) for tool in request.tools]
    try:
        return await services.renderer.patiently(
            lambda: services.renderer.prompt(messages, tools, request.chat_template_kwargs)
        )
    except RenderError as error:
        raise ApiError(400, str(error), param="messages", code="invalid_messages") from error

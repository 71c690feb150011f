"""What every handler works with; made once per process, in `app`."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from starlette.requests import Request

from rollout_server.api.config import WebConfig
from rollout_server.api.dialects.response_store import ResponseStore
from rollout_server.api.engine.replicas import Replicas
from rollout_server.api.errors import ApiError
from rollout_server.api.front.joining import agent_of
from rollout_server.api.front.limits import Admission
from rollout_server.api.front.metrics import Metrics
from rollout_server.api.front.patience import PatientRenderer
from rollout_server.api.front.text_size import TextSize
from rollout_server.api.model_names import adapter_of, route_of, routed_adapter
from rollout_server.api.recorder import EpisodeLog, Recorder
from rollout_server.api.rendering.conversation import ConversationIndex
from rollout_server.api.replies.reasoning import ReasoningFormat
from rollout_server.api.replies.tool_formats import ToolFormat
from rollout_server.api.upstreams.lines import Lines
from rollout_server.grammar import Grammars


@dataclass(frozen=True)
class Services:
    """What every handler works with; made once per process."""

    config: WebConfig
    context_limit: int
    vocab_size: int
    engine: Replicas
    renderer: PatientRenderer
    conversations: ConversationIndex
    recorder: Recorder | None
    tool_format: ToolFormat
    reasoning: ReasoningFormat | None
    grammars: Grammars
    responses: ResponseStore
    admission: Admission
    metrics: Metrics
    text_size: TextSize
    lines: Lines = field(default_factory=Lines)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @cached_property
    def special_ids(self) -> Mapping[str, int]:
        """The tokenizer's special tokens by their texts."""
        added = self.renderer.tokenizer.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in added.items() if token.special}

    def shown_ids(self, *, tools: bool) -> frozenset[int]:
        """Special tokens that whoever reads a reply must see in its text: those of reasoning, and with `tools` of calls."""
        texts = (*(self.reasoning.special if self.reasoning else ()), *(self.tool_format.special if tools else ()))
        return frozenset(self.special_ids[text] for text in texts if text in self.special_ids)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def adapter(self, model: str) -> str:
        """The adapter that clients mean by this model name; "" for the policy. Raises ApiError for an unknown name."""
        return adapter_of(model, self.config.served_name, self.config.aliases, self.engine.adapters)

    def route(self, http: Request, model: str) -> str | None:
        """Where a route leads this request: `policy`, an adapter or an upstream; None where none fits."""
        return route_of(self.config.routes, agent_of(http) or None, model)

    def answering(self, http: Request, model: str) -> str:
        """The adapter that answers this request for a model; "" for the policy. Raises ApiError for one that is not here."""
        to = self.route(http, model)
        if to is None:
            return self.adapter(model)
        if to in self.config.upstreams:
            message = f"a route leads this request to the upstream {to!r}, which cannot be asked for {http.url.path}"
            raise ApiError(400, message, code="unsupported_route")
        return routed_adapter(to, self.engine.adapters)

    async def episode(self, episode_id: str | None) -> EpisodeLog | None:
        if episode_id is None:
            return None
        if self.recorder is None:
            raise ApiError(404, "this server has no episode store; name no episode", code="episode_not_found")
        return await self.recorder.episode(episode_id)

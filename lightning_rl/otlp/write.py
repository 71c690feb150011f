"""An episode as an OpenTelemetry trace, by the semantic conventions for generative AI. Pure and deterministic.

The episode is the root span; the agent's spans keep their places; each call is a client span `chat MODEL` under the span that
made it; rewards are events where they were given. Ids are those of the spans if OpenTelemetry could have made them, else
digests, so that a trace which is sent twice is the same trace. Prompts, replies, tool arguments and results, and any text in
attributes that no convention names are left out unless `content` asks for them.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import structs

from lightning_rl.agents import callers
from lightning_rl.episode import Call, Episode, Outcome, Reward, Span
from lightning_rl.otlp import CLIENT, ERROR, INTERNAL, UNSET, OtelEvent, OtelSpan, TraceRequest, names
from lightning_rl.otlp.read import LATEST_NS, bounded, cut

SCOPE = "lightning_rl"
POLICY = "lightning_rl"
"""The provider's name where the policy answered."""

_OTEL_ID = re.compile(r"[0-9a-f]{16}")
_OPERATION = {"agent": "invoke_agent", "tool": "execute_tool"}
_SAYS_NOTHING = {
    names.OPERATION,
    names.PROVIDER,
    names.SYSTEM,
    names.AGENT_NAME,
    names.TOOL_NAME,
    names.TOOL_CALL_ID,
    names.REQUEST_MODEL,
    names.RESPONSE_MODEL,
    names.RESPONSE_ID,
    "gen_ai.agent.id",
    "gen_ai.conversation.id",
    "gen_ai.tool.type",
    "error.type",
    "call_id",
}
"""Attributes of the agent's spans whose text is a name."""


def trace_request(*episodes: Episode, content: bool) -> TraceRequest:
    """Episodes as a request to a collector, each a trace; `content` says whether what was said is in it."""
    spans = [span for episode in episodes for span in _spans(episode, content)]
    return TraceRequest(resource={"service.name": "lightning-rl"}, scope=SCOPE, spans=spans)


def trace_id(episode_id: str) -> str:
    return hashlib.blake2b(episode_id.encode(), digest_size=16).hexdigest()


def _spans(episode: Episode, content: bool) -> list[OtelSpan]:
    trace, root_id = trace_id(episode.id), _digest(episode.id, "episode")
    spans = {span.id: span for span in episode.spans}
    rewards: dict[str, list[OtelEvent]] = defaultdict(list)
    named = callers(episode)
    call_ids = {call.id: _digest(episode.id, f"call {call.id}") for call in episode.calls}
    for reward in episode.rewards:
        place = call_ids.get(reward.call_id or "") or (
            _span_id(episode.id, reward.span_id) if reward.span_id in spans else root_id
        )
        rewards[place].append(_reward_event(reward))

    def under(span_id: str | None) -> str:
        return _span_id(episode.id, span_id) if span_id in spans else root_id

    written = [_root(episode, trace, root_id, rewards[root_id], content)]
    for span in episode.spans:
        own = _span_id(episode.id, span.id)
        written.append(_own_span(span, trace, own, under(span.parent_id), rewards[own], content))
    for call in episode.calls:
        own = call_ids[call.id]
        written.append(_call_span(call, trace, own, under(call.span_id), named[call.id].agent, rewards[own], content))
    return [structs.replace(span, attributes={names.EPISODE: episode.id, **span.attributes}) for span in written]


def _root(episode: Episode, trace: str, own: str, events: list[OtelEvent], content: bool) -> OtelSpan:
    start = episode.start
    totals: dict[str, float] = defaultdict(float)
    for reward in episode.rewards:
        totals[reward.name] += reward.value
    begun = [span.started_at for span in episode.spans] + [call.started_at for call in episode.calls]
    ended = [span.ended_at for span in episode.spans] + [call.ended_at for call in episode.calls]
    failed = episode.outcome not in (None, Outcome.COMPLETED)
    attributes = {
        names.KIND: "episode",
        "lrl.task.id": start.task.id,
        "lrl.phase": start.phase,
        "lrl.step": start.step,
        "lrl.sample": start.sample,
        "lrl.attempt": start.attempt,
        "lrl.group": start.group,
        "lrl.outcome": str(episode.outcome) if episode.outcome else "running",
        "lrl.counted": episode.counted,
        "lrl.policy.versions": sorted({version for call in episode.calls for version in call.versions}),
        **{f"lrl.reward.{name}": value for name, value in totals.items()},
    }
    if content:
        attributes |= {"lrl.task.input": _json(start.task.input), "lrl.answer": _json(episode.answer)}
    return OtelSpan(
        id=own,
        trace_id=trace,
        name=f"episode {episode.id}",
        kind=INTERNAL,
        start_ns=_ns(start.started_at or min(begun, default=0.0)),
        end_ns=_ns(episode.ended_at or max([start.started_at, *ended])),
        attributes=bounded(attributes),
        events=[*events, *([_exception(episode.error, episode.ended_at)] if failed and episode.error else [])],
        status=ERROR if failed else UNSET,
        status_message=str(episode.outcome) if failed else "",
    )


def _own_span(span: Span, trace: str, own: str, parent: str, events: list[OtelEvent], content: bool) -> OtelSpan:
    attributes: dict[str, Any] = {names.KIND: span.kind}
    if span.kind in _OPERATION:
        attributes[names.OPERATION] = _OPERATION[span.kind]
        attributes[names.AGENT_NAME if span.kind == "agent" else names.TOOL_NAME] = span.name
    ours = dict(span.attributes)
    if span.kind == "tool":
        for name, theirs in names.TOOL_ATTRIBUTES.items():
            if (value := ours.pop(name, None)) is not None:
                attributes[theirs[0]] = value if isinstance(value, str) else _json(value)
    attributes |= {name: value for name, value in ours.items() if name not in attributes}
    if not content:
        attributes = {name: value for name, value in attributes.items() if _says_nothing(name, value)}
    operation = _OPERATION.get(span.kind)
    return OtelSpan(
        id=own,
        trace_id=trace,
        parent_id=parent,
        name=f"{operation} {span.name}" if operation else span.name,
        kind=INTERNAL,
        start_ns=_ns(span.started_at),
        end_ns=_ns(span.ended_at),
        attributes=bounded(attributes),
        events=[*events, *([_exception(span.error, span.ended_at)] if span.error else [])],
        status=ERROR if span.error else UNSET,
    )


def _says_nothing(name: str, value: Any) -> bool:
    """Whether an attribute holds nothing that a model, a tool or a task said."""
    return isinstance(value, bool | int | float) or name in _SAYS_NOTHING or name.startswith("lrl.")


def _call_span(
    call: Call, trace: str, own: str, parent: str, agent: str | None, events: list[OtelEvent], content: bool
) -> OtelSpan:
    request = call.request
    operation = "text_completion" if "prompt" in request else "chat"
    provider = call.upstream or POLICY
    asked = request.get("model")
    model = asked if isinstance(asked, str) and asked else call.model
    attributes: dict[str, Any] = {
        names.KIND: "call",
        names.OPERATION: operation,
        names.PROVIDER: provider,
        names.SYSTEM: provider,
        names.REQUEST_MODEL: model,
        names.RESPONSE_MODEL: call.model,
        names.RESPONSE_ID: call.response_id or call.id,
        names.FINISH_REASONS: [call.finish_reason],
        names.TEMPERATURE: call.temperature,
        "lrl.call.id": call.id,
        "lrl.call.index": call.index,
        "lrl.call.relation": call.relation,
        "lrl.policy.versions": sorted(set(call.versions)),
    }
    attributes |= _usage(call)
    if agent is not None:
        attributes[names.AGENT_NAME] = agent
    if call.parted_at is not None:
        attributes["lrl.call.parted_at"] = call.parted_at
    if call.restricted:
        attributes["lrl.call.restricted"] = call.restricted
    for name, field in ((names.TOP_P, "top_p"), (names.MAX_TOKENS, "max_tokens")):
        if isinstance(request.get(field), int | float):
            attributes[name] = request[field]
    if content:
        attributes[names.INPUT_MESSAGES] = _json(_asked(request))
        attributes[names.OUTPUT_MESSAGES] = _json(
            [{**_message({"role": "assistant", **call.response}), "finish_reason": call.finish_reason}]
        )
    return OtelSpan(
        id=own,
        trace_id=trace,
        parent_id=parent,
        name=f"{operation} {model}",
        kind=CLIENT,
        start_ns=_ns(call.started_at),
        end_ns=_ns(call.ended_at),
        attributes=bounded(attributes),
        events=events,
        status=ERROR if call.finish_reason == "abort" else UNSET,
        status_message="the client left" if call.finish_reason == "abort" else "",
    )


def _usage(call: Call) -> dict[str, int]:
    """Tokens: as sampled, or as the provider elsewhere says."""
    if not call.upstream:
        return {
            names.INPUT_TOKENS: len(call.prompt_ids),
            names.OUTPUT_TOKENS: len(call.sampled_ids),
            names.CACHED_TOKENS: call.cached_tokens,
        }
    said = call.response.get("usage")
    usage = said if isinstance(said, dict) else {}
    found = {
        names.INPUT_TOKENS: usage.get("prompt_tokens", usage.get("input_tokens")),
        names.OUTPUT_TOKENS: usage.get("completion_tokens", usage.get("output_tokens")),
    }
    return {name: count for name, count in found.items() if isinstance(count, int)}


def _asked(request: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a request of any dialect says, as the conventions have it."""
    said = request.get("messages", request.get("input", request.get("prompt")))
    first = [{"role": "system", "content": request[name]} for name in ("system", "instructions") if request.get(name)]
    rest = (
        said
        if isinstance(said, list) and all(isinstance(item, dict) for item in said)
        else [{"role": "user", "content": said}]
    )
    return [_message(message) for message in [*first, *rest]]


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    content = message.get("content")
    if isinstance(content, str) and message.get("role") == "tool":
        parts.append({"type": "tool_call_response", "id": message.get("tool_call_id"), "response": content})
    elif isinstance(content, str):
        parts.append({"type": "text", "content": content})
    elif isinstance(content, Sequence):
        parts += [_content_part(part) for part in content]
    if reasoning := message.get("reasoning_content"):
        parts.insert(0, {"type": "reasoning", "content": reasoning})
    made_calls = message.get("tool_calls")
    if isinstance(made_calls, list):
        parts += [_tool_call(made) for made in made_calls if isinstance(made, dict)]
    if not parts:  # an item of the Responses API is a message of its own
        parts = [dict(message)]
    return {"role": message.get("role", "assistant" if "type" in message else "user"), "parts": parts}


def _tool_call(made: Mapping[str, Any]) -> dict[str, Any]:
    said = made.get("function")
    function = said if isinstance(said, dict) else {}
    return {
        "type": "tool_call",
        "id": made.get("id"),
        "name": function.get("name"),
        "arguments": function.get("arguments"),
    }


def _content_part(part: Any) -> dict[str, Any]:
    if isinstance(part, dict):
        return {"type": "text", "content": part["text"]} if isinstance(part.get("text"), str) else dict(part)
    return {"type": "text", "content": str(part)}


def _reward_event(reward: Reward) -> OtelEvent:
    return OtelEvent(
        name=names.REWARD, time_ns=_ns(reward.time), attributes={"name": reward.name, "value": reward.value}
    )


def _exception(error: str, time: float) -> OtelEvent:
    """By the last line of a traceback, which names the exception."""
    lines = error.strip().splitlines() or [""]
    kind, colon, message = lines[-1].partition(": ")
    named = colon and kind.replace(".", "").replace("_", "").isalnum()
    return OtelEvent(
        name="exception",
        time_ns=_ns(time),
        attributes={
            "exception.type": kind if named else "Error",
            "exception.message": cut(message if named else lines[-1]),
            "exception.stacktrace": cut(error),
        },
    )


def _span_id(episode_id: str, span_id: str | None) -> str:
    """The id itself if OpenTelemetry could have made it."""
    own = span_id or ""
    return own if _OTEL_ID.fullmatch(own) and int(own, 16) else _digest(episode_id, f"span {own}")


def _digest(*parts: str) -> str:
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()


def _ns(seconds: float) -> int:
    return round(min(LATEST_NS / 1e9, max(0.0, seconds)) * 1e9)


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()

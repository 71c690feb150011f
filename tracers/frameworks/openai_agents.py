"""The OpenAI Agents SDK's spans as ours, by a tracing processor behind a trace provider of our own.

The SDK sends every trace to OpenAI with the key in OPENAI_API_KEY, which in a rollout is the rollout server's: nothing of a rollout
may go there. And most users who serve a model themselves have disabled tracing to silence just that. So inside a rollout
spans go to our processor, whatever the agent has disabled, and to the processors that the agent added after this hook was
installed, unless it has disabled tracing; never to the SDK's own exporter. Outside of rollouts all is as it was.
"""

from __future__ import annotations

import os
from typing import Any, TypeVar

from agents.tracing import (
    AgentSpanData,
    CustomSpanData,
    FunctionSpanData,
    GuardrailSpanData,
    HandoffSpanData,
    MCPListToolsSpanData,
    ResponseSpanData,
    Span,
    SpanData,
    Trace,
    TraceProvider,
    TracingConfig,
    TracingProcessor,
    get_current_span,
    get_current_trace,
    get_trace_provider,
    set_trace_provider,
)
from agents.tracing.provider import DefaultTraceProvider
from agents.tracing.spans import NoOpSpan

from tracers.frameworks.runs import FrameworkSpans, rollout_here

Data = TypeVar("Data", bound=SpanData)


def install() -> None:
    set_trace_provider(RolloutTraceProvider(get_trace_provider(), SpanProcessor()))


class SpanProcessor(TracingProcessor):
    """Agents, tools, handoffs, guardrails and spans of the agent's own are recorded; what is between them is not."""

    def __init__(self) -> None:
        self._spans = FrameworkSpans(_current_span)
        self.quiet: set[str] = set()
        """Ids of the running traces that the agent has disabled: nobody but us sees them."""
        self.nameless: set[str] = set()
        """Ids of spans that the SDK opens, disabled, only to disable what is in them."""

    def on_span_start(self, span: Span[Any]) -> None:
        name, kind = _name_and_kind(span.span_data)
        if span.span_id in self.nameless:
            self.nameless.discard(span.span_id)
            kind = None
        self._spans.begin(span.span_id, span.parent_id, name, kind)

    def on_span_end(self, span: Span[Any]) -> None:
        data = span.span_data
        if isinstance(data, ResponseSpanData) and data.response is not None:
            self._spans.link(span.span_id, data.response.id)
        self._spans.end(span.span_id, attributes=_attributes(data), error=_error(span))

    def on_trace_start(self, trace: Trace) -> None: ...

    def on_trace_end(self, trace: Trace) -> None:
        self.quiet.discard(trace.trace_id)

    def shutdown(self) -> None: ...

    def force_flush(self) -> None: ...


class RolloutTraceProvider(TraceProvider):
    """Inside a rollout, ours; outside, the one that was there."""

    def __init__(self, before: TraceProvider, processor: SpanProcessor) -> None:
        self._outside = before
        self._processor = processor
        self._shown, self._quiet = DefaultTraceProvider(), DefaultTraceProvider()
        for provider in (self._shown, self._quiet):
            provider.register_processor(processor)
            provider.set_disabled(False)
        self._disabled = os.environ.get("OPENAI_AGENTS_DISABLE_TRACING", "").lower() in ("true", "1")

    def register_processor(self, processor: TracingProcessor) -> None:
        self._outside.register_processor(processor)
        self._shown.register_processor(processor)

    def set_processors(self, processors: list[TracingProcessor]) -> None:
        self._outside.set_processors(processors)
        self._shown.set_processors([self._processor, *processors])

    def set_disabled(self, disabled: bool) -> None:
        self._outside.set_disabled(disabled)
        self._disabled = disabled

    def create_trace(
        self,
        name: str,
        trace_id: str | None = None,
        group_id: str | None = None,
        metadata: dict[str, Any] | None = None,
        disabled: bool = False,
        tracing: TracingConfig | None = None,
    ) -> Trace:
        if rollout_here() is None:
            return self._outside.create_trace(name, trace_id, group_id, metadata, disabled, tracing)
        if not (disabled or self._disabled):
            return self._shown.create_trace(name, trace_id, group_id, metadata, tracing=tracing)
        trace = self._quiet.create_trace(name, trace_id, group_id, metadata)
        self._processor.quiet.add(trace.trace_id)
        return trace

    def create_span(
        self,
        span_data: Data,
        span_id: str | None = None,
        parent: Trace | Span[Any] | None = None,
        disabled: bool = False,
    ) -> Span[Data]:
        if rollout_here() is None:
            return self._outside.create_span(span_data, span_id, parent, disabled)
        masked = parent is None and isinstance(get_current_span(), NoOpSpan)
        within = parent or get_current_trace()
        if masked:
            parent = within
        quiet = (
            disabled or self._disabled or masked or (within is not None and within.trace_id in self._processor.quiet)
        )
        span = (self._quiet if quiet else self._shown).create_span(span_data, span_id, parent)
        if disabled and isinstance(span_data, CustomSpanData):
            self._processor.nameless.add(span.span_id)
        return span

    def get_current_trace(self) -> Trace | None:
        return self._outside.get_current_trace()

    def get_current_span(self) -> Span[Any] | None:
        return self._outside.get_current_span()

    def time_iso(self) -> str:
        return self._outside.time_iso()

    def gen_trace_id(self) -> str:
        return self._outside.gen_trace_id()

    def gen_span_id(self) -> str:
        return self._outside.gen_span_id()

    def gen_group_id(self) -> str:
        return self._outside.gen_group_id()

    def force_flush(self) -> None:
        self._outside.force_flush()
        self._shown.force_flush()

    def shutdown(self) -> None:
        self._outside.shutdown()
        self._shown.shutdown()


def _current_span() -> str | None:
    span = get_current_span()
    return span.span_id if span is not None else None


def _name_and_kind(data: SpanData) -> tuple[str, str | None]:
    match data:
        case AgentSpanData():
            return data.name, "agent"
        case FunctionSpanData():
            return data.name, "tool"
        case HandoffSpanData():
            return f"from {data.from_agent}", "handoff"
        case GuardrailSpanData() | CustomSpanData():
            return data.name, "chain"
        case MCPListToolsSpanData():
            return f"tools of {data.server}", "chain"
    return "", None


def _attributes(data: SpanData) -> dict[str, Any]:
    match data:
        case FunctionSpanData():
            return {"arguments": data.input, "result": data.output}
        case HandoffSpanData():
            return {"from_agent": data.from_agent, "to_agent": data.to_agent}
        case GuardrailSpanData():
            return {"triggered": data.triggered}
        case CustomSpanData():
            return dict(data.data)
    return {}


def _error(span: Span[Any]) -> str | None:
    if span.error is None:
        return None
    details = span.error.get("data")
    return f"{span.error['message']}: {details}" if details else span.error["message"]

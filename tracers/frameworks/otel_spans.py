"""OpenTelemetry spans as ours, by a span processor; and the tracer provider of a process that has none.

What a span means is read as from OTLP (`lightning_rl.otlp.read`), so that an instrumented agent looks the same whether its spans
come from inside or are sent to the server. They keep their ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, Decision, Sampler, SamplingResult

from lightning_rl.otlp import OtelEvent, OtelSpan
from lightning_rl.otlp.names import NO_SPANS, RESPONSE_IDS, first, kind_of, name_of
from lightning_rl.otlp.read import received
from tracers.frameworks import autogen
from tracers.frameworks.runs import FrameworkSpans, rollout_here
from tracers.frameworks.steps import this_step

Key = tuple[int, int]
"""Ids of trace and span."""


class Bridge(SpanProcessor):
    """Puts every span that begins inside a rollout into it."""

    def __init__(self) -> None:
        self._spans = FrameworkSpans(lambda: _key(trace.get_current_span().get_span_context()))

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        form = _form(span)
        if form.stands_for is not None:
            around = trace.get_current_span(parent_context)
            if (getattr(around, "attributes", None) or {}).get(autogen.DESTINATION) == form.stands_for:
                self._spans.discard(_key(around.get_span_context()))
        context = span.get_span_context()
        self._spans.begin(
            _key(context),
            _key(span.parent),
            form.name,
            form.kind,
            unsettled=form.unsettled,
            names=True if form.unsettled else None,
            span_id=trace.format_span_id(context.span_id),
            step=this_step(),
        )

    def on_end(self, span: ReadableSpan) -> None:
        key = _key(span.get_span_context())
        rollout = self._spans.rollout(key)
        if rollout is None:
            return
        form, told = _form(span), _told(span)
        meaning = received([told], rollout.episode_id)
        self._spans.link(key, first(told.attributes, RESPONSE_IDS))
        for reward in meaning.rewards:
            self._spans.reward(key, reward)
        own = next((each for each in meaning.spans if each.id == told.id), None)
        for refused in meaning.spans:
            if refused is not own:
                rollout.emit(refused)
        if own is None or form.unsettled:
            self._spans.end(key, error=own.error if own is not None else None)
        else:
            self._spans.end(key, name=form.name, kind=form.kind, attributes=own.attributes, error=own.error)


class Watched(Sampler):
    """The agent's own sampler, except that a span of a rollout which it drops is made all the same, for us and not for its
    exporters: recorded, and not sampled."""

    def __init__(self, own: Sampler) -> None:
        self._own = own

    def should_sample(
        self, parent_context: Context | None, trace_id: int, name: str, *args: Any, **kwargs: Any
    ) -> SamplingResult:
        result = self._own.should_sample(parent_context, trace_id, name, *args, **kwargs)
        if result.decision is not Decision.DROP or rollout_here() is None:
            return result
        attributes = kwargs.get("attributes", args[1] if len(args) > 1 else None)
        return SamplingResult(Decision.RECORD_ONLY, attributes, result.trace_state)

    def get_description(self) -> str:
        return self._own.get_description()


class StandbyProvider(TracerProvider):
    """Makes spans while the agent has set no provider of its own, and hands everything on to that one afterwards.

    OpenTelemetry takes one provider for good; whoever sets the agent's must set `successor` instead. Who has got hold of the
    standby before finds in it what the agent's own provider has.
    """

    def __getattr__(self, name: str) -> Any:
        successor = self.__dict__.get("successor")
        if successor is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(successor, name)

    @property
    def resource(self) -> Resource:
        return getattr(self.successor, "resource", super().resource)

    def __init__(self) -> None:
        super().__init__(sampler=ALWAYS_ON, resource=Resource.get_empty(), shutdown_on_exit=False)
        self.successor: trace.TracerProvider | None = None

    def get_tracer(self, *args: Any, **kwargs: Any) -> trace.Tracer:
        return _StandbyTracer(self, lambda provider: provider.get_tracer(*args, **kwargs))

    def own_tracer(self, ask: Callable[[trace.TracerProvider], trace.Tracer]) -> trace.Tracer:
        return ask(super())  # type: ignore[arg-type]

    def add_span_processor(self, span_processor: SpanProcessor) -> None:
        add = getattr(self.successor, "add_span_processor", super().add_span_processor)
        add(span_processor)

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        flush = getattr(self.successor, "force_flush", super().force_flush)
        return bool(flush(timeout_millis))

    def shutdown(self) -> None:
        getattr(self.successor, "shutdown", super().shutdown)()


class _StandbyTracer(trace.Tracer):
    """The tracer of whichever provider counts at the moment: modules keep theirs from before the agent sets a provider."""

    def __init__(self, standby: StandbyProvider, ask: Callable[[trace.TracerProvider], trace.Tracer]) -> None:
        self._standby = standby
        self._ask = ask
        self._own = standby.own_tracer(ask)
        self._successor: trace.Tracer | None = None

    def start_span(self, *args: Any, **kwargs: Any) -> trace.Span:
        return self._tracer().start_span(*args, **kwargs)

    def start_as_current_span(self, *args: Any, **kwargs: Any) -> Any:
        return self._tracer().start_as_current_span(*args, **kwargs)

    def _tracer(self) -> trace.Tracer:
        if self._successor is None and self._standby.successor is not None:
            self._successor = self._ask(self._standby.successor)
        return self._successor or self._own


def _form(span: ReadableSpan) -> autogen.Form:
    attributes = span.attributes or {}
    special = autogen.form(attributes)
    if special is not None:
        return special
    kind = kind_of(attributes)
    return autogen.Form(name_of(kind, attributes) or span.name, None if kind in NO_SPANS else kind)


def _key(context: trace.SpanContext | None) -> Key | None:
    return (context.trace_id, context.span_id) if context is not None and context.is_valid else None


def _told(span: ReadableSpan) -> OtelSpan:
    """The span as OTLP would tell it."""
    context = span.get_span_context()
    assert context is not None
    return OtelSpan(
        id=trace.format_span_id(context.span_id),
        trace_id=trace.format_trace_id(context.trace_id),
        parent_id=trace.format_span_id(span.parent.span_id) if span.parent is not None else None,
        name=span.name,
        start_ns=span.start_time or 0,
        end_ns=span.end_time or 0,
        attributes=_plain(span.attributes),
        events=[
            OtelEvent(name=event.name, time_ns=event.timestamp, attributes=_plain(event.attributes))
            for event in span.events
        ],
        status=span.status.status_code.value,
        status_message=span.status.description or "",
    )


def _plain(attributes: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: _plain_value(value) for key, value in (attributes or {}).items()}


def _plain_value(value: Any) -> Any:
    match value:
        case Mapping():
            return _plain(value)
        case bytes():
            return value.decode(errors="backslashreplace")
        case str():
            return value
        case Sequence():
            return [_plain_value(each) for each in value]
    return value

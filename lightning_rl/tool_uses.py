"""The tool uses of an episode: one record for each tool call of a model and each run of a tool, however many saw it.

A tool call is seen up to three times: in the reply that made it, by the server when its result comes back (a span that names
the call), and by the hooks of one or several frameworks (spans of theirs). Spans meet the tool call that they ran by its id,
else by name and equal arguments in order of time, else by name where some of the arguments or the time agree; spans of one
framework inside another's are the same run. What meets nothing stands alone. A handoff to another agent is asked for as a tool is,
and is none. Pure, and the same whatever order the records come in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from msgspec import Struct, field, structs

from lightning_rl.episode import Call, Episode, Span

_WORD_BREAK = re.compile(r"[^a-zA-Z0-9_]")


class ToolUse(Struct, frozen=True, kw_only=True):
    name: str
    arguments: Any = None
    """As a value; text that is no JSON stays the text that it is."""
    result: Any = None
    """What came back, as the framework or the server has it; None if nothing is known to have come."""
    error: str | None = None
    """Traceback or message where the tool raised."""
    call_id: str | None = None
    """The call whose reply asked for it; None where only the tool's run was seen."""
    tool_call_id: str | None = None
    span_id: str | None = None
    """The run: the framework's span, else the server's; None if the tool never ran."""
    seen_by: tuple[str, ...] = ()
    """All spans of the run, this one among them."""
    started_at: float = 0.0
    """Of the run, seconds since the epoch; of a tool that never ran, the end of the reply that asked for it."""
    ended_at: float = 0.0

    @property
    def ran(self) -> bool:
        return self.span_id is not None

    @property
    def failed(self) -> bool:
        """It raised, or its result is a JSON object with an `error` (or MCP's `isError`), or text that begins with "error", in any
        case; of a list of parts the first counts."""
        return self.error is not None or _says_error(self.result)


def tool_uses(episode: Episode) -> list[ToolUse]:
    """In the order in which they were asked for; those that nobody is known to have asked for, by when they ran.

    A tool call in a reply that was broken off counts only if it ran all the same.
    """
    asked = [use for call in sorted(episode.calls, key=_call_order) for use in _asked(call)]
    matched, alone = _match(asked, _runs(episode.spans))
    aborted = {call.id for call in episode.calls if call.finish_reason == "abort"}
    timed = [
        (use.started_at, _seen(use, spans))
        for use, spans in zip(asked, matched, strict=True)
        if spans or use.call_id not in aborted
    ]
    timed += [(run[0].started_at, _seen(_unasked(run), run)) for run in alone]
    handoffs = {name for span in episode.spans if span.kind == "handoff" for name in _handoff_tools(span)}
    return [use for _, use in sorted(timed, key=lambda entry: entry[0]) if use.name not in handoffs]


def _handoff_tools(handoff: Span) -> set[str]:
    """Names that its tool may have: AutoGen's span has the tool's, that of the Agents SDK the name of the agent that took over."""
    to_agent = handoff.attributes.get("to_agent")
    return {handoff.name, *(["transfer_to_" + _WORD_BREAK.sub("_", str(to_agent)).lower()] if to_agent else [])}


def parsed(value: Any) -> Any:
    """The value that a JSON text says; whatever else it is stays as it is. NaN and Infinity are no JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_constant=_no_json)
    except (ValueError, RecursionError):
        return value


def _says_error(result: Any) -> bool:
    match parsed(result):
        case {"type": "text", "text": text}:
            return _says_error(text)
        case Mapping() as fields:
            return bool(fields.get("error")) or fields.get("isError") is True
        case [{"type": "text"} as first, *_]:
            return _says_error(first)
        case str() as text:
            return text.lstrip().lower().startswith("error")
        case _:
            return False


def same_call(name: str, arguments: Any) -> str:
    """Equal for tool calls of one name with equal arguments, however these are written."""
    try:
        return json.dumps([name, _plain(parsed(arguments))], sort_keys=True, default=repr)
    except RecursionError:
        return f"{name} {arguments!r}"


def _no_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _plain(value: Any) -> Any:
    """1.0 is the number that 1 is."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _call_order(call: Call) -> tuple[int, str]:
    return call.index, call.id


def _asked(call: Call) -> list[ToolUse]:
    """What the reply asks for. Its time is the reply's end."""
    return [
        ToolUse(
            name=str(function.get("name") or ""),
            arguments=_arguments(function.get("arguments") or ""),
            call_id=call.id,
            tool_call_id=str(tool_call_id or "") or None,
            started_at=call.ended_at,
            ended_at=call.ended_at,
        )
        for tool_call_id, function in _made(call.response.get("tool_calls"))
    ]


def _made(tool_calls: Any) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """Id and function of each; a record made elsewhere may have anything in their place."""
    for made in tool_calls if isinstance(tool_calls, list) else ():
        if isinstance(made, Mapping):
            function = made.get("function")
            yield made.get("id"), function if isinstance(function, Mapping) else {}


def _arguments(written: Any) -> Any:
    """As a value; models write nothing for a tool without parameters."""
    return {} if written == "" else parsed(written)


def _is_servers(span: Span) -> bool:
    return "call_id" in span.attributes


def _runs(spans: Sequence[Span]) -> list[list[Span]]:
    """The tool spans by runs, in order of time: a span inside one of the same name is the same run, seen by somebody else."""
    by_id = {span.id: span for span in spans}
    runs: dict[str, list[Span]] = {}
    for span in sorted(spans, key=lambda span: (span.started_at, span.ended_at, span.id)):
        if span.kind == "tool":
            runs.setdefault(_outermost(span, by_id), []).append(span)
    return list(runs.values())


def _outermost(span: Span, by_id: Mapping[str, Span]) -> str:
    """The span that is the same run, seen from furthest out. What an agent inside a tool does is its own."""
    if _is_servers(span):
        return span.id
    outermost, seen = span, {span.id}
    at = by_id.get(span.parent_id or "")
    while at is not None and at.kind != "agent" and at.id not in seen:
        seen.add(at.id)
        if at.kind == "tool" and at.name == span.name and not _differ(at, outermost):
            outermost = at
        at = by_id.get(at.parent_id or "")
    return outermost.id


def _differ(one: Span, other: Span) -> bool:
    """Whether they say that they are runs of different tool calls."""
    ids = one.attributes.get("tool_call_id"), other.attributes.get("tool_call_id")
    return None not in ids and ids[0] != ids[1]


class _Place(Struct):
    """A tool call of a reply, while runs are looked for."""

    number: int
    use: ToolUse
    key: str
    """Equal for equal names and arguments."""
    spans: list[Span] = field(default_factory=list)

    @property
    def told(self) -> Span | None:
        """The server's span: when the result came back."""
        return next(filter(_is_servers, self.spans), None)

    @property
    def has_run(self) -> bool:
        """Whether somebody saw it run; the server sees only the result."""
        return not all(map(_is_servers, self.spans))


class _Run(Struct):
    """The spans of one run of a tool."""

    spans: list[Span]
    name: str
    arguments: Any
    """None if nobody says."""
    key: str | None
    """As a place's; None without arguments."""

    @classmethod
    def of(cls, spans: list[Span]) -> _Run:
        name, arguments = spans[0].name, _arguments(_said(spans, "arguments"))
        return cls(spans, name, arguments, None if arguments is None else same_call(name, arguments))

    def fits(self, place: _Place) -> bool:
        """A run that does not say its arguments fits by its name."""
        return self.name == place.use.name if self.key is None else self.key == place.key

    def nearest(self, places: Iterable[_Place]) -> _Place | None:
        """It has other arguments than a model asked for, with defaults filled in or values converted: the first place that asked
        for some of its arguments and no others, else the first whose result is known. It began between reply and result."""
        began = self.spans[0].started_at
        may = [
            place
            for place in places
            if place.use.started_at <= began and (place.told is None or began <= place.told.ended_at)
        ]
        likely = (place for place in may if _contains(self.arguments, place.use.arguments))
        return next(likely, None) or next((place for place in may if place.told is not None), None)


def _match(asked: Sequence[ToolUse], runs: Sequence[list[Span]]) -> tuple[list[list[Span]], list[list[Span]]]:
    """The spans of each tool call, and the runs that belong to none."""
    places = [_Place(number, use, same_call(use.name, use.arguments)) for number, use in enumerate(asked)]
    by_id: dict[str | None, list[_Place]] = {}
    for place in places:
        by_id.setdefault(place.use.tool_call_id, []).append(place)
    strangers: dict[str, list[Span]] = {}
    nameless = []
    for run in map(_Run.of, runs):
        tool_call_id = str(_said(run.spans, "tool_call_id") or "") or None
        found = _asked_by_id(by_id, tool_call_id, run)
        if found is not None:
            found.spans += run.spans
        elif tool_call_id is not None:
            strangers.setdefault(tool_call_id, []).extend(run.spans)
        else:
            nameless.append(run)
    alone = [*strangers.values(), *(run.spans for run in _place_by_content(places, nameless))]
    return [place.spans for place in places], alone


def _place_by_content(places: Sequence[_Place], runs: Sequence[_Run]) -> list[_Run]:
    """Equal arguments before others that may be; what was answered, and so has run for certain, before what was not."""
    free = sorted((place for place in places if not place.has_run), key=lambda place: not place.spans)
    waiting: dict[str, dict[int, _Place]] = {}
    named: dict[str, dict[int, _Place]] = {}
    for place in free:
        waiting.setdefault(place.key, {})[place.number] = place
        named.setdefault(place.use.name, {})[place.number] = place
    left = []
    for run in runs:
        fitting = named.get(run.name, {}) if run.key is None else waiting.get(run.key, {})
        left += [] if _taken(run, next(iter(fitting.values()), None), waiting, named) else [run]
    return [run for run in left if not _taken(run, run.nearest(named.get(run.name, {}).values()), waiting, named)]


def _taken(run: _Run, place: _Place | None, *free: dict[str, dict[int, _Place]]) -> bool:
    """Whether there is a place; the run is there then, and the place free no more."""
    if place is None:
        return False
    place.spans += run.spans
    for entries, name in zip(free, (place.key, place.use.name), strict=True):
        del entries[name][place.number]
    return True


def _contains(arguments: Any, asked: Any) -> bool:
    if not isinstance(arguments, Mapping) or not isinstance(asked, Mapping):
        return False
    return all(name in arguments and _plain(arguments[name]) == _plain(asked[name]) for name in asked)


def _said(run: Sequence[Span], attribute: str) -> Any:
    return next((span.attributes[attribute] for span in run if span.attributes.get(attribute) is not None), None)


def _asked_by_id(by_id: Mapping[str | None, Sequence[_Place]], tool_call_id: str | None, run: _Run) -> _Place | None:
    """Ids are the model's, and may come again or be empty: the call that the server names, else the latest before the run; of
    several places there is one that fits, and is free of the server's word."""
    call_id = _said(run.spans, "call_id")
    if call_id is not None:
        named = [place for place in by_id.get(tool_call_id, []) if place.use.call_id == call_id]
        return min(named, key=lambda place: (place.told is not None, not run.fits(place)), default=None)
    if tool_call_id is None:
        return None
    places = by_id.get(tool_call_id, [])
    before = [place for place in places if place.use.started_at <= run.spans[0].started_at]
    fitting = [place for place in before if run.fits(place)]
    return next(iter([*reversed(fitting), *reversed(before), *places]), None)


def _unasked(run: Sequence[Span]) -> ToolUse:
    return ToolUse(
        name=run[0].name,
        arguments=_arguments(_said(run, "arguments")),
        call_id=_said(run, "call_id"),
        tool_call_id=str(_said(run, "tool_call_id") or "") or None,
    )


def _seen(use: ToolUse, spans: Sequence[Span]) -> ToolUse:
    """The tool call with what its spans saw. A framework saw the run itself, the server what the model was told of it; of
    several runs (a framework that tries again, or a span around another) the last to end counts."""
    if not spans:
        return use
    ordered = sorted(spans, key=lambda span: (_is_servers(span), -span.ended_at, span.started_at, span.id))
    run = ordered[0]
    told = sorted(ordered, key=_is_servers, reverse=True)
    return structs.replace(
        use,
        result=_said(told, "result"),
        error=run.error,
        span_id=run.id,
        seen_by=tuple(span.id for span in ordered),
        started_at=run.started_at,
        ended_at=run.ended_at,
    )

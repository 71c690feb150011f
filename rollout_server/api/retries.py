"""Requests that are sent again: which of the earlier ones a request repeats, and the answer that it had.

A client says that it sends something again by counting (`x-stainless-retry-count`, as OpenAI's and Anthropic's SDKs do) or by an
`Idempotency-Key`. What it repeats belongs to the same episode and has the same route and the same body, and the same key or, if
there is none, the same span and agent. Whatever has one key is one request, and all of it gets one answer. What is counted
repeats, of several that nothing has followed yet, one with the highest count below its own: an agent that asks the same thing
many times at once gets as many answers. It is one that failed if one has; an answer is given again only when all of them have
one, since it may be another's. Two identical requests without such a mark are two requests.

The store tells what was answered, so that it can be told after a restart, too: the choices of a request are calls whose ids
begin with the id of their exchange, and the id of an exchange begins with a digest of the request's key. An answer that cannot
be told as it was is none: one that was broken off, or redacted, or whose alternatives to its tokens are asked for and not kept.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from starlette.requests import Request

from lightning_rl.episode import Call
from lightning_rl.join import SPAN_HEADER
from rollout_server import messages as m
from rollout_server.api.engine.engine_client import Stream
from rollout_server.api.front.joining import agent_of

RETRY_COUNT_HEADER = "x-stainless-retry-count"
KEY_HEADER = "idempotency-key"

Naming = Callable[[str, int], str]
"""The id of the response that a client gets for a choice: of the exchange's id and the choice's number."""

_KEPT = 1024
"""Sendings of one episode that are remembered; more only while they are under way."""
_KEY_DIGITS = 16
_WHOLE = ("stop", "length", "tool_calls")


@dataclass(frozen=True)
class Asker:
    """What a request's headers say of who sends it again."""

    attempt: int
    """How often the client had sent it before, as it counts; 0 if it does not."""
    key: str | None
    span_id: str | None
    agent: str

    def may_have_made(self, call: Call, body: Mapping[str, Any]) -> bool:
        """Whether its earlier sending can be this call. A span that only `traceparent` tells may be of one sending alone."""
        if self.key is not None:
            mine = call.id.startswith(key_digits(self.key))
        else:
            mine = call.agent == self.agent and self.span_id in (None, call.span_id)
        return mine and call.request == body

    @property
    def may_repeat(self) -> bool:
        return self.key is not None or self.attempt > 0


@dataclass(frozen=True)
class Answered:
    """A request whose choices are all in the store, as they ended."""

    exchange_id: str
    calls: Sequence[Call]
    """In the order of the choices."""
    known: bool
    """This process has answered it, so that all that follows from it has happened here."""


@dataclass(eq=False, slots=True)
class Sending:
    """One arrival of a request. It is over when all that was sampled for it is recorded."""

    home: Sendings = field(repr=False)
    print: bytes
    exchange_id: str
    attempt: int
    repeats: Sending | None = field(default=None, repr=False)
    """What it follows, until that is settled."""
    conducted: bool = False
    """Something is sampled for it."""
    ended: int | None = None
    """When, in the order of ends."""
    whole: bool = False
    """Its answer is in the store."""
    followed: bool = False
    """The client has sent it once more."""

    def end(self, *, whole: bool) -> None:
        """Idempotent: the first word counts."""
        if self.ended is None:
            self.ended, self.whole = self.home.next_end(), whole


class Sendings:
    """Of one episode, the latest of them; for one event loop."""

    def __init__(self, has_past: bool = False) -> None:
        self.has_past = has_past
        """There may be answers that this process does not know, from before its time or forgotten."""
        self._known: list[Sending] = []
        self._ends = 0
        self._next_end: asyncio.Future[None] | None = None
        """There if somebody waits for it."""

    def next_end(self) -> int:
        """The number of an end that has just come."""
        if self._next_end is not None:
            self._next_end.set_result(None)
            self._next_end = None
        self._ends += 1
        return self._ends

    def begin(self, print_: bytes, exchange_id: str, attempt: int, repeats: Sending | None = None) -> Sending:
        if len(self._known) >= _KEPT:
            oldest = next((known for known in self._known if known.ended is not None), None)
            if oldest is not None:
                self._known.remove(oldest)
                self.has_past = True
        sending = Sending(self, print_, exchange_id, attempt, repeats)
        self._known.append(sending)
        return sending

    def begin_again(self, print_: bytes, exchange_id: str, attempt: int | None) -> Sending | None:
        """One that `repeats` what is known with its print. `attempt` None: it has a key. None: what may decide it is under way, and
        `an_end` has to come first."""
        alike = [known for known in self._known if known.print == print_]
        if attempt is not None:
            earlier = [known for known in alike if known.attempt < attempt and not known.followed]
            alike = [known for known in earlier if known.attempt == max(other.attempt for other in earlier)]
        over = [known for known in alike if known.ended is not None]
        deciding = [known for known in over if known.whole == (attempt is None)]
        if not deciding and len(over) < len(alike):
            return None
        if attempt is not None:
            deciding = deciding or over
        repeated = max(deciding, key=lambda known: known.ended or 0, default=None)
        if repeated is not None:
            repeated.followed = True
        return self.begin(print_, exchange_id, attempt or 0, repeated)

    async def an_end(self) -> None:
        """The next of any of them."""
        if self._next_end is None:
            self._next_end = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._next_end)

    def withdraw(self, sending: Sending) -> None:
        """It got no answer for a reason that the next try need not meet: as if it had not come."""
        self._known.remove(sending)
        if sending.repeats is not None:
            sending.repeats.followed = False
        sending.end(whole=False)


def asker_of(http: Request) -> Asker:
    counted = http.headers.get(RETRY_COUNT_HEADER, "")
    return Asker(
        attempt=int(counted) if counted.isdecimal() and counted.isascii() and len(counted) < 10 else 0,
        key=http.headers.get(KEY_HEADER) or None,
        span_id=http.headers.get(SPAN_HEADER) or None,
        agent=agent_of(http),
    )


def fingerprint(naming: Naming, raw_body: bytes, asker: Asker) -> bytes:
    """What two sendings of one request have in common. The route shows in how its responses are named."""
    said = (asker.key,) if asker.key is not None else ("", asker.span_id or "", asker.agent)
    parts = [naming("", 0).encode(), raw_body, *(part.encode("utf-8", "replace") for part in said)]
    return blake2b(b"".join(len(part).to_bytes(8, "big") + part for part in parts), digest_size=16).digest()


def new_exchange_id(key: str | None) -> str:
    """32 hexadecimal digits; those with one key begin alike."""
    return uuid.uuid4().hex if key is None else key_digits(key) + uuid.uuid4().hex[_KEY_DIGITS:]


def key_digits(key: str) -> str:
    """What the ids of a key's exchanges begin with."""
    return blake2b(key.encode("latin-1"), digest_size=_KEY_DIGITS // 2).hexdigest()


def answered(
    calls: Sequence[Call], naming: Naming, choices: int, *, alternatives: bool = False
) -> tuple[str, list[Call]] | None:
    """The latest exchange among the calls, with its id; None if it was not answered, or cannot be answered so again:
    `alternatives` to its tokens belong to the answer."""
    exchanges: dict[str, list[Call]] = {}
    for call in calls:
        exchange_id, dash, number = call.id.rpartition("-")
        if dash and number.isdecimal() and call.response_id == naming(exchange_id, int(number)):
            exchanges.setdefault(exchange_id, []).append(call)
    if not exchanges:
        return None
    exchange_id, made = max(exchanges.items(), key=lambda entry: max(call.ended_at for call in entry[1]))
    made.sort(key=lambda call: int(call.id.rpartition("-")[2]))
    told = all(call.finish_reason in _WHOLE and not call.redacted and not call.upstream for call in made)
    told = told and not (alternatives and any(len(call.alternatives) < len(call.sampled_ids) for call in made))
    return (exchange_id, made) if told and len(made) == choices else None


@dataclass
class Replayed:
    """A recorded answer in the engine's place: the same tokens, in one piece."""

    calls: Sequence[Call]
    flow: str
    adapter: str

    def stream(self, number: int) -> Stream:
        """Of choice `number`."""
        call = self.calls[number]
        stream = Stream(lambda _: None)
        stream.deliver(
            m.Tokens(
                request_id=call.id,
                index=number,
                ids=call.sampled_ids,
                logprobs=call.logprobs,
                versions=call.versions,
                entropies=call.entropies,
                top_logprobs=call.alternatives,
                finish_reason="length" if call.finish_reason == "length" else "stop",
                cached_tokens=call.cached_tokens,
            )
        )
        return stream

    def close(self) -> None:
        """There is nothing to cancel."""

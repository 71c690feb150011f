"""What the server takes on at most, and who is refused when it is full.

`Limits` are the settings; `Admission` counts what waits and what runs, and refuses with a typed error before anything is sent to
the engine: 429 to one flow that has too much under way, 503 to anybody when too much waits, both with `Retry-After`. No flow may
have more waiting than it leaves room for others: alone half of the queue, beside another that has as much a third, and so on,
so that whoever comes next finds room. Its tables hold what is under way and nothing else. Who goes first among those admitted is
the manager's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Self

from msgspec import Struct

from rollout_server.api.errors import ApiError

RETRY_AFTER_S = 1


class Limits(Struct, frozen=True, kw_only=True):
    """The defaults leave room for thousands of agents at once, and end what nobody would end."""

    body_bytes: int = 32 * 2**20
    """Of one request's body."""
    bodies_bytes: int = 2**30
    """Of the bodies of all requests under way."""
    queued_requests: int = 8192
    """Choices of requests without a first token yet."""
    queued_tokens: int = 16_000_000
    """Prompt tokens of requests without a first token yet: about 40 bytes each, here and in the manager."""
    flow_requests: int = 2048
    """Requests under way of one flow: of one episode, or one key from one address."""
    flow_choices: int = 8192
    """Their choices."""
    request_timeout_s: float = 3600.0
    """From the request's head to the last byte of its answer."""
    read_timeout_s: float = 60.0
    """For a request to arrive whole."""
    write_timeout_s: float = 60.0
    """For a client to take up what stands in its way."""
    connections: int = 8192


@dataclass
class _Flow:
    """What it has under way, and what of that waits."""

    requests: int = 0
    choices: int = 0
    queued_choices: int = 0
    queued_tokens: int = 0


class Admission:
    """Single-threaded: use it from one event loop."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.queued_requests = 0
        """Choices of requests without a first token."""
        self.queued_tokens = 0
        self.running_requests = 0
        """Choices of requests with a first token."""
        self._flows: dict[str, _Flow] = {}

    @property
    def flows(self) -> int:
        """How many have something under way."""
        return len(self._flows)

    def enter(self, flow: str, choices: int, prompt_tokens: int) -> Ticket:
        """`prompt_tokens` are counted once for all choices of a prompt. The ticket is left again, by `with` or `leave`.

        Raises:
            ApiError: 429 for too much of the flow, 503 when too much waits. An empty queue takes anything, and of a flow
                with nothing under way any number of choices.
        """
        limits = self._limits
        own = self._flows.get(flow, _Flow())
        if own.requests >= limits.flow_requests:
            raise _flow_is_full(f"{own.requests} requests of this client are under way")
        if own.requests and own.choices + choices > limits.flow_choices:
            raise _flow_is_full(f"{own.requests} requests of this client with {own.choices} choices are under way")
        room = limits.queued_requests - self.queued_requests
        tokens_room = limits.queued_tokens - self.queued_tokens
        if self.queued_requests and (choices > room or prompt_tokens > tokens_room):
            raise ApiError(
                503,
                f"the server is full: {self.queued_requests} requests with {self.queued_tokens} prompt tokens wait",
                code="queue_full",
                retry_after=RETRY_AFTER_S,
            )
        if own.queued_choices and (
            own.queued_choices + choices > room or own.queued_tokens + prompt_tokens > tokens_room
        ):
            raise _flow_is_full(
                f"{own.queued_choices} choices with {own.queued_tokens} prompt tokens of this client wait"
            )
        return Ticket(self, flow, choices, prompt_tokens)

    def count(self, flow: str, requests: int, choices: int) -> None:
        """More, or less, is under way."""
        own = self._flows.setdefault(flow, _Flow())
        own.requests += requests
        own.choices += choices
        if not own.requests:
            del self._flows[flow]

    def count_waiting(self, flow: str, choices: int, prompt_tokens: int) -> None:
        own = self._flows[flow]
        own.queued_choices += choices
        own.queued_tokens += prompt_tokens
        self.queued_requests += choices
        self.queued_tokens += prompt_tokens


def _flow_is_full(what: str) -> ApiError:
    return ApiError(429, f"{what}, and it may have no more now", code="rate_limit_exceeded", retry_after=RETRY_AFTER_S)


class Ticket:
    """One admitted request: it waits until `began`, and is under way until `leave`. Both are idempotent."""

    def __init__(self, admission: Admission, flow: str, choices: int, prompt_tokens: int) -> None:
        self._admission: Admission | None = admission
        self._flow = flow
        self._choices = choices
        self._prompt_tokens = prompt_tokens
        self._waits = True
        admission.count(flow, 1, choices)
        admission.count_waiting(flow, choices, prompt_tokens)

    def began(self) -> None:
        """Its first token is there."""
        if self._waits and self._admission is not None:
            self._end_wait(self._admission)
            self._admission.running_requests += self._choices

    def leave(self) -> None:
        admission, self._admission = self._admission, None
        if admission is None:
            return
        if self._waits:
            self._end_wait(admission)
        else:
            admission.running_requests -= self._choices
        admission.count(self._flow, -1, -self._choices)

    def _end_wait(self, admission: Admission) -> None:
        self._waits = False
        admission.count_waiting(self._flow, -self._choices, -self._prompt_tokens)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()

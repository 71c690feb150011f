"""One choice while it is sampled: tokens in, text out, and everything that its record will need.

Stop strings are found on decoded text; the token that completes one is the last that counts, whatever the engine was
ahead. When nobody reads along and no stop string is asked for, the choice sleeps until the engine is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from rollout_server import messages as m
from rollout_server.api.engine.engine_client import Stream
from rollout_server.api.errors import EngineError
from rollout_server.api.replies.detokenize import Detokenizer, StopFinder
from rollout_server.api.replies.reply import Reader, ToolCall


@dataclass(frozen=True)
class Piece:
    """What one message of the engine added to a choice."""

    text: str
    ids: list[int]
    logprobs: list[float]
    top_logprobs: list[list[tuple[int, float]]]
    ends: Sequence[int] = ()
    """Where the text of each token ends in `text`; what comes after the last one was held back to the end."""

    def by_token(self) -> list[Piece]:
        """A piece for each token, and one without a token for what was held back."""
        starts = [0, *self.ends]
        pieces = [
            Piece(self.text[starts[at] : end], [self.ids[at]], [self.logprobs[at]], self.top_logprobs[at : at + 1])
            for at, end in enumerate(self.ends)
        ]
        rest = self.text[starts[-1] :]
        return [*pieces, Piece(rest, [], [], [])] if rest else pieces


@dataclass
class Choice:
    prompt_ids: list[int]
    sampling: m.SamplingParams
    stops: Sequence[str] = ()
    shown: Collection[int] = ()
    """Special tokens that have a text."""
    until_call: Reader | None = None
    """Ends the choice when this reader has found a tool call."""
    told: int = 0
    """Alternatives of each token that the client gets; there may be more, for the record."""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    alternatives: list[list[tuple[int, float]]] = field(default_factory=list)
    """As in the call."""
    text: str = ""
    ends: list[int] = field(default_factory=list)
    """Where the text of each token ends in `text`."""
    cached_tokens: int = 0
    finish_reason: str | None = None
    """`stop` or `length`; `abort` when the client went away or the engine failed."""
    stop: str | None = None
    """The stop string that ended it."""

    async def run(self, stream: Stream, tokenizer: Tokenizer, on_piece: Callable[[Piece], None] | None = None) -> None:
        """Read the stream to the end. Cancelling the task closes it; what was sampled until then stays in `ids`."""
        decoder = Detokenizer(tokenizer, self.shown)
        finder = StopFinder(self.stops)
        reads_along = on_piece is not None or bool(self.stops) or self.until_call is not None
        with stream:
            try:
                while self.finish_reason is None:
                    piece = self._absorb(await stream.read(to_end=not reads_along), decoder, finder)
                    if on_piece is not None:
                        on_piece(piece)
            except (asyncio.CancelledError, EngineError):
                unread = stream.take()
                if unread is not None:
                    self._absorb(unread, decoder, finder)
                self.finish_reason = "abort"
                raise

    def as_piece(self) -> Piece:
        """The whole choice as one piece."""
        return Piece(self.text, self.ids, self.logprobs, self._told(0), self.ends)

    def _absorb(self, tokens: m.Tokens, decoder: Detokenizer, finder: StopFinder) -> Piece:
        before, start, text = len(self.ids), len(self.text), ""
        self.cached_tokens = max(self.cached_tokens, tokens.cached_tokens)
        for at, token_id in enumerate(tokens.ids):
            self.ids.append(token_id)
            self.logprobs.append(tokens.logprobs[at])
            self.versions.append(tokens.versions[at])
            if tokens.entropies:
                self.entropies.append(tokens.entropies[at])
            if tokens.top_logprobs:
                self.alternatives.append(tokens.top_logprobs[at])
            new = finder.feed(decoder.feed(token_id))
            called = self._first_call_ends(new)
            text += new[:called]
            self.ends.append(start + len(text))
            if finder.found is not None:
                self.finish_reason, self.stop = "stop", finder.found
                break
            if called is not None:
                self.finish_reason = "stop"
                break
        else:
            self.finish_reason = tokens.finish_reason
            if self.finish_reason is not None:
                text += finder.feed(decoder.finish()) + finder.finish()
        self.text += text
        ends = [end - start for end in self.ends[before:]]
        return Piece(text, self.ids[before:], self.logprobs[before:], self._told(before), ends)

    def _told(self, first: int) -> list[list[tuple[int, float]]]:
        """Alternatives for the client, of the tokens from `first` on."""
        return [likeliest[: self.told] for likeliest in self.alternatives[first:]] if self.told else []

    def _first_call_ends(self, new: str) -> int | None:
        """How much of `new` belongs to the reply if its first call ends there: a token may begin the next one, too."""
        if self.until_call is None:
            return None
        for at, character in enumerate(new):
            if any(isinstance(event, ToolCall) for event in self.until_call.feed(character)):
                return at + 1
        return None


def version_spans(versions: Sequence[int]) -> list[dict[str, int]]:
    """Runs of tokens that one policy version sampled: [start, end)."""
    spans: list[dict[str, int]] = []
    for at, version in enumerate(versions):
        if spans and spans[-1]["version"] == version:
            spans[-1]["end"] = at + 1
        else:
            spans.append({"version": version, "start": at, "end": at + 1})
    return spans

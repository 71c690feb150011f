"""Calls and spans without the secrets in them, as they go to the store. What the process goes on working with stays exact.

A secret in a call is in its request, its response and its token ids: texts are redacted, and every id that a piece of a secret
came from becomes the end-of-turn id, which says nothing. Such a call says that it is `redacted`, and is not trained on. Log-probs
and versions keep their places; entropies and alternatives, which could spell what was taken out, are left out.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from msgspec import structs
from tokenizers import Tokenizer

from lightning_rl.episode import Call, Span
from lightning_rl.otlp.read import Received
from lightning_rl.redact import Redactor, TooSlow
from rollout_server.api.replies.detokenize import Detokenizer

_ROUNDS = 4
"""What is left of a text may come to fit a pattern once something was taken out of it."""
_ID_FIELDS = ("prompt", "input_ids")
"""Fields of a request that may hold token ids, or lists of them."""


class Redaction:
    def __init__(self, redactor: Redactor, tokenizer: Tokenizer, filler: int) -> None:
        """`filler` is the id that takes the place of others."""
        self._redactor = redactor
        self._tokenizer = tokenizer
        self._filler = filler
        self._special = frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)

    @property
    def is_slow(self) -> bool:
        """Whether a call may take long: patterns are searched for, not only known keys."""
        return self._redactor.has_patterns

    def call(self, call: Call) -> Call:
        """The very same one if there is nothing to take out."""
        request, response = self._redactor.value(call.request), self._redactor.value(call.response)
        given = [call.request[name] for name in _ID_FIELDS if isinstance(call.request.get(name), list)]
        clean = request is call.request and response is call.response
        if clean and not given and self._spells_no_key([*call.prompt_ids, *call.sampled_ids]):
            return call
        ids = self.ids([*call.prompt_ids, *call.sampled_ids])
        if given:
            request = {**request, **{name: self._given_ids(request[name]) for name in _ID_FIELDS if name in request}}
        clean = clean and request == call.request
        if clean and ids == [*call.prompt_ids, *call.sampled_ids]:
            return call
        at = len(call.prompt_ids)
        return structs.replace(
            call,
            request=request,
            response=response,
            prompt_ids=ids[:at],
            sampled_ids=ids[at:],
            entropies=[],
            alternatives=[],
            redacted=True,
        )

    def recorded(self, call: Call, spans: Sequence[Span]) -> tuple[Call, list[Span]]:
        agent = self._redactor.text(call.agent)
        named = call if agent == call.agent else structs.replace(call, agent=agent)
        return self.call(named), self._redactor.spans(spans)

    def received(self, received: Received) -> Received:
        """What an agent's own instrumentation says."""
        spans, rewards = self._redactor.spans(received.spans), self._redactor.rewards(received.rewards)
        return structs.replace(received, spans=spans, rewards=rewards)

    def ids(self, ids: Sequence[int]) -> list[int]:
        """With no secret in their text, whether special tokens are shown in it or not."""
        kept = list(ids)
        try:
            for _ in range(_ROUNDS):
                if not self._betrayed(kept):
                    return kept
                for shown in (self._special, frozenset[int]()):
                    self._fill(kept, shown)
        except TooSlow:
            pass
        return [self._filler] * len(kept)

    def _spells_no_key(self, ids: Sequence[int]) -> bool:
        """Where only known keys are looked for, as one text. The prompt holds more than the request: what came before it."""
        if self._redactor.has_patterns:
            return False
        return self._redactor.is_idle or not self._redactor.found(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _betrayed(self, ids: Sequence[int]) -> bool:
        texts = (self._tokenizer.decode(ids, skip_special_tokens=hidden) for hidden in (False, True))
        return any(self._redactor.found(text) for text in texts)

    def _fill(self, ids: list[int], shown: Collection[int]) -> None:
        text, stretches = _spelled(self._tokenizer, ids, shown)
        found = iter(self._redactor.found(text))
        at = next(found, None)
        for place, (start, end) in enumerate(stretches):
            while at is not None and at[1] <= start:
                at = next(found, None)
            if at is not None and at[0] < end:
                ids[place] = self._filler

    def _given_ids(self, given: Any) -> Any:
        match given:
            case [int(), *_]:
                return self.ids(given)
            case [[int(), *_], *_]:
                return [self._given_ids(part) for part in given]
            case _:
                return given


def _spelled(tokenizer: Tokenizer, ids: Sequence[int], shown: Collection[int]) -> tuple[str, list[tuple[int, int]]]:
    """The text of ids, and which stretch of it each has a part in: several share a character that none has alone."""
    detokenizer = Detokenizer(tokenizer, shown)
    text, stretches, waiting = "", [], 0
    for token_id in ids:
        piece = detokenizer.feed(token_id)
        waiting += 1
        if piece:
            stretches += [(len(text), len(text) + len(piece))] * waiting
            text, waiting = text + piece, 0
    rest = detokenizer.finish()
    return text + rest, [*stretches, *[(len(text), len(text) + len(rest))] * waiting]

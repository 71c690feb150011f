"""Long texts must not hold up everybody else: what cannot be a prompt is refused unread, and what is long is tokenised in a thread
(conversations: `patience.py`).

A text that has more characters than the longest token times the context cannot fit, whatever its tokens. That is known in
microseconds, while tokenising a body of 32 MB takes many seconds, in which nobody else would be served.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from tokenizers import Tokenizer

from rollout_server.api.errors import ApiError

IN_THREAD = 50_000
"""Characters of a request; below, handing over costs more than tokenising."""
MAX_MESSAGES = 8192
"""Of a conversation: a template takes about 10 µs for each, and nobody else is served meanwhile."""


class TextSize:
    def __init__(self, tokenizer: Tokenizer, context_limit: int) -> None:
        self._tokenizer = tokenizer
        self._context_limit = context_limit
        self._longest = max(map(len, tokenizer.get_vocab()))

    def check(self, characters: int, param: str) -> None:
        """Raises ApiError 400 naming `param` when so many cannot be a prompt."""
        at_least = -(-characters // self._longest)
        if at_least > self._context_limit:
            raise ApiError(
                400,
                f"the prompt has at least {at_least} tokens, and prompt and reply together may have {self._context_limit}",
                param=param,
                code="context_length_exceeded",
            )

    def check_messages(self, count: int, param: str = "messages") -> None:
        """Raises ApiError 400 when so many messages cannot be a prompt, with a token each, or are too many to look at."""
        most = min(self._context_limit, MAX_MESSAGES)
        if count > most:
            raise ApiError(
                400,
                f"there are {count} messages; a conversation may have {most}",
                param=param,
                code="context_length_exceeded",
            )

    async def check_parts(self, http: Request, parts: Any, param: str) -> None:
        """The same, of all texts in parts of the request's body. A small body is not looked through."""
        if len(await http.body()) > self._context_limit * self._longest:
            self.check(_characters(parts), param)

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool, param: str = "prompt") -> list[list[int]]:
        """Ids of a request's texts. Raises ApiError when one of them cannot be a prompt."""
        for text in texts:
            self.check(len(text), param)
        if sum(map(len, texts)) < IN_THREAD:
            return [self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids for text in texts]
        return await asyncio.to_thread(self._encode, texts, add_special_tokens)

    def _encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """Batches, since only they let other threads run meanwhile; of one, since the engine needs the other cores."""
        encode = self._tokenizer.encode_batch_fast
        return [encode([text], add_special_tokens=add_special_tokens)[0].ids for text in texts]


def _characters(value: Any) -> int:
    """Of all texts in it, keys too."""
    total, unseen = 0, [value]
    while unseen:
        match unseen.pop():
            case str(text):
                total += len(text)
            case dict(entries):
                unseen += entries
                unseen += entries.values()
            case list(items) | tuple(items):
                unseen += items
    return total

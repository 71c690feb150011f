"""A renderer that does not hold up the event loop: what is long is tokenised in a thread, while everybody else is served.

Which texts of a conversation are tokenised depends on what is remembered of it, which is for the event loop alone. So the work is
begun again for each long text, with those at hand that were tokenised by then; what is remembered may have changed meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rollout_server.api.front.text_size import IN_THREAD
from rollout_server.api.rendering.render import Renderer, RenderError

T = TypeVar("T")


class _TakesLong(Exception):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text


class PatientRenderer(Renderer):
    def __init__(self, model_dir: Path) -> None:
        self._at_hand: dict[str, list[int]] | None = None
        """Of the work that is being done, if it is."""
        self._room = 0
        """Characters that may still be tokenised before others must have their turn."""
        super().__init__(model_dir)

    async def patiently(self, work: Callable[[], T]) -> T:
        """What `work` returns, or raises. It must change nothing before its last text is tokenised: it may be begun again."""
        at_hand: dict[str, list[int]] = {}
        while True:
            self._at_hand, self._room = at_hand, IN_THREAD
            try:
                return work()
            except _TakesLong as stopped:
                text = stopped.text
            finally:
                self._at_hand = None
            at_hand[text] = await asyncio.to_thread(self._encode_aside, text)

    def encode(self, text: str) -> list[int]:
        at_hand = self._at_hand
        if at_hand is None:
            return super().encode(text)
        if text not in at_hand:
            self._room -= len(text)
            if self._room < 0:
                raise _TakesLong(text)
            at_hand[text] = super().encode(text)
        return list(at_hand[text])

    def _encode_aside(self, text: str) -> list[int]:
        """A batch, since only that lets other threads run meanwhile."""
        try:
            return self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except TypeError as error:
            raise RenderError("the text is not valid Unicode: it holds half of a surrogate pair") from error

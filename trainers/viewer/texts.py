"""Texts that somebody else wrote, cut to what a view may hold, and the way back to the whole.

Views are made with a `Cut`, which names the place of each text that it cuts; `Sought` is one that cuts nothing but keeps the text
of one place. So the whole of a text is found by making the view once more, and no address has to be taken apart.
"""

from __future__ import annotations

import json
import math
from typing import Any

from lightning_rl.errors import LightningError
from trainers.viewer.records import Text

LONGEST = 20_000
"""Characters of a text in a view."""
LONGEST_WHOLE = 20_000_000
"""Characters of a text by itself."""
LONGEST_NAME = 300
"""Characters of what has to be short: names, roles."""


class Cut:
    def __call__(self, value: Any, *place: str | int) -> Text:
        """A text, or a value as JSON. The place is that in the store: the episode, what in it, and where in that."""
        text = written(value)
        if len(text) <= LONGEST:
            return Text(text=clean(text), length=len(text))
        return Text(text=clean(text[:LONGEST]), length=len(text), place=json.dumps(place))

    def or_none(self, value: Any, *place: str | int) -> Text | None:
        return None if value is None else self(value, *place)


class Sought(Cut):
    """Keeps the text of one place, as whole as an answer may be; what is left of the others is nothing."""

    def __init__(self, place: tuple[str | int, ...]) -> None:
        self._place = place
        self.found: Text | None = None

    def __call__(self, value: Any, *place: str | int) -> Text:
        if place == self._place:
            text = written(value)
            self.found = Text(text=clean(text[:LONGEST_WHOLE]), length=len(text))
        return Text(text="", length=0)


class BadPlace(LightningError):
    """A text was asked for at a place that no view names."""


def place_of(written_place: str) -> tuple[str | int, ...]:
    """Raises BadPlace for what `Cut` did not write."""
    try:
        place = json.loads(written_place)
    except (ValueError, RecursionError):
        place = None
    if not isinstance(place, list) or len(place) < 2 or not all(type(part) in (str, int) for part in place):
        raise BadPlace("that is no place of a text", hint="places of texts are in the `place` of those that were cut")
    if not isinstance(place[0], str):
        raise BadPlace("a place of a text begins with the id of an episode")
    return tuple(place)


def written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def clean(text: str) -> str:
    """Half of a pair of surrogates alone, which no encoding can write, becomes U+FFFD, as the store has it in its columns."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def short(text: str) -> str:
    """What should be short, and may be anything, since a model or an agent wrote it."""
    return clean(text if len(text) <= LONGEST_NAME else text[:LONGEST_NAME] + "…")


def finite(number: float) -> float | None:
    return number if math.isfinite(number) else None

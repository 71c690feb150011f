"""YAML that somebody else wrote, looked at before it is read: what is too deep or too large would end the process, or never end.

A parser's events come one by one, however deep they go; values are only built of what has passed.
"""

from __future__ import annotations

from typing import Any

import yaml

MOST_CHARACTERS = 1 << 18
DEEPEST = 50
MOST_VALUES = 50_000
"""With what is repeated by its name (`*name`) counted each time."""
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def plain(text: str) -> Any:
    """Its value. Raises ValueError for what is too much, and what YAML raises."""
    check(text)
    return yaml.load(text, Loader=_LOADER)


def check(text: str) -> None:
    """Raises ValueError for what is too large, too deep, or within itself, and yaml.YAMLError."""
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"it is longer than {MOST_CHARACTERS} characters")
    named: dict[str, tuple[int, int]] = {}
    around: list[_Part] = [_Part(None)]
    for event in yaml.parse(text, Loader=_LOADER):
        match event:
            case yaml.ScalarEvent():
                size, height = 1, 0
            case yaml.AliasEvent():
                if any(part.name == event.anchor for part in around):
                    raise ValueError(f"*{event.anchor} is within itself")
                size, height = named.get(event.anchor or "", (1, 0))
            case yaml.CollectionStartEvent():
                around.append(_Part(event.anchor))
                size, height = 0, 0
            case yaml.CollectionEndEvent():
                part = around.pop()
                size, height = part.size + 1, part.height + 1
                if part.name is not None:
                    named[part.name] = size, height
            case _:
                continue
        inside = around[-1]
        inside.size, inside.height = inside.size + size, max(inside.height, height)
        if len(around) - 1 + inside.height > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} deep")
        if inside.size > MOST_VALUES:
            raise ValueError(f"it has more than {MOST_VALUES} values")


class _Part:
    """A list or mapping that has not ended yet: how many values it holds, and how deep they go."""

    def __init__(self, name: str | None) -> None:
        self.name, self.size, self.height = name, 0, 0

"""Secrets taken out of texts before anybody stores them.

What a recipe's patterns fit, and every known key, becomes `[redacted]`, and the rest stays as it is; keys of JSON objects
are left alone. The work is bounded: a text that a pattern cannot be searched for within `SECONDS` is withheld whole, since
nobody knows then what is in it. Pure; which keys are known, and what becomes of token ids, is for others to say.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any
from urllib.parse import quote, unquote

import regex
from msgspec import structs

from lightning_rl.episode import Reward, Span
from lightning_rl.errors import RecipeError

REDACTED = "[redacted]"
SECONDS = 2.0
"""That one text or value may take to search, beside `SECONDS_PER_MB` of it."""
SECONDS_PER_MB = 1.0
SHORTEST_KEY = 8
"""Characters. A shorter key is a word that texts may have for another reason."""
SHORTEST_FOUND_KEY = 16
"""Of keys that nobody named, found in the environment: placeholders such as `not-needed` are shorter."""
_KEY_WORD = re.compile(r"(?:[A-Z]*(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE)|PAT|CREDENTIAL)S?\d*")
_NO_KEY = ("FILE", "PATH", "DIR", "URL", "URI", "ENDPOINT", "HOST", "NAME", "SOCK")
"""Last words of names that say where a key is, not what it is."""
_HEADERS_NAME = re.compile(r".*(?:^|[^A-Z])HEADERS")
_NO_KEY_HEADER = re.compile(r"accept.*|content-.*|user-agent|x-lrl-.*")
_IN_URL = re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s/?#:@]*:(?P<password>[^\s/?#@]+)@", re.IGNORECASE)

Stretch = tuple[int, int]


class TooSlow(Exception):
    """A text could not be searched in time."""


def check_pattern(pattern: str) -> None:
    """Raises RecipeError, naming the pattern, if it is no regular expression or fits where nothing is."""
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise RecipeError(f"{pattern!r} is no regular expression: {error}") from error
    if compiled.fullmatch("") is not None:
        raise RecipeError(f"{pattern!r} fits the empty text, so it is found everywhere", hint="use + instead of *")


def environment_keys(environment: Mapping[str, str]) -> list[str]:
    """What is named as keys are, `OPENAI_API_KEY` or `PGPASSWORD`, and long enough to be one; passwords in URLs; headers."""
    found = []
    for name, value in environment.items():
        if _is_key_name(name.upper()):
            found += [value, *value.split(",")]
        if _HEADERS_NAME.fullmatch(name.upper()):
            found += header_keys(value)
    passwords = [password for value in environment.values() for password in url_passwords(value)]
    return list(dict.fromkeys([*(key for key in found if len(key) >= SHORTEST_FOUND_KEY), *passwords]))


def header_keys(text: str) -> list[str]:
    """Values of `key=value,key=value` as OTEL_EXPORTER_OTLP_HEADERS has them, as they stand and as they are sent."""
    pairs = [part.partition("=") for part in text.split(",")]
    values = [value.strip() for name, _, value in pairs if not _NO_KEY_HEADER.fullmatch(name.strip().lower())]
    sent = [unquote(value) for value in values]
    found = [*values, *sent, *(value.rpartition(" ")[2] for value in sent)]
    return [value for value in found if len(value) >= SHORTEST_FOUND_KEY]


def url_passwords(text: str) -> list[str]:
    """Of every URL in it, as they stand and decoded; short words, such as `postgres`, are none."""
    stand = [match["password"] for match in _IN_URL.finditer(text)]
    return [
        password
        for password in [*stand, *map(unquote, stand)]
        if len(password) >= (SHORTEST_FOUND_KEY if password.isalpha() else SHORTEST_KEY)
    ]


def store_passwords(place: str | None, environment: Mapping[str, str]) -> list[str]:
    """Of the episode store's URL, in which `${NAME}` stands for a variable."""

    def value(found: re.Match[str]) -> str:
        known = environment.get(found["name"], "")
        return quote(known, safe="") if found.start() else known

    return url_passwords(re.sub(r"\$\{(?P<name>\w+)\}", value, place or ""))


def _is_key_name(name: str) -> bool:
    words = re.split(r"[^A-Z0-9]+", name)
    return any(map(_KEY_WORD.fullmatch, words)) and not words[-1].startswith(_NO_KEY)


class Redactor:
    """`patterns` are Python's regular expressions; `secrets` are taken as they stand, those that are long enough."""

    def __init__(self, patterns: Sequence[str] = (), secrets: Iterable[str | None] = ()) -> None:
        """Raises RecipeError for a pattern that cannot be used."""
        for pattern in patterns:
            check_pattern(pattern)
        self._patterns = [regex.compile(pattern) for pattern in patterns]
        known = {secret for secret in secrets if secret and len(secret) >= SHORTEST_KEY}
        self._secrets = sorted(known | {json.dumps(secret)[1:-1] for secret in known})

    @property
    def is_idle(self) -> bool:
        """Whether nothing is looked for."""
        return not self._secrets and not self._patterns

    @property
    def has_patterns(self) -> bool:
        """Whether anything but known keys is looked for."""
        return bool(self._patterns)

    def text(self, text: str) -> str:
        return _Search(self, len(text)).text(text)

    def value(self, value: Any) -> Any:
        """A JSON value with every text in it redacted; the very same object if there was nothing to redact."""
        return _Search(self, _size(value)).value(value)

    def found(self, text: str) -> list[Stretch]:
        """Where secrets are: (start, end) in order, apart from each other. Raises TooSlow."""
        return _Search(self, len(text)).found(text)

    def spans(self, spans: Sequence[Span]) -> list[Span]:
        """Names, attributes and errors."""
        told = [[span.name, span.attributes, span.error] for span in spans]
        return [
            structs.replace(span, name=name, attributes=attributes, error=error)
            for span, (name, attributes, error) in zip(spans, self.value(told), strict=True)
        ]

    def rewards(self, rewards: Sequence[Reward]) -> list[Reward]:
        """Their names."""
        names = self.value([reward.name for reward in rewards])
        return [structs.replace(reward, name=name) for reward, name in zip(rewards, names, strict=True)]


class _Search:
    """Of one value, within one budget of time."""

    def __init__(self, redactor: Redactor, size: int) -> None:
        self._redactor = redactor
        self._until = time.monotonic() + SECONDS + SECONDS_PER_MB * size / 1e6

    def text(self, text: str) -> str:
        try:
            found = self.found(text)
        except TooSlow:
            return REDACTED
        return _without(text, found)

    def value(self, value: Any) -> Any:
        match value:
            case str():
                return self.text(value)
            case dict():
                entries = {key: self.value(item) for key, item in value.items()}
                return entries if any(entries[key] is not value[key] for key in entries) else value
            case list() | tuple():
                items = self._parted([self.value(item) for item in value])
                return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
            case _:
                return value

    def _parted(self, items: list[Any]) -> list[Any]:
        """Without what is a secret only when parts of text that stand side by side are joined, as templates join them."""
        if sum(map(_is_text_part, items)) < 2:
            return items
        kept = []
        for are_parts, group in groupby(items, _is_text_part):
            side = list(group)
            kept += self._parts(side) if are_parts and len(side) > 1 else side
        return kept

    def _parts(self, parts: list[Any]) -> list[Any]:
        try:
            found = self.found("".join(part["text"] for part in parts))
        except TooSlow:
            return [{**part, "text": REDACTED} for part in parts]
        kept, at = [], 0
        for part in parts:
            end = at + len(part["text"])
            own = [(max(start, at) - at, min(stop, end) - at) for start, stop in found if start < end and stop > at]
            kept.append({**part, "text": _without(part["text"], own)} if own else part)
            at = end
        return kept

    def found(self, text: str) -> list[Stretch]:
        return _merged([*self._literal(text), *self._fitting(text)])

    def _literal(self, text: str) -> list[Stretch]:
        found = []
        for secret in self._redactor._secrets:
            at = text.find(secret)
            while at >= 0:
                found.append((at, at + len(secret)))
                at = text.find(secret, at + 1)
        return found

    def _fitting(self, text: str) -> list[Stretch]:
        found = []
        for pattern in self._redactor._patterns:
            left = self._until - time.monotonic()
            if left <= 0:
                raise TooSlow
            try:
                found += [match.span() for match in pattern.finditer(text, timeout=left, concurrent=True)]
            except TimeoutError as error:
                raise TooSlow from error
        return [(start, end) for start, end in found if end > start]


def _is_text_part(item: Any) -> bool:
    return isinstance(item, dict) and isinstance(item.get("text"), str)


def _without(text: str, found: Sequence[Stretch]) -> str:
    kept, at = [], 0
    for start, end in found:
        kept += [text[at:start], REDACTED]
        at = end
    return "".join([*kept, text[at:]]) if found else text


def _merged(found: list[Stretch]) -> list[Stretch]:
    merged: list[Stretch] = []
    for start, end in sorted(found):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _size(value: Any) -> int:
    """Characters of all texts."""
    match value:
        case str():
            return len(value)
        case dict():
            return sum(map(_size, value.values()))
        case list() | tuple():
            return sum(map(_size, value))
        case _:
            return 0

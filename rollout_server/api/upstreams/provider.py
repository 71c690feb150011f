"""A provider elsewhere that speaks the API, and where each dialect is spoken there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal
from urllib.parse import urlsplit

from msgspec import Struct

from lightning_rl.errors import RecipeError

Dialect = Literal["chat", "completions", "responses", "messages"]

_OPENAI_PATHS = {"chat": "chat/completions", "completions": "completions", "responses": "responses"}


class Provider(Struct, frozen=True, kw_only=True):
    base_url: str
    """As its SDK takes it: OpenAI's with `/v1`, Anthropic's without (with it does no harm)."""
    api_key: str | None = None
    """None sends none. It is in no log, no error and no store."""
    model: str | None = None
    """What it is asked for; None passes the client's word on."""

    def __post_init__(self) -> None:
        """Raises RecipeError for a URL without a host."""
        try:
            host = urlsplit(self.base_url).hostname
        except ValueError:
            host = None
        if not host or not self.base_url.startswith(("http://", "https://")):
            raise RecipeError(f"{self.base_url!r} is no base URL of an upstream", hint="as https://api.openai.com/v1")

    def url(self, dialect: Dialect, suffix: str = "") -> str:
        base = self.base_url.rstrip("/")
        if dialect == "messages":
            return f"{base.removesuffix('/v1')}/v1/messages{suffix}"
        return f"{base}/{_OPENAI_PATHS[dialect]}{suffix}"

    def headers(self, dialect: Dialect) -> dict[str, str]:
        if self.api_key is None:
            return {}
        return {"x-api-key": self.api_key} if dialect == "messages" else {"authorization": f"Bearer {self.api_key}"}


def key_from(environment: Mapping[str, str], variable: str, whose: str) -> str:
    """An upstream's key. Raises RecipeError, which does not repeat it, if it is not there or cannot be sent."""
    key = environment.get(variable, "")
    if not key:
        raise RecipeError(
            f"{whose}: the environment variable {variable} is not set", hint=f"export {variable}=<its key>"
        )
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise RecipeError(
            f"{whose}: what the environment variable {variable} holds is no key: it has spaces or other signs"
        )
    return key

"""The web process's own settings, read from the same JSON file as the engine's (`rollout_server.config`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from rollout_server.api.front.limits import Limits
from rollout_server.api.model_names import AgentRoute
from rollout_server.api.upstreams.provider import Provider


class WebConfig(Struct, frozen=True, kw_only=True):
    ipc_dirs: list[str]
    """One a replica: the directory of its manager's `web.ipc`."""
    model_dir: str
    parent_pid: int
    kv_tokens: int
    """Of one replica's cache on the device."""
    served_name: str
    listen_fd: int
    """Inherited socket, bound and listening already."""
    admin_key: str
    host_kv_tokens: int = 0
    """Of one replica's cache outside the device."""
    api_key: str | None = None
    """None lets everybody in."""
    aliases: list[str] = []
    """Other model names that clients may use, as `model_names.adapter_of` takes them: `GLOB` or `GLOB=MODEL`."""
    routes: list[AgentRoute] = []
    """Who answers which agents; the first that fits counts."""
    upstreams: dict[str, Provider] = {}
    """What routes may lead to, beside the policy and its adapters."""
    redact: list[str] = []
    """Regular expressions for what is taken out of calls before they are stored, beside all keys that are known here."""
    known_keys: list[str] = []
    """Others' keys, to be taken out as well."""
    store: str | None = None
    """Path or URL of the episode store; None serves no episodes."""
    limits: Limits = Limits()
    drain_s: float = 0.0
    """Seconds that requests under way may take to finish when the server is told to end."""
    cors_origins: list[str] = []
    """Origins of web pages that may call, as `https://example.org`; none may by default."""
    tool_parser: str | None = None
    """How calls are read from replies, a name of `tool_formats.FORMATS`; None: what the chat template shows."""
    reasoning_parser: str | None = None
    """How reasoning is read from replies, a name of `reasoning.REASONING_FORMATS`; None: what the chat template shows."""

    def context_limit(self) -> int:
        """Tokens that prompt and reply may have together."""
        return min(int(self._model()["max_position_embeddings"]), self.kv_tokens)

    def vocab_size(self) -> int:
        return int(self._model()["vocab_size"])

    def _model(self) -> dict[str, Any]:
        return dict(json.loads((Path(self.model_dir) / "config.json").read_text()))


def read_web_config(path: Path) -> WebConfig:
    return msgspec.json.decode(path.read_bytes(), type=WebConfig)

"""The web process's own settings, read from the same JSON file as the engine's (`rollout_server.config`)."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path

import msgspec
from msgspec import Struct

from rollout_server.api.errors import ApiError


class WebConfig(Struct, frozen=True, kw_only=True):
    ipc_dir: str
    model_dir: str
    parent_pid: int
    kv_tokens: int
    served_name: str
    listen_fd: int
    """Inherited socket, bound and listening already."""
    admin_key: str
    api_key: str | None = None
    """None lets everybody in."""
    aliases: list[str] = []
    """Globs of other model names that clients may use."""
    store: str | None = None
    """Path or URL of the episode store; None serves no episodes."""

    def check_model(self, name: str) -> None:
        """Raises ApiError unless clients may call the model by this name."""
        known = [self.served_name, *self.aliases]
        if not any(fnmatchcase(name, pattern) for pattern in known):
            raise ApiError(
                404,
                f"the model {name!r} does not exist; served here: {', '.join(known)}",
                param="model",
                code="model_not_found",
            )

    def context_limit(self) -> int:
        """Tokens that prompt and reply may have together."""
        model = json.loads((Path(self.model_dir) / "config.json").read_text())
        return min(int(model["max_position_embeddings"]), self.kv_tokens)


def read_web_config(path: Path) -> WebConfig:
    return msgspec.json.decode(path.read_bytes(), type=WebConfig)

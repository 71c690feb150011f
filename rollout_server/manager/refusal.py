"""A request that the engine cannot serve as it is."""

from __future__ import annotations

from lightning_rl.errors import LightningError


class Refused(LightningError):
    """`code` is one of `messages.Failed`'s."""

    def __init__(self, code: str, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.code = code

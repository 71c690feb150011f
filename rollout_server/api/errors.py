"""Errors that a client gets to see, in the shape of OpenAI's API, so that its SDK raises the exception of the right
class.

Everything that goes wrong while a request is served ends as one `ApiError`; `app.py` writes it out. Nothing here knows
HTTP beyond a status code.
"""

from __future__ import annotations

from typing import Any

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}

_ENGINE_STATUS = {
    "context_length_exceeded": 400,
    "too_large": 400,
    "invalid_token_ids": 400,
    "invalid_sampling": 400,
    "weights_rejected": 400,
    "model_not_found": 404,
    "checksum_mismatch": 409,
    "replicas_disagree": 500,
    "integrity": 500,
    "invalid_grammar": 400,
    "grammar_failed": 400,
    "weights_lost": 503,
    "aborted": 503,
    "worker_failed": 503,
    "engine_unavailable": 503,
    "shutting_down": 503,
}

ENGINE_RETRY_AFTER_S = 5
"""About what a worker takes to be there again."""


class ApiError(Exception):
    """A request that is answered with an error. `param` names the field at fault, `code` is for programs; after `retry_after`
    seconds it may be asked again; a `final` answer tells the SDKs, which try again what failed with a 5xx, that they must not."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        final: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after
        self.final = final

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class EngineError(Exception):
    """The engine refused or lost a request; `code` is one of `messages.Failed`'s, or one of the web process's own:
    `engine_unavailable`, `checksum_mismatch`, `replicas_disagree`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    def to_api(self) -> ApiError:
        status = _ENGINE_STATUS.get(self.code, 500)
        final = self.code == "worker_failed"  # it cost a worker's life, twice
        retry_after = ENGINE_RETRY_AFTER_S if status == 503 and not final else None
        return ApiError(status, self.message, code=self.code, retry_after=retry_after, final=final)

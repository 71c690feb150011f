"""Errors that a client gets to see, in the shape of OpenAI's API, so that its SDK raises the exception of the right
class.

Everything that goes wrong while a request is served ends as one `ApiError`; `app.py` writes it out. Nothing here knows
HTTP beyond a status code.
"""

from __future__ import annotations

from typing import Any

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    409: "invalid_request_error",
    413: "invalid_request_error",
}

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
    "aborted": 503,
    "worker_failed": 503,
    "engine_unavailable": 503,
    "shutting_down": 503,
}


class ApiError(Exception):
    """A request that is answered with an error. `param` names the field at fault, `code` is for programs."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

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
        return ApiError(_ENGINE_STATUS.get(self.code, 500), self.message, code=self.code)

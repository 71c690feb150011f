"""The trainer's line to the server: plain blocking HTTP with the admin key, from the standard library."""

from __future__ import annotations

import http.client
import json
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning_rl.errors import ServerError

TIMEOUT_S = 600.0
CHECK_S = 0.5


class AdminClient:
    """`check` is called twice a second while an answer is awaited; what it raises ends the wait."""

    def __init__(self, base_url: str, key: str, check: Callable[[], None] = lambda: None) -> None:
        self._address = urlsplit(base_url)
        self._key = key
        self._check = check

    def update_weights(self, path: Path | str, version: int) -> str:
        """Checksum of the tensors that the server now samples from. Raises ServerError if it refused them."""
        return str(self._ask("POST", "/update_weights", {"path": str(path), "version": version})["checksum"])

    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """Log-probs of all ids but the first of each sequence, under the server's present policy."""
        return list(self._ask("POST", "/score", {"sequences": sequences})["logprobs"])

    def stats(self) -> dict[str, float]:
        return dict(self._ask("GET", "/stats"))

    def health(self, timeout: float = TIMEOUT_S) -> None:
        """Raises ServerError unless the engine answers."""
        self._ask("GET", "/health", timeout=timeout)

    def _ask(self, method: str, path: str, body: Any = None, timeout: float = TIMEOUT_S) -> dict[str, Any]:
        answers: queue.Queue[dict[str, Any] | ServerError] = queue.Queue()

        def ask() -> None:
            try:
                answers.put(self._exchange(method, path, body, timeout))
            except ServerError as error:
                answers.put(error)

        threading.Thread(target=ask, daemon=True).start()
        while True:
            try:
                answer = answers.get(timeout=CHECK_S)
            except queue.Empty:
                self._check()
                continue
            if isinstance(answer, ServerError):
                self._check()  # a process that died says more than a connection that broke
                raise answer
            return answer

    def _exchange(self, method: str, path: str, body: Any, timeout: float) -> dict[str, Any]:
        assert self._address.hostname is not None
        connection = http.client.HTTPConnection(self._address.hostname, self._address.port, timeout=timeout)
        headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            text = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(
                f"{method} {path}: the server does not answer: {error or type(error).__name__}"
            ) from error
        finally:
            connection.close()
        try:
            answer = json.loads(text)
        except ValueError as error:
            raise ServerError(f"{method} {path}: status {response.status}, and no JSON: {text[:200]!r}") from error
        if response.status != 200:
            raise ServerError(f"{method} {path}: {answer['error']['message']}")
        return dict(answer)

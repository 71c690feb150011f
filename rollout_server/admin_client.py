"""The trainer's line to the server: plain blocking HTTP with the admin key, from the standard library.

All of it raises ServerError when the server refuses or does not answer.
"""

from __future__ import annotations

import http.client
import json
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from lightning_rl.errors import LightningError, PublishError, ServerError
from rollout_server import messages as m

TIMEOUT_S = 600.0
CHECK_S = 0.5


class AdminClient:
    """`check` is called twice a second while an answer is awaited; what it raises ends the wait."""

    def __init__(self, base_url: str, key: str, check: Callable[[], None] = lambda: None) -> None:
        self._address = urlsplit(base_url)
        self._key = key
        self._check = check

    def update_weights(
        self,
        source: Path | str | m.WeightSource,
        version: int,
        *,
        adapter: str = "",
        running: m.Running = "reprefill",
        expected_checksum: str | None = None,
    ) -> str:
        """Checksum of the tensors that the server now samples from. A path is a directory's.

        Raises:
            ServerError: the server refused the weights, the old ones are live.
            PublishError: the new ones are live, with another checksum than expected.
        """
        where = m.Directory(path=str(source)) if isinstance(source, Path | str) else source
        body = {
            "source": msgspec.to_builtins(where),
            "version": version,
            "adapter": adapter,
            "running": running,
            "expected_checksum": expected_checksum,
        }
        return str(self._ask("POST", "/update_weights", body)["checksum"])

    def load_adapter(self, name: str, path: Path | str, version: int | None = None) -> str:
        """Load or replace a LoRA adapter that clients choose as model `name`; its checksum. `version` defaults to one
        more than the name's last."""
        body = {"lora_name": name, "lora_path": str(path), "load_inplace": True, "version": version}
        return str(self._ask("POST", "/v1/load_lora_adapter", body)["checksum"])

    def unload_adapter(self, name: str) -> None:
        self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    def pause(self, mode: m.Running = "keep") -> None:
        """Returns when nothing runs any more. `mode` says what becomes of sequences under way."""
        self._ask("POST", "/pause", {"mode": mode})

    def resume(self) -> None:
        self._ask("POST", "/resume")

    def sleep(self, level: int = 1) -> None:
        """Returns when the device's memory is free: that of KV pages, at level 2 that of the weights too."""
        self._ask("POST", "/sleep", {"level": level})

    def wake_up(self) -> None:
        self._ask("POST", "/wake_up")

    def score(self, sequences: list[list[int]], adapter: str = "") -> list[list[float]]:
        """Log-probs of all ids but the first of each sequence, under the server's present policy."""
        return list(self._ask("POST", "/score", {"sequences": sequences, "adapter": adapter})["logprobs"])

    def checksums(self) -> dict[str, str]:
        """Of the live weights: `base`, `adapter/` (the policy's own) and `adapter/<name>`."""
        return dict(self._ask("GET", "/checksums")["checksums"])

    def stats(self, *, check: bool = False) -> dict[str, float]:
        """Counters; `check` has the engine verify its pages and prefix tree first (ServerError if they are broken)."""
        return dict(self._ask("GET", "/stats?check=1" if check else "/stats"))

    def health(self, timeout: float = TIMEOUT_S) -> None:
        """Raises ServerError unless the engine answers."""
        self._ask("GET", "/health", timeout=timeout)

    def _ask(self, method: str, path: str, body: Any = None, timeout: float = TIMEOUT_S) -> dict[str, Any]:
        answers: queue.Queue[dict[str, Any] | LightningError] = queue.Queue()

        def ask() -> None:
            try:
                answers.put(self._exchange(method, path, body, timeout))
            except LightningError as error:
                answers.put(error)

        threading.Thread(target=ask, daemon=True).start()
        while True:
            try:
                answer = answers.get(timeout=CHECK_S)
            except queue.Empty:
                self._check()
                continue
            if isinstance(answer, LightningError):
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
            told = answer["error"]
            kind = PublishError if told["code"] == "checksum_mismatch" else ServerError
            raise kind(f"{method} {path}: {told['message']}")
        return dict(answer)

"""The settings that web, manager and worker share: one JSON file, written by `launch`, read by each."""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import Struct


class EngineConfig(Struct, frozen=True, kw_only=True):
    ipc_dir: str
    """Private directory of the sockets: `web.ipc` and `worker.ipc`, both bound by the manager."""
    model_dir: str
    parent_pid: int
    dtype: str = "float32"
    """`float32` or `bfloat16`."""
    kv_tokens: int = 65536
    """Tokens whose keys and values fit in the cache."""
    page_size: int = 16
    max_batch: int = 64
    """Sequences that decode at once."""
    max_step_tokens: int = 512
    """Tokens of one forward pass, prompts and decodes together."""
    threads: int | None = None
    """Torch threads of the worker; None leaves torch's choice."""
    batch_invariant: bool = False
    """Same seed, same tokens and log-probs bit for bit, whatever else is in the batch. Slower."""

    @property
    def num_pages(self) -> int:
        return self.kv_tokens // self.page_size


def read_engine_config(path: Path) -> EngineConfig:
    return msgspec.json.decode(path.read_bytes(), type=EngineConfig)

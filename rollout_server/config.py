"""The settings that web, manager and worker share: one JSON file, written by `launch`, read by each."""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import Struct


class EngineConfig(Struct, frozen=True, kw_only=True):
    ipc_dir: str
    """Private directory of the manager's: its sockets, its worker's pid, weights kept for the worker's restart."""
    model_dir: str
    parent_pid: int
    dtype: str = "float32"
    """`float32` or `bfloat16`."""
    kv_tokens: int = 65536
    """Tokens whose keys and values fit in the cache."""
    page_size: int = 16
    max_batch: int = 64
    """Sequences that decode at once: the worker's slots."""
    max_step_tokens: int = 512
    """Tokens of one forward pass, prompts and decodes together."""
    lookahead: int = 1
    """Passes queued at the worker beyond the one that runs; 0 plans each pass from the results of the last."""
    host_kv_tokens: int = 0
    """Tokens whose keys and values may be kept outside the device, for conversations that pause."""
    host_kv_dir: str | None = None
    """Directory for a memory-mapped host tier on disk; None keeps it in memory."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, …; `auto` takes a GPU where there is one."""
    shared_prefix: bool = True
    """Attend to prefixes that many rows share as one matrix product, where it pays."""
    max_adapters: int = 64
    """LoRA adapters loaded at once, the policy's own included."""
    threads: int | None = None
    """Torch threads of the worker; None leaves torch's choice."""
    batch_invariant: bool = False
    """Same seed, same tokens and log-probs bit for bit, whatever else is in the batch. Slower."""
    worker_log: str | None = None
    """File that the worker's output is appended to; None: it goes where the manager's goes."""

    @property
    def num_pages(self) -> int:
        return self.kv_tokens // self.page_size

    @property
    def host_pages(self) -> int:
        return self.host_kv_tokens // self.page_size


def read_engine_config(path: Path) -> EngineConfig:
    return msgspec.json.decode(path.read_bytes(), type=EngineConfig)

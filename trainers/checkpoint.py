"""Checkpoints: a directory that is either whole or not there.

DeepSpeed writes the policy's weights, optimiser and fp32 masters; `critic.pt` holds the critic and its optimiser, `state.json`
what the loop knows, `files.json` a digest of every file. It is written under another name, synced, and renamed last. A checkpoint
that cannot be read is an error that names it: nothing older is taken silently.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from msgspec import Struct

from lightning_rl.errors import ResumeError
from trainers.critic import CriticOptimiser
from trainers.deepspeed_engine import TrainEngine

TAG = "state"
CRITIC = "critic.pt"
FIRST_VERSION = 1
"""Of the policy that the reinforcement learning starts from; 0 is the model as it was."""


class TrainState(Struct, frozen=True, kw_only=True):
    """What the loop needs to go on after `step` steps."""

    step: int
    version: int
    """Policy version that the server had after the step."""
    world_size: int
    history: list[dict[str, Any]] = []
    """The metrics of every step so far: `metrics.jsonl` is cut to them."""


def checkpoint_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:05d}"


def save_checkpoint(
    engine: TrainEngine, directory: Path, state: TrainState, *, keep: int, critic: CriticOptimiser | None = None
) -> None:
    """Called on every rank; returns when the checkpoint is complete on all."""
    target = checkpoint_path(directory, state.step)
    scratch = target.with_name(f".{target.name}.tmp")
    rank = dist.get_rank()
    if rank == 0:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    dist.barrier()
    engine.engine.save_checkpoint(str(scratch), tag=TAG, exclude_frozen_parameters=True, save_latest=False)
    torch.save(torch.get_rng_state(), scratch / f"rng-{rank}.pt")
    dist.barrier()
    if rank == 0:
        for script in scratch.glob("zero_to_*.py"):  # DeepSpeed's own exporters; ours is `lrl export`
            script.unlink()
        if critic:  # the same on every rank
            torch.save(critic.state(), scratch / CRITIC)
        (scratch / "state.json").write_bytes(msgspec.json.encode(state))
        (scratch / "files.json").write_bytes(msgspec.json.encode(_digests(scratch)))
        _sync(scratch)
        shutil.rmtree(target, ignore_errors=True)
        scratch.rename(target)
        _sync_directory(directory)
        _remove(directory, checkpoints(directory)[:-keep])
    dist.barrier()


def checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in directory.glob("step-*") if (path / "state.json").is_file())


def read_state(checkpoint: Path) -> TrainState:
    try:
        return msgspec.json.decode((checkpoint / "state.json").read_bytes(), type=TrainState)
    except (OSError, msgspec.DecodeError) as error:
        raise _unreadable(checkpoint, error) from error


def load_checkpoint(engine: TrainEngine, checkpoint: Path, *, critic: CriticOptimiser | None = None) -> None:
    """Weights, optimisers and RNG as they were, bit for bit. Called on every rank."""
    _check_files(checkpoint)
    state = read_state(checkpoint)
    if state.world_size != dist.get_world_size():
        raise ResumeError(
            f"{checkpoint} was written by {state.world_size} trainer processes, this run has {dist.get_world_size()}",
            hint=f"set train.world_size to {state.world_size} in the run's recipe.yaml",
        )
    try:
        path, _ = engine.engine.load_checkpoint(str(checkpoint), tag=TAG, load_module_strict=False)
        if path is None:
            raise FileNotFoundError(f"no DeepSpeed state in {checkpoint / TAG}")
        if critic:
            critic.load(torch.load(checkpoint / CRITIC, weights_only=True))
        torch.set_rng_state(torch.load(checkpoint / f"rng-{dist.get_rank()}.pt", weights_only=True))
    except Exception as error:  # whatever a damaged file makes torch, pickle or DeepSpeed raise
        raise _unreadable(checkpoint, error) from error


def _digests(directory: Path) -> dict[str, str]:
    """By file name: blake2b of the contents."""
    return {
        str(path.relative_to(directory)): hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != "files.json"
    }


def _check_files(checkpoint: Path) -> None:
    try:
        expected = msgspec.json.decode((checkpoint / "files.json").read_bytes(), type=dict[str, str])
        actual = _digests(checkpoint)
    except (OSError, msgspec.DecodeError) as error:
        raise _unreadable(checkpoint, error) from error
    for name, digest in expected.items():
        if actual.get(name) != digest:
            fault = "is damaged" if name in actual else "is missing"
            raise _unreadable(checkpoint, ValueError(f"{checkpoint / name} {fault}"))


def _unreadable(checkpoint: Path, error: Exception) -> ResumeError:
    older = [path.name for path in checkpoints(checkpoint.parent) if path.name < checkpoint.name]
    hint = "there is no older one: start a new run"
    if older:
        hint = f"older ones are complete: {', '.join(older)}; remove {checkpoint} to go on from {older[-1]}"
    return ResumeError(f"checkpoint {checkpoint} cannot be read: {type(error).__name__}: {error}", hint=hint)


def _remove(directory: Path, checkpoints: list[Path]) -> None:
    """Out of sight first: one that is half gone must not look like a checkpoint."""
    for path in checkpoints:
        path.rename(path.with_name(f".{path.name}.old"))
    for hidden in directory.glob(".step-*.old"):
        shutil.rmtree(hidden)


def _sync(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            _sync_directory(path)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

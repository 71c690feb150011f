"""Hand the policy to the server, and prove that both hold the same one.

The files hold exactly the tensors that the trainer's forward pass uses. The server answers with a checksum of what it computes
with, taken from its live tensors; then both score the same tokens, and a mean difference above the bound stops the run.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from msgspec import Struct
from safetensors.torch import save_file
from torch import Tensor

from lightning_rl.errors import PublishError
from rollout_server.models.checksum import checksum
from trainers.policy import LORA_TARGETS, Policy, score_sequence

DEFAULT_GAP = {"float32": 1e-3, "bfloat16": 0.15}


class Server(Protocol):
    def update_weights(self, path: Path | str, version: int) -> str: ...

    def score(self, sequences: list[list[int]]) -> list[list[float]]: ...


class Gap(Struct, frozen=True, kw_only=True):
    """How far trainer and server part on the same tokens."""

    mean: float
    """Mean absolute difference of log-probs."""
    largest: float
    tokens: int


def policy_tensors(policy: Policy) -> dict[str, Tensor]:
    """What a publish consists of, under PEFT's or Hugging Face's names."""
    if policy.lora is not None:
        return {
            name.removeprefix("model.").replace(".default.", "."): parameter.detach()
            for name, parameter in policy.named_parameters()
            if parameter.requires_grad
        }
    state = {name: tensor.detach() for name, tensor in policy.model.state_dict().items()}
    if policy.model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return state


def write_policy(policy: Policy, directory: Path, model_dir: Path) -> None:
    """An adapter, or a whole checkpoint, that PEFT or transformers loads. The directory appears only when it is complete."""
    scratch = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    tensors = {name: tensor.contiguous() for name, tensor in policy_tensors(policy).items()}
    if policy.lora is not None:
        save_file(tensors, scratch / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(model_dir),
            "r": policy.lora.rank,
            "lora_alpha": policy.lora.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": LORA_TARGETS,
        }
        (scratch / "adapter_config.json").write_text(json.dumps(config, indent=2))
    else:
        save_file(tensors, scratch / "model.safetensors", metadata={"format": "pt"})
        for path in model_dir.iterdir():
            if path.is_file() and path.suffix in (".json", ".jinja") and "safetensors" not in path.name:
                shutil.copy(path, scratch)
        config = json.loads((model_dir / "config.json").read_text())
        config.pop("torch_dtype", None)
        config["dtype"] = str(policy.causal_lm.dtype).removeprefix("torch.")
        (scratch / "config.json").write_text(json.dumps(config, indent=2))
    shutil.rmtree(directory, ignore_errors=True)
    scratch.rename(directory)


def publish(policy: Policy, server: Server, directory: Path, version: int, model_dir: Path) -> None:
    """Write, load, compare checksums. Raises PublishError when the server holds other bits than the trainer."""
    write_policy(policy, directory, model_dir)
    expected = checksum(policy_tensors(policy))
    actual = server.update_weights(directory.resolve(), version)
    if actual != expected:
        raise PublishError(
            f"policy version {version}: the server holds weights with checksum {actual}, the trainer has {expected}",
            hint=f"what was published is in {directory}",
        )


def compare(policy: Policy, server: Server, sequences: Sequence[list[int]], bound: float) -> Gap:
    """Score the same tokens on both sides. Raises PublishError, with the worst tokens, when they differ by more than
    `bound` on average."""
    theirs = server.score([list(ids) for ids in sequences])
    rows = []
    policy.eval()
    for number, (ids, server_side) in enumerate(zip(sequences, theirs, strict=True)):
        for position, (ours, other) in enumerate(zip(score_sequence(policy, ids), server_side, strict=True), start=1):
            rows.append((abs(ours - other), number, position, ids[position], ours, other))
    differences = [row[0] for row in rows]
    gap = Gap(mean=math.fsum(differences) / len(rows), largest=max(differences), tokens=len(rows))
    if not gap.mean <= bound:  # also when it is not a number
        raise PublishError(
            f"trainer and server differ by {gap.mean:.4g} per token on average, the bound is {bound:g}\n{_table(rows)}",
            hint="publish.max_logprob_gap sets the bound; a difference this large means that the two compute different models",
        )
    return gap


def _table(rows: list[tuple[float, int, int, int, float, float]]) -> str:
    lines = [f"  {'sequence':>8} {'token':>6} {'id':>7} {'trainer':>10} {'server':>10} {'difference':>10}"]
    for difference, number, position, token, ours, other in sorted(rows, reverse=True)[:8]:
        lines.append(f"  {number:>8} {position:>6} {token:>7} {ours:>10.4f} {other:>10.4f} {difference:>10.4f}")
    return "\n".join(lines)

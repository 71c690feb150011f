"""The warm start: a short supervised stage, by TRL's SFTTrainer, on demonstrations that are already token ids.

A process of its own (`python -m trainers.warm_start CONFIG.json`), because transformers' Trainer and DeepSpeed both want the
process's one distributed state. It leaves a directory that is there only when it is complete: an adapter, or full weights.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from lightning_rl.lifetime import die_with_parent
from lightning_rl.memory import keep_freed_memory
from lightning_rl.recipe import LoraConfig


class Demonstration(Struct, frozen=True):
    ids: list[int]
    mask: list[int]
    """1 on the tokens that the assistant says."""


class WarmStartConfig(Struct, frozen=True, kw_only=True):
    model_dir: str
    dtype: str
    lora: dict[str, Any] | None
    """Fields of `recipe.LoraConfig`; None trains all weights."""
    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    demonstrations: str
    """JSON lines of `Demonstration`."""
    out: str
    progress: str
    """JSON lines of {step, loss}, for whoever watches."""
    parent_pid: int


def train(config: WarmStartConfig) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from trainers.policy import load_policy
    from trainers.publish import write_policy

    lora = LoraConfig(**config.lora) if config.lora else None
    policy = load_policy(Path(config.model_dir), config.dtype, lora, seed=config.seed, attention="sdpa")
    rows = [
        msgspec.json.decode(line, type=Demonstration) for line in Path(config.demonstrations).read_bytes().splitlines()
    ]
    dataset = Dataset.from_dict({"input_ids": [r.ids for r in rows], "assistant_masks": [r.mask for r in rows]})

    class Progress(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if logs and "loss" in logs:
                with Path(config.progress).open("a") as file:
                    file.write(json.dumps({"step": state.global_step, "loss": logs["loss"]}) + "\n")

    out = Path(config.out)
    trainer = SFTTrainer(
        model=policy.model,
        args=SFTConfig(
            output_dir=str(out.parent / ".sft"),
            max_steps=config.steps,
            per_device_train_batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=max(1, config.steps // 10),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=config.seed,
            data_seed=config.seed,
            max_length=None,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        ),
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(config.model_dir),
        callbacks=[Progress()],
    )
    trainer.train()
    write_policy(policy, out, Path(config.model_dir))


if __name__ == "__main__":
    settings = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=WarmStartConfig)
    die_with_parent(settings.parent_pid)
    keep_freed_memory()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    train(settings)

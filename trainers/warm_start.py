"""The warm start: a short supervised stage, by TRL's SFTTrainer, on demonstrations that are already token ids.

A batch is packed as in reinforcement learning (`trainers.packing`): what its demonstrations have in common is computed once,
and logits are made for the assistant's tokens only. The loss is SFTTrainer's, the mean over those tokens.

A process of its own (`python -m trainers.warm_start CONFIG.json`), because transformers' Trainer and DeepSpeed both want
the process's one distributed state. It leaves a directory that is there only when it is complete: an adapter, or full
weights.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from msgspec import Struct

from lightning_rl.episode import Call
from lightning_rl.lifetime import die_with_parent
from lightning_rl.memory import keep_freed_memory
from lightning_rl.recipe import LoraConfig
from lightning_rl.transition import Transition
from trainers.packing import Row, pack

MAX_ROW_TOKENS = 4096
NO_LABEL = -100
"""transformers' label of a token without a loss."""


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


class MasterAdamW(torch.optim.AdamW):
    """AdamW on fp32 copies. In bf16 alone, small updates and the decay of the second moment would round to nothing."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], learning_rate: float) -> None:
        self._live = list(parameters)
        self._masters = [parameter.detach().float().clone() for parameter in self._live]
        super().__init__(self._masters, lr=learning_rate, weight_decay=0.0)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for master, live in zip(self._masters, self._live, strict=True):
            master.grad = None if live.grad is None else live.grad.float()
        super().step(closure)
        for master, live in zip(self._masters, self._live, strict=True):
            live.copy_(master)


def rows_of_batch(examples: Sequence[Mapping[str, list[int]]]) -> list[Row]:
    """The batch as packed rows. What the assistant says at once is a transition; weights add up to 1 over the batch."""
    calls, transitions = [], []
    for number, example in enumerate(examples):
        for start, end in _spans(example["labels"]):
            call, transition = _said(f"{number}/{start}", example["input_ids"][:end], start)
            calls.append(call)
            transitions.append(transition)
    tokens = sum(len(transition.sampled_ids) for transition in transitions)
    return pack(
        transitions,
        group_of={"": ""},
        weights={transition.call_id: 1 / tokens for transition in transitions},
        calls={call.id: call for call in calls},
        max_row_tokens=MAX_ROW_TOKENS,
    ).rows


def _spans(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Where labels are, as [start, end); the first token of a sequence has none, nothing predicts it."""
    spans, position = [], 0
    for labelled, run in itertools.groupby(labels, lambda label: label != NO_LABEL):
        length = len(list(run))
        if labelled and position + length > 1:
            spans.append((max(position, 1), position + length))
        position += length
    return spans


def _said(name: str, ids: list[int], start: int) -> tuple[Call, Transition]:
    said = ids[start:]
    zeros = [0] * len(said)
    call = Call(
        id=name,
        episode_id="",
        index=0,
        model="",
        prompt_ids=ids[:start],
        sampled_ids=said,
        logprobs=[float(zero) for zero in zeros],
        versions=zeros,
        temperature=1.0,
        finish_reason="stop",
    )
    transition = Transition(
        episode_id="",
        call_id=name,
        prompt_ids=call.prompt_ids,
        sampled_ids=said,
        logprobs=call.logprobs,
        versions=zeros,
        temperature=1.0,
        ret=1.0,
        advantage=1.0,
    )
    return call, transition


def train(config: WarmStartConfig) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from trainers.policy import load_policy, row_tensors
    from trainers.publish import write_policy

    lora = LoraConfig(**config.lora) if config.lora else None
    policy = load_policy(Path(config.model_dir), config.dtype, lora, seed=config.seed)
    rows = [
        msgspec.json.decode(line, type=Demonstration) for line in Path(config.demonstrations).read_bytes().splitlines()
    ]
    dataset = Dataset.from_dict({"input_ids": [r.ids for r in rows], "assistant_masks": [r.mask for r in rows]})

    class PackedTrainer(SFTTrainer):
        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> torch.Tensor:
            losses = []
            for row in inputs["rows"]:
                scores = policy(**row_tensors(row))
                losses.append(-(scores.logprobs * torch.tensor(row.weights)).sum())
            return torch.stack(losses).sum()

    class Progress(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if logs and "loss" in logs:
                with Path(config.progress).open("a") as file:
                    file.write(json.dumps({"step": state.global_step, "loss": float(logs["loss"])}) + "\n")

    out = Path(config.out)
    trainer = PackedTrainer(
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
        data_collator=lambda examples: {"rows": rows_of_batch(examples)},
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(config.model_dir),
        optimizers=(MasterAdamW((p for p in policy.parameters() if p.requires_grad), config.learning_rate), None),
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

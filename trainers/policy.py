"""The policy as the trainer holds it: a transformers model, a PEFT adapter on it, and a forward pass over packed rows.

Attention follows the row's tree (`tree_attention`), logits are made only where a loss term looks (`token_scores`).
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from lightning_rl.recipe import LoraConfig
from trainers.packing import Row
from trainers.token_scores import token_scores
from trainers.tree_attention import NAME as TREE_ATTENTION
from trainers.tree_attention import Block, tree_blocks

if TYPE_CHECKING:
    from trainers.critic import Critic

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class RowScores(NamedTuple):
    logprobs: Tensor
    """fp32 [L], with gradient: log-prob of each target at the term's temperature."""
    entropies: Tensor
    """fp32 [L], in nats, with gradient: of the distribution at the term's temperature."""
    values: Tensor | None = None
    """fp32 [L], with the critic's gradient; None without a critic, and for a row of padding."""


class Policy(nn.Module):
    """Wraps a causal language model; `forward` takes one row as tensors, see `row_tensors`."""

    def __init__(self, model: Any, lora: LoraConfig | None) -> None:
        super().__init__()
        self.model = model
        self.lora = lora
        self.register_state_dict_post_hook(_drop_aliases)

    @property
    def causal_lm(self) -> Any:
        """The transformers model, adapter layers inside."""
        return self.model.base_model.model if self.lora else self.model

    def forward(
        self,
        ids: Tensor,
        depths: Tensor,
        tree: list[Block],
        nodes: Tensor,
        targets: Tensor,
        temperatures: Tensor,
        terms: Tensor,
        critic: Critic | None = None,
    ) -> RowScores:
        lm = self.causal_lm
        hidden = lm.model(
            input_ids=ids[None], position_ids=depths[None], attention_mask=None, use_cache=False, tree=tree
        ).last_hidden_state[0]
        if not len(nodes):  # a row of padding takes part in the reduction with a gradient of zero
            nothing = (hidden.float().sum() + lm.lm_head.weight.float().sum())[None] * 0
            return RowScores(nothing, nothing.detach())
        states = hidden[nodes]
        logprobs, entropies = token_scores(states, lm.lm_head.weight, targets, temperatures)
        return RowScores(
            logprobs.index_select(0, terms),
            entropies.index_select(0, terms),
            critic(states).index_select(0, terms) if critic else None,
        )


def _drop_aliases(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A tied head is the embedding under a second name: DeepSpeed would save it beside the adapter, frozen as it is."""
    names = {prefix + name for name, _ in [*module.named_parameters(), *module.named_buffers()]}
    for name in [name for name in state if name.startswith(prefix) and name not in names]:
        del state[name]


def row_tensors(row: Row) -> dict[str, Any]:
    """The arguments of `Policy.forward`. Loss terms that ask the same of the same node (samples that began alike) are
    computed once; `terms` says which result each takes."""
    asked = list(zip(row.nodes, row.targets, row.temperatures, strict=True))
    place = {question: i for i, question in enumerate(dict.fromkeys(asked))}
    nodes, targets, temperatures = zip(*place, strict=True) if place else ((), (), ())
    return {
        "ids": torch.tensor(row.ids),
        "depths": torch.tensor(row.depths),
        "tree": tree_blocks(row.ends),
        "nodes": torch.tensor(nodes, dtype=torch.long),
        "targets": torch.tensor(targets, dtype=torch.long),
        "temperatures": torch.tensor(temperatures, dtype=torch.float32),
        "terms": torch.tensor([place[question] for question in asked], dtype=torch.long),
    }


def trained_tensors(policy: Policy) -> dict[str, Tensor]:
    """Copies of what is trained: the adapter, or all weights. With `torch.func.functional_call` the same model computes with them
    again when it has learned."""
    return {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}


def load_policy(
    model_dir: Path,
    dtype: str,
    lora: LoraConfig | None,
    *,
    seed: int,
    start_from: Path | None = None,
    attention: str = TREE_ATTENTION,
) -> Policy:
    """The base model with a fresh adapter (seeded), or with what `start_from` holds: an adapter, or full weights.

    `attention` is transformers' name of an implementation; packed rows need the default.
    """
    logging.disable_progress_bar()
    source = start_from if lora is None and start_from is not None else model_dir
    model = AutoModelForCausalLM.from_pretrained(source, dtype=DTYPES[dtype], attn_implementation=attention)
    if lora is None:
        return Policy(model, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that is about to go
        return Policy(add_adapter(model, lora, seed=seed, start_from=start_from), lora)


def add_adapter(base: Any, lora: LoraConfig, *, seed: int, start_from: Path | None = None) -> Any:
    """LoRA on every linear layer, in the model's own precision (DeepSpeed keeps fp32 masters of it)."""
    from peft import LoraConfig as PeftConfig
    from peft import PeftModel, get_peft_model

    if start_from is not None:
        return PeftModel.from_pretrained(base, start_from, is_trainable=True, autocast_adapter_dtype=False)
    config = PeftConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=LORA_TARGETS, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(base, config, autocast_adapter_dtype=False)


@torch.no_grad()
def score_sequence(policy: Policy, ids: list[int]) -> list[float]:
    """Log-prob of ids[1:] at temperature 1, by the same forward pass that training uses."""
    n = len(ids) - 1
    tensors: dict[str, Any] = {
        "ids": torch.tensor(ids[:-1]),
        "depths": torch.arange(n),
        "tree": tree_blocks([n] * n),
        "nodes": torch.arange(n),
        "targets": torch.tensor(ids[1:]),
        "temperatures": torch.ones(n),
        "terms": torch.arange(n),
    }
    scores: RowScores = policy(**tensors)
    return scores.logprobs.tolist()

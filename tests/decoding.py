"""Decoders without an engine: small random checkpoints of each family, and batches made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from rollout_server.kernels import native, reference
from rollout_server.kernels.interface import AdapterSpan, Batch, Kernels
from rollout_server.models.config import read_config
from rollout_server.models.decoder import Decoder, load_decoder
from rollout_server.models.weights import AdapterWeights

PAGE = 16
SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": None,
    "bos_token_id": None,
}
QWEN_MOE: dict[str, Any] = {"head_dim": 32, "moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 3}
LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
FAMILIES = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "llama 3.1": LlamaConfig(**SHAPE, tie_word_embeddings=False, rope_parameters=LLAMA3_ROPE),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=32, tie_word_embeddings=False),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(**SHAPE, **QWEN_MOE, norm_topk_prob=True, mlp_only_layers=[0]),
    "qwen3_moe, sparse step": Qwen3MoeConfig(**SHAPE, **QWEN_MOE, norm_topk_prob=False, decoder_sparse_step=2),
}


def kernels_of(name: str) -> Kernels:
    if name == "reference":
        return reference
    compiled = native.load()
    assert compiled is not None, "the C kernels were not built"
    return compiled


def random_model(config: Any, seed: int = 1) -> PreTrainedModel:
    """Wide weights and norms that are not 1, so that nothing passes by being flat."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.mul_(4.0)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config.eos_token_id = None
    return model.eval()


def decoder_of(
    directory: Path, kernels: Kernels = reference, dtype: torch.dtype = torch.float32, **more: Any
) -> Decoder:
    return load_decoder(directory, read_config(directory), dtype, kernels, **more)


def random_ids(*lengths: int, vocab: int = 300, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (length,), generator=generator).tolist() for length in lengths]


def prefill(sequences: list[list[int]], adapters: list[str | None] | None = None) -> Batch:
    """Every sequence whole, one row each, on consecutive pages; `adapters`: each row's, None for no span."""
    lengths = [len(ids) for ids in sequences]
    widest = -(-max(lengths) // PAGE)
    tables = [list(range(row * widest, (row + 1) * widest)) for row in range(len(sequences))]
    starts = [sum(lengths[:row]) for row in range(len(lengths) + 1)]
    spans = [
        AdapterSpan(starts[row], starts[row + 1], name) for row, name in enumerate(adapters or []) if name is not None
    ]
    return Batch(
        ids=torch.tensor([token for ids in sequences for token in ids]),
        positions=torch.tensor([p for length in lengths for p in range(length)], dtype=torch.int32),
        cells=torch.tensor(
            [tables[r][p // PAGE] * PAGE + p % PAGE for r, length in enumerate(lengths) for p in range(length)]
        ),
        offsets=torch.tensor(starts, dtype=torch.int32),
        tables=torch.tensor(tables, dtype=torch.int32),
        lines=torch.arange(len(sequences), dtype=torch.int32),
        lengths=torch.tensor(lengths, dtype=torch.int32),
        longest=max(lengths),
        most=max(lengths),
        adapters=spans,
    )


@torch.inference_mode()
def logits(decoder: Decoder, batch: Batch, routed: torch.Tensor | None = None) -> torch.Tensor:
    """fp32 [T, V] on a fresh cache."""
    pages = batch.tables.numel()
    cache = decoder.kernels.allocate(decoder.config, pages, PAGE, decoder.dtype, batch.ids.device)
    return decoder.logits(decoder.hidden_states(batch, cache, routed)).float()


@torch.inference_mode()
def expected_logits(model: PreTrainedModel, sequences: list[list[int]]) -> torch.Tensor:
    return torch.cat([model(torch.tensor([ids])).logits[0].float() for ids in sequences])


def lora_config(rank: int, alpha: float, **more: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none", **more}


def random_adapter(
    decoder: Decoder, rank: int, alpha: float, modules: tuple[str, ...], seed: int, **more: Any
) -> AdapterWeights:
    """For the named modules (`self_attn.q_proj`) of every layer that has them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor in decoder.export(None).items():
        module = name.removesuffix(".weight")
        if module.endswith(modules):
            outputs, inputs = tensor.shape
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) * 0.1
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator) * 0.1
    return AdapterWeights(lora_config(rank, alpha, **more), tensors, decoder.dtype)

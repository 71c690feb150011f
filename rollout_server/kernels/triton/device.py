"""What kernels need to know of the device they are launched on."""

from __future__ import annotations

from functools import lru_cache

import torch

PROGRAMS_PER_PROCESSOR = 4
"""Programs that a multiprocessor needs in flight to hide memory latency behind each other's loads."""


@lru_cache
def programs(device: torch.device) -> int:
    """Programs that fill the device; 1 off CUDA, where Triton's interpreter runs them one after the other."""
    if device.type != "cuda":
        return 1
    return PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


def power_of_2(n: int) -> int:
    """The least power of two that is not below n: Triton's tiles have no other sizes."""
    return 1 << max(n - 1, 0).bit_length()

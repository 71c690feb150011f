"""DAPO's soft punishment of calls that come near the limit of their length: arXiv 2503.14476, equation 13.

With L_max the limit and L_cache = buffer · L_max, a call of y tokens gets

    0                                  y ≤ L_max − L_cache
    −penalty · (y − (L_max − L_cache)) / L_cache      up to L_max
    −penalty                           beyond

The paper's penalty is 1. A call that is cut at the limit has L_max tokens: it gets the whole of it.
"""

from __future__ import annotations

from lightning_rl.algorithms.settings import Overlong


def overlong(length: int, settings: Overlong, max_tokens: int) -> float:
    """What is added to the reward of a call with `length` sampled tokens; at most 0. `max_tokens` is L_max."""
    buffer = settings.buffer * max_tokens
    over = length - (max_tokens - buffer)
    return -settings.penalty * min(max(over / buffer, 0.0), 1.0)

"""Random numbers that depend on (seed, choice, token) and on nothing else.

What else is in the batch has no influence, and a sequence that is computed again samples the same. Counter-based, after
splitmix64 (Steele, Lea & Flood, 2014): a slot's `stream` is hashed once, a pass hashes each token's index into it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def stream(seed: int, index: int) -> int:
    """64 bits that name the sequence of draws of one choice; choice 0 has the stream of the bare seed."""
    return _finalise((seed ^ _finalise(index)) + _STEP)


def uniforms(streams: npt.NDArray[np.uint64], at: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """One number in (0, 1) for token `at[i]` of `streams[i]`, multiples of 2^-53 shifted by half of that."""
    x = (streams ^ at) + np.uint64(_STEP)
    for shift, factor in _ROUNDS:
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    x ^= x >> np.uint64(31)
    return np.minimum(((x >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53, 1.0 - 2.0**-53)


def uniform(seed: int, index: int, at: int) -> float:
    """The uniform of token `at` of choice `index`."""
    return float(uniforms(np.array([stream(seed, index)], np.uint64), np.array([at], np.uint64))[0])


def _finalise(x: int) -> int:
    """Invertible on 64 bits; 0 goes to 0."""
    x &= _MASK
    for shift, factor in _ROUNDS:
        x = ((x ^ (x >> shift)) * factor) & _MASK
    return x ^ (x >> 31)

"""What the scheduler counts: what a benchmark or a test compares instead of a clock."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """Monotonic. Tokens to prefill are computed (`prefill_tokens`, `recomputed_tokens`) or found (`cached_tokens`)."""

    steps: int = 0
    prefill_tokens: int = 0
    """Prompt tokens computed for the first time."""
    recomputed_tokens: int = 0
    """Tokens computed again: after a preemption or an update, and the last of a prompt that was known as a whole."""
    cached_tokens: int = 0
    """Tokens found in the prefix tree, or shared with an equal prompt in the same pass."""
    scored_tokens: int = 0
    sampled_tokens: int = 0
    surplus_tokens: int = 0
    """Sampled ahead of a stop or a cancellation, and dropped."""
    preemptions: int = 0
    finished: int = 0
    constrained: int = 0
    """Choices that were asked to fit a grammar."""
    grammar_failures: int = 0
    """Requests that ended because their grammar could not be followed any further."""
    copied_pages: int = 0
    evicted_pages: int = 0
    """Gone from the device, `offloaded_pages` of them to the host tier."""
    offloaded_pages: int = 0
    restored_pages: int = 0

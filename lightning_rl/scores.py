"""What the trainer's models say about the tokens of a call before the step: input of credit and of objectives."""

from __future__ import annotations

from msgspec import Struct


class CallScores(Struct, frozen=True, kw_only=True):
    """Of one call, an entry for each of its sampled tokens that fits in a row. Lists are empty where nobody asked for them."""

    old: list[float] = []
    """log π_old: the trainer's policy before the step."""
    reference: list[float] = []
    """log π_ref: the policy that the reinforcement learning started from."""
    values: list[float] = []
    """The critic's value of the state before the token."""

"""Credit: which part of an episode's reward belongs to which call. One rule a file, chosen by name in the recipe.

A rule is a pure function from an episode and the recipe's reward weights to a return for each call.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Protocol, cast

from lightning_rl.episode import Episode


class CreditRule(Protocol):
    def __call__(self, episode: Episode, weights: Mapping[str, float]) -> dict[str, float]:
        """The return of each call of the episode, by call id."""
        ...


RULES = {"equal": "lightning_rl.credit.equal:equal"}
"""`module:function` by the name that recipes use."""


def credit_rule(name: str) -> CreditRule:
    """The rule of that name; KeyError if there is none (a recipe is checked before)."""
    module, function = RULES[name].split(":")
    return cast(CreditRule, getattr(importlib.import_module(module), function))

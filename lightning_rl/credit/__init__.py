"""Credit: which part of a rollout's reward belongs to which call. One rule a file, chosen by name in the recipe.

A rule is a pure function from the rollouts of a group to `records.Credits`. Its keyword parameters, with their defaults, are what
a recipe may set beside its name.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_rl.credit.checks import checked
from lightning_rl.credit.records import CreditRule, Credits, Rollout
from lightning_rl.errors import CreditError, LightningError

RULES = {
    "equal": "lightning_rl.credit.equal:equal",
    "final": "lightning_rl.credit.final:final",
    "step_rewards": "lightning_rl.credit.step_rewards:step_rewards",
    "return_to_go": "lightning_rl.credit.return_to_go:return_to_go",
    "per_agent": "lightning_rl.credit.per_agent:per_agent",
    "mt_grpo": "lightning_rl.credit.mt_grpo:mt_grpo",
    "tree": "lightning_rl.credit.tree:tree",
    "gigpo": "lightning_rl.credit.gigpo:gigpo",
    "turn_gae": "lightning_rl.credit.turn_gae:turn_gae",
    "token_gae": "lightning_rl.credit.token_gae:token_gae",
}
"""`module:function` by the name that recipes use."""
WITH_CRITIC = frozenset({"turn_gae", "token_gae"})
"""Rules that read `Rollout.values`."""


def rule_function(name: str) -> Callable[..., Credits]:
    """The function of a rule of ours, without parameters set; KeyError if there is none (a recipe is checked before)."""
    module, function = RULES[name].split(":")
    found: Callable[..., Credits] = getattr(importlib.import_module(module), function)
    return found


def parameters(function: Callable[..., Any]) -> dict[str, Any]:
    """The default of each parameter that a recipe may set, by its name."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def bind(
    function: Callable[..., Any], arguments: Mapping[str, Any], name: str
) -> Callable[[Sequence[Rollout]], Credits]:
    """The rule with its parameters set, whose answer is checked: see `checks.checked`. `name` is what errors call it.

    Raises CreditError if the function does not take a group and these arguments. So does the bound rule where a rule of the
    user's (a name with a colon) fails; what one of ours raises is raised as it is.
    """
    try:
        inspect.signature(function).bind((), **arguments)
    except TypeError as error:
        given = ", ".join(["group", *(f"{key}={value!r}" for key, value in arguments.items())])
        raise CreditError(
            f"the credit rule {name} cannot be called with ({given}): {error}",
            hint="a rule is `def rule(group, *, ...)`, where every parameter after the star has a default",
        ) from error
    rule: CreditRule = functools.partial(function, **arguments)

    def bound(group: Sequence[Rollout]) -> Credits:
        try:
            given = rule(group)
        except Exception as error:
            if ":" not in name or isinstance(error, LightningError):
                raise
            told = "".join(traceback.format_exception(error)).rstrip()
            episodes = ", ".join(rollout.id for rollout in group)
            raise CreditError(f"the credit rule {name} failed on the group of {episodes}:\n{told}") from error
        return checked(given, group, name)

    return bound

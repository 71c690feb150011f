"""The sections of a recipe about rewards: judged, returned, read from the record."""

from __future__ import annotations

import difflib
from typing import Annotated, Self

import msgspec
from pydantic import Field, model_validator

from lightning_rl.automatic_rewards import NAMES as AUTOMATIC_NAMES
from lightning_rl.automatic_rewards import AutomaticRules
from lightning_rl.recipe.fields import FieldError, FunctionName, Section

NEAR = 0.85
"""How alike a name is to another (difflib's ratio) that it is taken for a misspelling of."""


class Excess(Section):
    """A reward for what goes beyond a limit."""

    limit: Annotated[int, Field(ge=0)]
    """What is still free."""
    value: float
    """The reward of each one beyond it."""


class AutomaticRewards(Section):
    """Intermediate rewards read from an episode's calls and tool spans. null gives none. Each is a reward of this name and value;
    the names are reserved for them. Calls that another adapter or a provider answered earn nothing."""

    tool_error: float | None = None
    """At each tool call that failed: it raised, or its result has an `error` or begins with "error"."""
    tool_success: float | None = None
    """At each tool call that was run and did not fail."""
    valid_arguments: float | None = None
    """At each tool call whose arguments fit the tool's schema, as the request gave it."""
    invalid_arguments: float | None = None
    """At each tool call whose arguments do not, or that names no tool."""
    repeated_call: float | None = None
    """At each tool call with the name and arguments of an earlier one."""
    turns: Excess | None = None
    """At each request to the policy beyond so many in the episode; its choices (`n`) are one."""
    tokens: Excess | None = None
    """At each call, for every token that it sampled beyond so many in the episode."""

    def rules(self) -> AutomaticRules:
        return msgspec.convert(self.model_dump(), AutomaticRules)


class Rewards(Section):
    """How an episode is judged. `reward: file.py:function` is short for a section with that function alone."""

    function: FunctionName | None = None
    """Called as `function(task, episode)` when an episode has ended; returns numbers by name, or a list of rewards, at the episode,
    at calls or at spans. null: a function returns its own reward, a number (named `return`), or numbers by name of which one is in
    `weights` or is `evaluate.success`; or the agent emits it, a command by lines with `reward`."""
    automatic: AutomaticRewards = AutomaticRewards()
    weights: dict[str, float] = {}
    """What each reward counts in the return, by its name; 0 only records it. If any weight is given, each reward's name
    must have one; automatic rewards count as they are unless they are named. Without weights, every reward counts as it is."""

    @model_validator(mode="after")
    def _weighted_rewards_are_given(self) -> Self:
        missing = [name for name in self.weights if name in AUTOMATIC_NAMES and getattr(self.automatic, name) is None]
        if missing:
            raise FieldError(
                ("weights", missing[0]),
                "reward.automatic does not give it, and the name is reserved: set "
                f"reward.automatic.{missing[0]}, or give your own reward another name",
            )
        given = [name for name in self.automatic.rules().given if name not in self.weights]
        for name in self.weights:
            if not name.strip():
                raise FieldError(("weights",), "a reward's name must not be empty")
            near = [] if name in AUTOMATIC_NAMES else difflib.get_close_matches(name, given, 1, NEAR)
            if near:
                raise FieldError(
                    ("weights", name),
                    f"a misspelling of {near[0]!r}, which reward.automatic gives? If it is a reward of your own, give it "
                    f"another name, or {near[0]!r} a weight, too",
                )
        return self

"""The schema of `recipe.yaml`: everything that a run depends on, checked whole before anything starts.

A recipe is frozen and complete: every field has a value once it is loaded, and functions are named by absolute paths,
so that it can be written to the run directory and read again from there. `docs/recipe.md` is generated from this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import Field, PrivateAttr, ValidationError, model_validator

from lightning_rl.automatic_rewards import NAMES as AUTOMATIC_NAMES
from lightning_rl.errors import RecipeError
from lightning_rl.recipe.agent import Agent, Model, Outcomes, Route, Tasks, Upstream
from lightning_rl.recipe.fields import POLICY, RETURNED, FieldError, Section
from lightning_rl.recipe.file import read_recipe_file
from lightning_rl.recipe.functions import Reference, did_you_mean, resolve_reference
from lightning_rl.recipe.problems import describe
from lightning_rl.recipe.reward import AutomaticRewards, Excess, Rewards
from lightning_rl.recipe.serving import Otlp, Recording, Server, Tracking, Wandb
from lightning_rl.recipe.training import (
    Credit,
    Critic,
    Evaluate,
    LoraConfig,
    Objective,
    Publish,
    SamplingSection,
    Train,
    WarmStart,
)

__all__ = [
    "RETURNED",
    "Agent",
    "AutomaticRewards",
    "Credit",
    "Critic",
    "Evaluate",
    "Excess",
    "LoraConfig",
    "Model",
    "Objective",
    "Otlp",
    "Outcomes",
    "Publish",
    "Recipe",
    "Recording",
    "Rewards",
    "Route",
    "SamplingSection",
    "Server",
    "Tasks",
    "Tracking",
    "Train",
    "Upstream",
    "Wandb",
    "WarmStart",
    "load_recipe",
]

SHORT_FORMS = (("reward", "function"), ("train", "credit", "rule"), ("train", "objective", "name"))
"""Sections that may be written as the text of one of their fields."""


class Recipe(Section):
    """A run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run's folder: letters, digits, `.`, `_` and `-`."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of everything random: tasks, their order, sampling, initial adapters."""
    model: Model
    agent: Agent
    tasks: Tasks
    reward: Rewards
    sampling: SamplingSection = SamplingSection()
    warm_start: WarmStart | None = None
    """null starts from the model as it is."""
    train: Train
    evaluate: Evaluate = Evaluate()
    publish: Publish = Publish()
    server: Server = Server()
    upstreams: dict[str, Upstream] = {}
    """Providers that `agent.routes` may name."""
    recording: Recording = Recording()
    tracking: Tracking = Tracking()
    runs_dir: Annotated[str, Field(min_length=1)] = "runs"
    """Folder of the run directories, relative to where `lrl` is started."""

    _source: Path = PrivateAttr()

    @model_validator(mode="after")
    def _success_is_a_reward(self) -> Self:
        weights, success = self.reward.weights, self.evaluate.success
        if success is None and not weights and self.reward.function is not None:
            raise FieldError(
                ("evaluate", "success"), "must name the reward that says a task was solved, or reward.weights be given"
            )
        automatic = self.reward.automatic.rules().given
        if success in AUTOMATIC_NAMES and success not in automatic:
            raise FieldError(("evaluate", "success"), f"reward.automatic does not give {success}")
        if success is not None and weights and success not in [*weights, *automatic]:
            raise FieldError(
                ("evaluate", "success"), f"{success!r} is not in reward.weights{did_you_mean(success, [*weights])}"
            )
        return self

    @model_validator(mode="after")
    def _routes_lead_somewhere(self) -> Self:
        adapters, upstreams = self.model.adapters, self.upstreams
        for name in sorted({POLICY, self.model.name} & {*adapters, *upstreams} | adapters.keys() & upstreams.keys()):
            place = ("upstreams", name) if name in upstreams else ("model", "adapters", name)
            raise FieldError(place, f"{name!r} names two of: the policy, model.adapters, upstreams")
        known = [POLICY, *adapters, *upstreams]
        for number, route in enumerate(self.agent.routes):
            if route.to not in known:
                raise FieldError(
                    ("agent", "routes", number, "to"),
                    f"{route.to!r} is neither {POLICY!r} nor in model.adapters nor in upstreams"
                    f"{did_you_mean(route.to, known)}",
                )
        return self

    @model_validator(mode="after")
    def _something_is_trained_on(self) -> Self:
        if self.sampling.top_p < 1 and self.train.restricted == "mask":
            raise FieldError(
                ("train", "restricted"),
                f"mask leaves every call out: sampling.top_p is {self.sampling.top_p:g}, below 1",
            )
        return self

    @property
    def success_reward(self) -> str:
        """Name of the reward that says whether a task was solved."""
        return self.evaluate.success or next(iter(self.reward.weights), RETURNED)

    @property
    def reward_names(self) -> set[str]:
        """Names of rewards that the recipe says itself: a returned dict that has one of them is rewards."""
        return {*self.reward.weights, self.success_reward}

    @property
    def source(self) -> Path:
        """The file that the recipe was loaded from."""
        return self._source

    def resolve_function(self, reference: str) -> Reference:
        """Find a function that a field names; RecipeError if there is none."""
        try:
            return resolve_reference(reference, self.source.parent)
        except ValueError as error:
            raise RecipeError(f"{self.source}: {error}") from error

    def to_yaml(self) -> str:
        """The whole recipe, defaults included; loads back as an equal one from any folder."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _correction(tis_cap: Any) -> dict[str, Any]:
    return {"kind": "none"} if tis_cap is None else {"kind": "truncate", "high": tis_cap}


def load_recipe(path: Path, overrides: Sequence[str] = (), *, recorded: bool = False) -> Recipe:
    """Read and check a recipe, with `section.field=value` put on top. `recorded`: its episodes are there already, so the agent's
    programs, files and adapters need not be.

    Raises:
        RecipeError: with one line for each problem: `file:line: field: what is wrong (did you mean 'x'?)`.
    """
    file = read_recipe_file(path)
    # One by one: after train.objective=ppo, the next may set train.objective.kl.
    for assignments in ([], *([override] for override in overrides)):
        file.override(assignments)
        for *section, name in SHORT_FORMS:
            file.lengthen(section, name)
        file.rename(("train", "objective"), "tis_cap", "correction", _correction)
    problems = list(file.problems)
    try:
        recipe = Recipe.model_validate(file.values, context={"folder": path.resolve().parent, "recorded": recorded})
    except ValidationError as error:
        problems += describe(error, file, Recipe)
    if problems:
        raise RecipeError("\n".join(map(str, problems)), hint="docs/recipe.md lists every field")
    recipe._source = path.resolve()
    return recipe

"""The objective of a recipe, in words and in LaTeX: what `lrl train --dry-run` and the viewer say of it."""

from __future__ import annotations

from lightning_rl.algorithms.formula import Part, formula
from lightning_rl.recipe import Recipe
from trainers.needs import critic


def objective(recipe: Recipe) -> list[Part]:
    train, head = recipe.train, critic(recipe)
    return formula(
        train.objective.settings(),
        train.rule,
        train.credit.arguments if train.credit else {},
        critic=head.coefficient if head else None,
        length=recipe.sampling.max_tokens,
    )

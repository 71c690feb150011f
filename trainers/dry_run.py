"""`lrl train RECIPE --dry-run`: what a run would do, said before it does anything.

The recipe is checked as for a run, its tasks are made and its credit rule is loaded. Nothing is started and nothing written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec import Struct
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from lightning_rl.algorithms.formula import Part
from lightning_rl.credit import WITH_CRITIC
from lightning_rl.recipe import Recipe, load_recipe
from tracers.commands.view import safe
from trainers.learning import credit_rule
from trainers.needs import critic, needs
from trainers.objective import objective
from trainers.rollouts import load_tasks


class Plan(Struct, frozen=True, kw_only=True):
    """What would run, as lines of (what, words), and the objective."""

    facts: list[tuple[str, str]]
    objective: list[Part]


def dry_run(recipe_path: Path, overrides: Sequence[str]) -> int:
    """Raises RecipeError as a run would."""
    recipe = load_recipe(recipe_path, overrides)
    splits = load_tasks(recipe)
    credit_rule(recipe)
    planned = plan(recipe, {name: len(rows) for name, rows in splits.items()})
    console = Console()
    console.print(plan_view(planned))
    for part in planned.objective:
        if part.latex:  # in one line each, to be copied
            console.print(safe(f"{part.what}:  {part.latex}"), soft_wrap=True)
    console.print("\na dry run: nothing was started, nothing was written")
    return 0


def plan(recipe: Recipe, tasks: Mapping[str, int]) -> Plan:
    """`tasks`: rows by split."""
    train = recipe.train
    facts = [
        ("run", f"{recipe.name}, in {Path(recipe.runs_dir, recipe.name)}/<time>/"),
        ("model", _model(recipe)),
        ("agent", _agent(recipe)),
        ("tasks", ", ".join(f"{count} {split}" for split, count in tasks.items())),
        ("rewards", _rewards(recipe)),
        ("credit", _credit(recipe)),
        ("a step", _step(recipe)),
        ("in all", _total(recipe)),
        ("scored before a step's updates", _scored(recipe)),
        ("learning rate", f"{train.learning_rate:g}, {train.lr_schedule}" + _warmup(train.warmup_steps)),
        ("evaluation", _evaluation(recipe)),
    ]
    return Plan(facts=facts, objective=objective(recipe))


def plan_view(planned: Plan) -> Group:
    words = _grid()
    for what, text in planned.facts:
        words.add_row(what, safe(text))
    objective = _grid()
    for part in planned.objective:
        objective.add_row(part.what, safe(part.words))
    titles = [Text(title, "bold") for title in ("what would run", "\nthe objective", "\nthe same in LaTeX")]
    return Group(titles[0], words, titles[1], objective, titles[2])


def _grid() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", overflow="fold", max_width=18)
    table.add_column(overflow="fold")
    return table


def _model(recipe: Recipe) -> str:
    lora = recipe.train.lora
    trained = f"a LoRA adapter of rank {lora.rank} is trained" if lora else "all weights are trained"
    frozen = f"; beside it, frozen: {', '.join(recipe.model.adapters)}" if recipe.model.adapters else ""
    elsewhere = f"; answered elsewhere: {', '.join(recipe.upstreams)}" if recipe.upstreams else ""
    return f"{recipe.model.name}, {recipe.model.dtype}; {trained}{frozen}{elsewhere}"


def _agent(recipe: Recipe) -> str:
    learns = "" if recipe.agent.learns == ["*"] else f"; learning: {', '.join(recipe.agent.learns)}"
    return f"{recipe.agent.function or recipe.agent.command}{learns}"


def _rewards(recipe: Recipe) -> str:
    weights = ", ".join(f"{weight:g} · {name}" for name, weight in recipe.reward.weights.items())
    automatic = ", ".join(recipe.reward.automatic.rules().given)
    by = recipe.reward.function or "what the agent returns or emits"
    return f"{by}; R = {weights or 'the sum of all rewards'}" + (f"; automatic: {automatic}" if automatic else "")


def _credit(recipe: Recipe) -> str:
    own, objective = recipe.train.objective.settings().credit, recipe.train.objective.name
    if recipe.train.credit is None:
        return f"{own}, the objective's own"
    beside = "" if recipe.train.credit.rule == own else f"; {objective}'s own is {own}"
    if own in WITH_CRITIC and critic(recipe) is None:
        beside += ", which reads a critic: there is none here"
    return f"{recipe.train.credit.rule}, as train.credit says{beside}"


def _step(recipe: Recipe) -> str:
    train = recipe.train
    minibatches, updates = _minibatches(recipe), _updates(recipe)
    how = "all groups at once"
    if updates > 1:
        how = f"{_count(minibatches, 'minibatch', 'es')} × {_count(train.epochs, 'epoch')}"
    if minibatches > 1:
        how += ", fewer where fewer groups have a loss"
    most = "at most " if minibatches > 1 else ""
    more = train.objective.settings().dynamic_sampling
    groups, rollouts = train.tasks_per_step, train.samples_per_task
    episodes = f"{groups} groups × {rollouts} rollouts = {groups * rollouts}"
    grows = f" (at most {train.tasks_per_step * (1 + more)} groups, by dynamic sampling)" if more else ""
    return f"{episodes} episodes{grows}; {most}{_count(updates, 'update')} of the policy ({how})"


def _minibatches(recipe: Recipe) -> int:
    """At most: a minibatch has a group at least."""
    train = recipe.train
    return min(train.minibatches, train.tasks_per_step * (1 + train.objective.settings().dynamic_sampling))


def _updates(recipe: Recipe) -> int:
    """At most, in a step."""
    return _minibatches(recipe) * recipe.train.epochs


def _total(recipe: Recipe) -> str:
    train = recipe.train
    episodes = train.steps * train.tasks_per_step * train.samples_per_task
    more = " or more" if train.objective.settings().dynamic_sampling else ""
    most = "at most " if _minibatches(recipe) > 1 else ""
    updates = most + _count(train.steps * _updates(recipe), "update")
    warm = f", after a warm start of {_count(recipe.warm_start.steps, 'step')}" if recipe.warm_start else ""
    processes = _count(train.world_size, "trainer process", "es")
    return f"{_count(train.steps, 'step')}, {episodes}{more} episodes, {updates}{warm}; {processes}"


def _scored(recipe: Recipe) -> str:
    needed = needs(recipe)
    parts = []
    if needed.old:
        parts.append("the policy (π_old, as it changes between the updates of a step)")
    if needed.reference:
        parts.append("the reference policy (for the KL penalty)")
    if (head := critic(recipe)) is not None:
        parts.append(
            f"the critic ({head.hidden} units, learning rate {head.learning_rate:g}, weight {head.coefficient:g})"
        )
    return "; ".join(parts) or "nothing: π_old is the policy that is updated"


def _warmup(steps: int) -> str:
    return f", after {_count(steps, 'step')} of warm-up" if steps else ""


def _evaluation(recipe: Recipe) -> str:
    every = f", and every {_count(recipe.evaluate.every, 'step')}" if recipe.evaluate.every else ""
    when = "before, after the warm start and at the end" if recipe.warm_start else "before and at the end"
    return f"{recipe.success_reward} on {_count(recipe.evaluate.tasks, 'task')}, greedy: {when}{every}"


def _count(number: int, what: str, plural: str = "s") -> str:
    return f"{number} {what}{'' if number == 1 else plural}"

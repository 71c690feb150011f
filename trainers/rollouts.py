"""Which episodes a step or an evaluation needs, and what each starts from.

A pure function of recipe, tasks and step: a resumed run asks for the very same episodes, with the same ids and seeds, and the
runner pool skips those that the store has already.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_rl.episode import EpisodeStart, Sampling, Task
from lightning_rl.errors import RecipeError
from lightning_rl.recipe import Recipe
from lightning_rl.recipe.functions import Reference
from trainers.runner.pool import episode_id
from trainers.runner.user_code import load_function


def load_tasks(recipe: Recipe) -> dict[str, list[dict[str, Any]]]:
    """The recipe's task function called: split -> rows. Raises RecipeError when it does not give what a run needs."""
    where = recipe.resolve_function(recipe.tasks.function)
    made = load_function(*where)(seed=recipe.seed, **recipe.tasks.arguments)
    if not isinstance(made, Mapping):
        raise RecipeError(f"{where} returned {type(made).__name__}, not a mapping of splits")
    needed = ["train", "eval"] + (["warm_start"] if recipe.warm_start else [])
    missing = [split for split in needed if not made.get(split)]
    if missing:
        raise RecipeError(f"{where} made no tasks for {', '.join(missing)}", hint=f"it made {', '.join(made)}")
    splits = {split: [_row(row, where, split) for row in made[split]] for split in made}
    for split in ("train", "eval"):
        ids = [row.get("id") for row in splits[split]]
        if None in ids or "" in ids or len(set(map(str, ids))) != len(ids):
            raise RecipeError(f"{where}: every row of {split} needs a field `id` of its own")
    shared = {str(row["id"]) for row in splits["train"]} & {str(row["id"]) for row in splits["eval"]}
    if shared:
        raise RecipeError(f"{where}: {len(shared)} ids are both in train and in eval, first {min(shared)!r}")
    if len(splits["eval"]) < recipe.evaluate.tasks:
        raise RecipeError(
            f"evaluate.tasks is {recipe.evaluate.tasks}, but {where} made {len(splits['eval'])} eval tasks",
            hint="lower evaluate.tasks, or ask for more in tasks.arguments",
        )
    return splits


def _row(row: Any, where: Reference, split: str) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise RecipeError(f"{where}: a row of {split} is a {type(row).__name__}, not a mapping of fields")
    return dict(row)


def tasks_digest(splits: Mapping[str, list[dict[str, Any]]]) -> str:
    """Equal exactly when the tasks are: what a resumed run compares."""
    return hashlib.blake2b(json.dumps(splits, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def as_tasks(rows: Iterable[Mapping[str, Any]]) -> list[Task]:
    return [Task(id=str(row["id"]), input={key: value for key, value in row.items() if key != "id"}) for row in rows]


def tasks_from(tasks: Sequence[Task], first: int, count: int, seed: int) -> list[Task]:
    """`count` tasks of an endless sequence of shuffled epochs, from position `first` on. Each task is in an epoch once."""
    chosen: list[Task] = []
    order: list[int] = []
    for position in range(first, first + count):
        epoch, index = divmod(position, len(tasks))
        if not chosen or index == 0:
            order = list(range(len(tasks)))
            random.Random(f"{seed}-{epoch}").shuffle(order)
        chosen.append(tasks[order[index]])
    return chosen


def train_starts(
    recipe: Recipe, tasks: Sequence[Task], step: int, *, round: int = 0, count: int | None = None
) -> list[EpisodeStart]:
    """All samples of a step's tasks, one group a task, samples of a group next to each other: they share a prefix.

    Round 0 has `train.tasks_per_step` tasks. Each further one of dynamic sampling has `count` of the next that many, which are set
    aside for it whether it comes or not: so a step's tasks do not depend on how many the steps before it needed.
    """
    per_round = recipe.train.tasks_per_step
    per_step = per_round * (1 + recipe.train.objective.settings().dynamic_sampling)
    start = per_round * round
    stop = start + (per_round if count is None else count)
    known = tasks_from(tasks, step * per_step, stop, recipe.seed)
    return [
        _start(
            recipe,
            task,
            phase="train",
            step=step,
            sample=sample,
            # A task that occurs twice in a step (few tasks, new epoch) is two groups.
            group=f"{step}/{task.id}" + (f"/{place}" if known.index(task) != place else ""),
            first_sample=sum(other == task for other in known[:place]) * recipe.train.samples_per_task,
            temperature=recipe.sampling.temperature,
        )
        for place, task in enumerate(known)
        if place >= start
        for sample in range(recipe.train.samples_per_task)
    ]


def eval_starts(recipe: Recipe, tasks: Sequence[Task], label: str) -> list[EpisodeStart]:
    """One greedy episode per held-out task."""
    return [
        _start(recipe, task, phase=f"eval-{label}", step=0, sample=0, group="", first_sample=0, temperature=0.0)
        for task in tasks[: recipe.evaluate.tasks]
    ]


def _start(
    recipe: Recipe, task: Task, *, phase: str, step: int, sample: int, group: str, first_sample: int, temperature: float
) -> EpisodeStart:
    number = first_sample + sample
    digest = hashlib.blake2b(f"{recipe.seed}/{phase}/{step}/{task.id}/{number}".encode(), digest_size=8).digest()
    return EpisodeStart(
        id=episode_id(phase, step, task.id, number),
        task=task,
        phase=phase,
        step=step,
        sample=number,
        group=group,
        sampling=Sampling(
            temperature=temperature,
            top_p=recipe.sampling.top_p,
            max_tokens=recipe.sampling.max_tokens,
            seed=int.from_bytes(digest) >> 1,
            top_logprobs=recipe.sampling.top_logprobs or None,
        ),
    )

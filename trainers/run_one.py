"""`lrl run`: one episode of an agent against a model, and its trace on the screen, before there is a recipe.

The agent is a function, a command, or that of a recipe; it runs as it would in training, in a process of its own, under the same
server, and is recorded in the same kind of store.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import secrets
import shlex
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import NoReturn

import msgspec
from rich.console import Console as RichConsole

from lightning_rl.episode import Episode, EpisodeStart, Outcome, Sampling, Task
from lightning_rl.errors import LightningError, RecipeError
from lightning_rl.recipe import RETURNED, load_recipe
from lightning_rl.recipe.command import check_command
from lightning_rl.recipe.functions import Reference, did_you_mean, resolve_reference
from lightning_rl.store import Store
from lightning_rl.store.place import settle_store, store_of
from rollout_server.launch import RolloutServer
from rollout_server.models.catalog import resolve_model
from trainers.console import Console
from trainers.rollouts import as_tasks, load_tasks
from trainers.run_directory import RunDirectory
from trainers.runner.pool import DEFAULT_POLICY, EpisodeResult, OutcomePolicy, RunnerPool, episode_id
from trainers.runner.words import Command

PHASE = "try"
DEFAULT_OUT = Path("runs/try")
ONCE: OutcomePolicy = dict(DEFAULT_POLICY) | {Outcome.INFRASTRUCTURE_ERROR: "drop"}
ANSWER_SECONDS = 10.0
NO_KEY = "lrl"
"""For a server that asks for none; SDKs do not start without one."""


@dataclass(frozen=True)
class Place:
    """Where the episode runs: a pool, its store, and what tells that the server is well."""

    pool: RunnerPool
    store: Store
    check: Callable[[], None]
    own_reward: bool
    """Whether what the agent returns may be its reward."""


def run_one(options: argparse.Namespace) -> int:
    """Exit code 0 if the agent completed, 1 if not. Raises LightningError for what cannot be run at all."""
    console = RichConsole(stderr=True)
    is_recipe = options.target is not None and Path(options.target).suffix in (".yaml", ".yml")
    with _recipe_place(options, console) if is_recipe else _own_place(options, console) as (place, run, task):
        start = _start(task, options, place.store)

        def begun(start: EpisodeStart) -> None:
            if options.server:
                _must_record(options.server, start.id, run)

        console.print(f"running task {task.id} …", markup=False, highlight=False)
        result = place.pool.run([start], check=place.check, on_begin=begun)[0]
        episode = place.store.episode(start.id)
    if options.json:
        sys.stdout.write(msgspec.json.encode(episode).decode() + "\n")
    else:
        _show(episode, result, run, is_recipe, place.own_reward)
    return 0 if episode.outcome is Outcome.COMPLETED else 1


@contextlib.contextmanager
def _own_place(options: argparse.Namespace, console: RichConsole) -> Iterator[tuple[Place, RunDirectory, Task]]:
    """A pool for the function or command, and a server unless one is named."""
    agent, command = _agent(options)
    reward = _function(options.reward) if options.reward else None
    text = _task_text(options)
    if text is None:
        raise LightningError("which task?", hint=EXAMPLE)
    task = read_task(text)
    if bool(options.model) == bool(options.server):
        raise LightningError(
            "which model?" if not options.model else "give --model or --server, not both",
            hint="--model smollm2-135m (built in), a directory or a hub id; or --server URL of a running `lrl serve`",
        )
    if options.server:
        options.server = options.server.rstrip("/").removesuffix("/v1")
    model_dir = resolve_model(options.model) if options.model else None
    run = RunDirectory(options.out or DEFAULT_OUT)
    run.path.mkdir(parents=True, exist_ok=True)
    own_reward = reward is None and command is None
    with contextlib.ExitStack() as stack:
        where = settle_store(run.path, None)
        store = stack.enter_context(Store.open(where))

        def pool_at(url: str, key: str) -> RunnerPool:
            return RunnerPool(
                agent_function=agent,
                agent_command=command,
                reward_function=reward,
                must_reward=False,
                store=store,
                server_url=url,
                api_key=key,
                timeout_s=options.timeout,
                max_attempts=1,
                outcome_policy=ONCE,
            )

        if model_dir is None:
            _ask(options.server, "/health")
            pool = stack.enter_context(pool_at(options.server, _own_key()))
            yield Place(pool, store, lambda: None, own_reward), run, task
            return
        name = model_dir.resolve().name if Path(options.model).is_dir() else options.model
        console.print(f"loading {name} …", markup=False, highlight=False)
        server = stack.enter_context(
            RolloutServer(model_dir, name, "bfloat16", log_dir=run.logs, store=where, aliases=["*"])
        )
        pool = stack.enter_context(pool_at(server.base_url, NO_KEY))
        yield Place(pool, store, server.check, own_reward), run, task


def _own_key() -> str:
    """The user's key, for a server that the user has named."""
    return os.environ.get("OPENAI_API_KEY") or NO_KEY


@contextlib.contextmanager
def _recipe_place(options: argparse.Namespace, console: RichConsole) -> Iterator[tuple[Place, RunDirectory, Task]]:
    """The recipe's own pool, server and store. A directory keeps the store that it began with, so that a recipe with a store of
    its own has a directory of its own."""
    from trainers.session import open_session

    for name, given in (("command", options.program), ("reward", options.reward), ("server", options.server)):
        if given:
            raise LightningError(f"--{name} is not for a recipe: it has its own", hint="override its fields: key=value")
    overrides = [*options.overrides, *([f"model.name={options.model}"] if options.model else [])]
    recipe = load_recipe(Path(options.target), [*overrides, "agent.max_attempts=1"])
    text = _task_text(options)
    if text is not None and text.lstrip().startswith("{"):
        task = read_task(text)
    else:
        splits = load_tasks(recipe)
        known = {task.id: task for split in ("eval", "train") for task in as_tasks(splits[split])}
        if text is not None and text not in known:
            raise RecipeError(
                f"{recipe.tasks.function} makes no task {text!r}{did_you_mean(text, [*known])}",
                hint=f"there are {len(known)}, the first is {next(iter(known))}; a task of your own is --task '{{…}}'",
            )
        task = known[text] if text is not None else next(iter(known.values()))
    own = recipe.recording.store is not None
    run = RunDirectory(options.out or (DEFAULT_OUT.with_name(f"try-{recipe.name}") if own else DEFAULT_OUT))
    run.path.mkdir(parents=True, exist_ok=True)
    options.temperature = recipe.sampling.temperature if options.temperature is None else options.temperature
    options.max_tokens = options.max_tokens or recipe.sampling.max_tokens
    with Console(console) as quiet, open_session(recipe, run, quiet) as session:
        own_reward = recipe.reward.function is None and recipe.agent.command is None
        yield Place(session.pool, session.store, session.server.check, own_reward), run, task


def read_task(text: str) -> Task:
    """A task from its JSON; one without an id gets a digest of its content for one. Raises LightningError."""
    try:
        fields = json.loads(text, parse_constant=_no_constant)
    except ValueError as error:
        raise LightningError(f"the task is not JSON: {error}: {_short(text)}", hint=EXAMPLE) from None
    except RecursionError:
        raise LightningError("the task is nested too deeply", hint=EXAMPLE) from None
    if not isinstance(fields, dict):
        raise LightningError(f"the task must be a JSON object, not {_short(text)}", hint=EXAMPLE)
    try:
        msgspec.msgpack.encode(fields)
    except UnicodeEncodeError:
        raise LightningError(
            "the task has half of a letter (a lone surrogate), which is no text", hint=EXAMPLE
        ) from None
    except OverflowError:
        raise LightningError("the task has a whole number of more than 64 bits", hint=EXAMPLE) from None
    if "id" not in fields:
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
        return Task(id=f"task-{digest[:8]}", input=fields)
    name = fields.pop("id")
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise LightningError(
            f"a task's id must be text or a whole number, not {_short(json.dumps(name))}", hint=EXAMPLE
        )
    return Task(id=str(name), input=fields)


EXAMPLE = """for example --task '{"id": "t1", "question": "What is 12 * 7?"}'"""


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:80] + "…"


def _task_text(options: argparse.Namespace) -> str | None:
    """What --task or --task-file give; None where neither does."""
    if options.task is not None and options.task_file is not None:
        raise LightningError("give --task or --task-file, not both")
    if options.task_file is not None:
        try:
            return str(options.task_file.read_text(encoding="utf-8"))
        except OSError as error:
            raise LightningError(f"{options.task_file}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise LightningError(f"{options.task_file} is not UTF-8 text") from None
    return None if options.task is None else str(options.task)


def _agent(options: argparse.Namespace) -> tuple[Reference | None, Command | None]:
    if options.overrides:
        raise LightningError(
            f"{options.overrides[0]!r} sets a field of a recipe, and {options.target} is none", hint="lrl run --help"
        )
    if (options.target is None) == (options.program is None):
        raise LightningError(
            "which agent?" if options.target is None else "give a function or --command, not both",
            hint='lrl run my_agent.py:solve …, lrl run --command "node agent.js" …, or lrl run recipe.yaml',
        )
    if options.target is not None:
        return _function(options.target), None
    try:
        return None, Command(words=check_command(options.program, Path.cwd()), folder=str(Path.cwd()))
    except ValueError as error:
        raise LightningError(f"--command: {error}") from None


def _function(reference: str) -> Reference:
    try:
        return resolve_reference(reference, Path.cwd())
    except ValueError as error:
        raise RecipeError(str(error)) from None


def _start(task: Task, options: argparse.Namespace, store: Store) -> EpisodeStart:
    """The next episode of this task in the store. The server's store may be another, with a stranger's episodes of such a task:
    a random part keeps the id from being one of theirs."""
    taken = [episode.sample for episode in store.starts(phase=PHASE) if episode.task_id == task.id]
    sample = max(taken, default=-1) + 1
    return EpisodeStart(
        id=f"{episode_id(PHASE, 0, task.id, sample)}.{secrets.token_hex(4)}",
        task=task,
        phase=PHASE,
        sample=sample,
        sampling=Sampling(temperature=options.temperature, max_tokens=options.max_tokens, seed=options.seed),
    )


def _ask(server: str, path: str) -> int:
    """The status with which the server answers. Raises LightningError if nobody does."""
    request = urllib.request.Request(server.rstrip("/") + path, headers={"Authorization": f"Bearer {_own_key()}"})
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        opener.open(request, timeout=ANSWER_SECONDS).close()
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError, HTTPException) as error:
        raise LightningError(
            f"no rollout server answers at {server}: {getattr(error, 'reason', error)}",
            hint="start one with `lrl serve`, or let --model start it",
        ) from None
    return 200


def _must_record(server: str, episode_id: str, run: RunDirectory) -> None:
    """Raises LightningError if the server does not know an episode that has just begun in our store."""
    status = _ask(server, f"/e/{episode_id}/v1/models")
    if status == 401:
        raise LightningError(f"{server} asks for a key", hint="export OPENAI_API_KEY=…")
    if status != 200:
        store = store_of(run.path)
        raise LightningError(
            f"{server} does not record in {store}",
            hint=f"start it with: lrl serve --model MODEL --store {shlex.quote(str(store))}; or let --model start one",
        )


def _show(episode: Episode, result: EpisodeResult, run: RunDirectory, is_recipe: bool, own_reward: bool) -> None:
    from tracers.commands.view import episode_view, safe

    console = RichConsole()
    console.print(episode_view(episode))
    if result.output.strip() and episode.error is None:
        console.print("\nthe agent's output:", style="bold")
        console.print(safe(result.output.rstrip()))
    where, store = os.path.relpath(run.path), store_of(run.path)
    stored = os.path.relpath(store) if isinstance(store, Path) else store
    lines = [f"stored in {stored}; again: lrl traces show {where} {episode.id}"]
    if own_reward:
        lines += _own_reward(episode)
    if not episode.calls and episode.outcome is Outcome.COMPLETED:
        lines.append("It made no call: does it take its base URL from OPENAI_BASE_URL (or ANTHROPIC_BASE_URL)?")
    if not is_recipe:
        if not episode.rewards:
            lines.append(
                'It gave no reward: return a number (a command: write {"reward": 0.5}), call lightning_rl.reward(…), or add '
                "--reward file.py:function"
            )
        lines.append("Next: write a recipe and train it, see docs/quickstart.md; lrl run recipe.yaml tries the recipe")
    console.print()
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _own_reward(episode: Episode) -> list[str]:
    """What of the answer was read as a reward, or might have been meant as one."""
    answer, given = episode.answer, {reward.name for reward in episode.rewards}
    if isinstance(answer, int | float) and RETURNED in given:
        return [f"The number that it returned is its reward, named {RETURNED!r}."]
    if (
        not isinstance(answer, dict)
        or not answer
        or not all(isinstance(value, int | float) for value in answer.values())
    ):
        return []
    if answer.keys() <= given:
        return ["The numbers that it returned are its rewards: the recipe has one of their names."]
    return [
        "The numbers that it returned are its answer, no rewards: reward.weights or evaluate.success of a recipe must name one."
    ]

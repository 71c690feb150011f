"""A run from its start, or its resumption, to its summary: the order of the stages and nothing else."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from lightning_rl.errors import LightningError, ResumeError
from lightning_rl.memory import keep_freed_memory
from lightning_rl.recipe import Recipe, load_recipe
from tracers.commands.otlp import Collector
from trainers import loop
from trainers.checkpoint import TrainState, checkpoints, read_state
from trainers.console import Console, duration
from trainers.curve import plot_curve
from trainers.evaluation import Score
from trainers.learning import credit_rule
from trainers.otlp_sink import OtlpSink, collector_of
from trainers.ranks import RankConfig, Ranks
from trainers.rollouts import as_tasks, eval_starts, load_tasks, tasks_digest
from trainers.run_directory import RunDirectory, create_run, open_run, write_json
from trainers.session import Session, open_session
from trainers.tracking import MetricsFile, Sink, Wandb
from trainers.warm_start_stage import warm_start

if TYPE_CHECKING:
    from trainers.learner import Learner


def start_run(recipe_path: Path, overrides: Sequence[str]) -> int:
    recipe = load_recipe(recipe_path, overrides)
    splits = load_tasks(recipe)
    credit_rule(recipe)  # a user's that cannot be loaded or called fails before anything is paid for
    run = create_run(Path(recipe.runs_dir), recipe.name)
    run.recipe.write_text(recipe.to_yaml())
    run.tasks_digest.write_text(tasks_digest(splits))
    return _drive(recipe, run, splits)


def resume_run(path: Path) -> int:
    run = open_run(path)
    recipe = load_recipe(run.recipe)
    splits = load_tasks(recipe)
    credit_rule(recipe)
    if run.tasks_digest.exists() and run.tasks_digest.read_text() != tasks_digest(splits):
        raise ResumeError(
            f"{recipe.tasks.function} makes other tasks than when the run started",
            hint="restore the file, or start a new run: old and new episodes must not be mixed",
        )
    return _drive(recipe, run, splits)


def _drive(recipe: Recipe, run: RunDirectory, splits: Mapping[str, list[dict[str, Any]]]) -> int:
    """Run the stages; whatever ends them early, say how to go on."""
    keep_freed_memory()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    go_on = f"go on with: lrl train --resume {os.path.relpath(run.path)}"
    signal.signal(signal.SIGTERM, _as_interrupt)
    with run.lock(), Console() as console:
        console.say(f"run directory: {os.path.relpath(run.path)}")
        console.say(f"look at it: lrl ui {os.path.relpath(run.path)}")
        try:
            _stages(recipe, run, splits, console)
        except KeyboardInterrupt:
            console.say(f"stopped; nothing finished is lost; {go_on}")
            return 130
        except LightningError as error:
            raise type(error)(str(error), hint="; ".join(filter(None, [error.hint, go_on]))) from error
        except Exception as error:  # a full disk has many names; whatever it was, the run can go on
            trace = run.logs / "error.txt"
            with contextlib.suppress(OSError):
                trace.write_text(traceback.format_exc())
            raise LightningError(
                f"{type(error).__name__}: {error}", hint=f"the traceback is in {os.path.relpath(trace)}; {go_on}"
            ) from error
    if recipe.train.world_size > 1:
        sys.stdout.flush()
        os._exit(0)  # gloo can abort on an orderly exit, after all the work is done
    return 0


def _as_interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _stages(recipe: Recipe, run: RunDirectory, splits: Mapping[str, list[dict[str, Any]]], console: Console) -> None:
    tasks = {split: as_tasks(splits[split]) for split in ("train", "eval")}
    found = checkpoints(run.checkpoints)
    state = read_state(found[-1]) if found else None
    collector = collector_of(recipe.tracking.otlp) if recipe.tracking.otlp else None
    with open_session(recipe, run, console) as session, _sinks(session, state, collector) as sinks:
        # The base model can only be measured before the first publish: a resumed run has it in the store.
        base = session.evaluation("base") if state else loop.evaluate(session, tasks["eval"], "base", sinks, 0)
        scores = {"base": (0, base)}
        if recipe.warm_start:
            with session.timed("warm_start"):
                warm_start(session, splits["warm_start"])
        start_from = run.warm_start if recipe.warm_start else None
        with _learner(session, start_from) as learner:
            state = loop.resume_point(session, learner, found[-1] if found else None)
            if recipe.warm_start and not found:
                loop.publish_policy(session, learner, state.version, loop.known_sequences(session))
                scores["warm_start"] = (0, loop.evaluate(session, tasks["eval"], "warm_start", sinks, 0))
            elif recipe.warm_start:
                scores["warm_start"] = (0, session.evaluation("warm_start"))
            state = loop.train(session, learner, tasks, sinks, state)
            scores["final"] = (state.step, loop.evaluate(session, tasks["eval"], "final", sinks, state.step))
        _finish(session, state, scores, sinks)


@contextlib.contextmanager
def _learner(session: Session, start_from: Path | None) -> Iterator[Learner]:
    go_on = f"go on with: lrl train --resume {os.path.relpath(session.run.path)}"
    with contextlib.ExitStack() as stack:
        with session.timed("load"), session.console.stage("start trainer"):
            opened = open_learner(session.recipe, session.run, session.model_dir, start_from, go_on)
            learner = stack.enter_context(opened)
        yield learner


@contextlib.contextmanager
def open_learner(
    recipe: Recipe, run: RunDirectory, model_dir: Path, start_from: Path | None, go_on: str
) -> Iterator[Learner]:
    """All trainer ranks, this process being rank 0; the others read the recipe from the run. `go_on` is said if one dies."""
    from trainers.deepspeed_engine import init_distributed, leave_distributed
    from trainers.learner import Learner

    config = RankConfig(
        recipe=str(run.recipe),
        model_dir=str(model_dir),
        start_from=str(start_from) if start_from else None,
        parent_pid=os.getpid(),
    )
    with Ranks(recipe.train.world_size, config, run.logs, go_on) as ranks:
        init_distributed()
        learner = Learner(recipe, model_dir, start_from)
        yield learner
        ranks.leave()
        learner.stop()
        leave_distributed()


@contextlib.contextmanager
def _sinks(session: Session, state: TrainState | None, collector: Collector | None) -> Iterator[list[Sink]]:
    recipe, run = session.recipe, session.run
    metrics = MetricsFile(run.metrics, history=state.history if state else [])
    sinks: list[Sink] = [metrics]
    if recipe.tracking.wandb:
        wandb = recipe.tracking.wandb
        sinks.append(Wandb(run, wandb.project, wandb.mode, recipe.name, recipe.model_dump(mode="json")))
    if recipe.tracking.otlp and collector:
        sinks.append(OtlpSink(collector, session.store, recipe.tracking.otlp.content, session.console.say))
    try:
        yield sinks
    except BaseException:
        for sink in sinks:
            sink.close(failed=True)
        raise
    for sink in sinks:
        sink.close(failed=False)


def _finish(
    session: Session, state: TrainState, scores: Mapping[str, tuple[int, Score]], sinks: Sequence[Sink]
) -> None:
    run, recipe, console = session.run, session.recipe, session.console
    rows = [{"step": i, **row} for i, row in enumerate(state.history, start=1)]
    sampled = sum(row["tokens"]["sampled_now"] for row in rows)
    computed = sum(row["tokens"]["computed"] for row in rows)
    ledger = loop.total_ledger(state.history)
    ledger.check("the run")
    summary = {
        **{f"success_{label}": msgspec.to_builtins(result) for label, (_, result) in scores.items()},
        "seconds": {stage: round(value, 2) for stage, value in session.seconds.items()},
        "rollout_tokens_per_second": sampled / max(sum(row["seconds"]["rollout"] for row in rows), 1e-9),
        "train_tokens_per_second": computed / max(sum(row["seconds"]["train"] for row in rows), 1e-9),
        "ledger": ledger.to_dict(),
        "steps": state.step,
        "seed": recipe.seed,
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }
    write_json(run.summary, summary)
    plot_curve(run.curve, recipe.name, rows, dict(scores))
    for sink in sinks:
        sink.finish(summary)
    names = {"base": "the model as it was", "warm_start": "after the warm start", "final": "after RL"}
    console.table(
        f"{recipe.success_reward} on {recipe.evaluate.tasks} held-out tasks, greedy",
        ["policy", "success", "95 % interval"],
        [
            [names[label], f"{result.value:.3f}", f"{result.ci95[0]:.3f} … {result.ci95[1]:.3f}"]
            for label, (_, result) in scores.items()
        ],
    )
    where = os.path.relpath(run.path)
    total = duration(sum(session.seconds.values()))
    console.say(f"done in {total}: {', '.join(f'{k} {v:.0f} s' for k, v in session.seconds.items())}")
    console.say(f"curve: {where}/curve.png    figures: {where}/summary.json    steps: {where}/metrics.jsonl")
    console.say(f"look at it:        lrl ui {where}")
    console.say(f"look at episodes:  lrl traces list {where}")
    console.say(f"take the policy:   lrl export {where} --out policy")
    console.say(f"measure it again:  lrl eval {where}")


def evaluate_policy(target: Path, overrides: Sequence[str], policy: str | None) -> int:
    """`lrl eval`: in a directory of its own, so that a run's record stays what it was."""
    signal.signal(signal.SIGTERM, _as_interrupt)
    if target.suffix in (".yaml", ".yml"):
        recipe, directory = load_recipe(target, overrides), None
        policy = policy or "base"
    else:
        run = open_run(target)
        recipe = load_recipe(run.recipe, overrides)
        policy = policy or "latest"
        directory = run
    weights = _policy_directory(directory, policy)
    tasks = as_tasks(load_tasks(recipe)["eval"])
    scratch = create_run(Path(recipe.runs_dir), f"{recipe.name}-eval")
    scratch.recipe.write_text(recipe.to_yaml())
    with scratch.lock(), Console() as console, open_session(recipe, scratch, console) as session:
        if weights is not None:
            session.server.admin().update_weights(weights.resolve(), 1)
        result = session.evaluate("eval", eval_starts(recipe, tasks, "eval"))
        write_json(scratch.summary, {"policy": str(weights or "base"), "success": msgspec.to_builtins(result)})
        console.say(f"success of {policy}: {result} on {result.n} held-out tasks")
        console.say(f"look at episodes:  lrl traces list {os.path.relpath(scratch.path)}")
    return 0


def _policy_directory(run: RunDirectory | None, policy: str) -> Path | None:
    if policy == "base":
        return None
    if policy == "latest":
        if run is None:
            raise LightningError("a recipe has no latest policy", hint="give a run directory, or --policy base|DIR")
        return latest_policy(run)
    path = Path(policy)
    if not any((path / name).is_file() for name in ("adapter_config.json", "config.json")):
        raise LightningError(
            f"--policy {policy}: not base, not latest, and no directory with an adapter or a checkpoint"
        )
    return path


def latest_policy(run: RunDirectory) -> Path:
    """The newest published weights of a run."""
    published = sorted(run.published.glob("v*"))
    if not published:
        raise ResumeError(f"{run.path} has not published a policy yet")
    return published[-1]

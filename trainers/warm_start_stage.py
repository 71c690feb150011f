"""The warm start as a stage of a run: write the demonstrations, start the process, show its progress, wait.

Done when its directory is there; an interrupted one starts over, from the same seed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from lightning_rl.errors import LightningError
from rollout_server.api.rendering.render import Renderer, render_demonstration
from trainers.session import Session
from trainers.warm_start import Demonstration, WarmStartConfig


def warm_start(session: Session, rows: Sequence[Mapping[str, Any]]) -> None:
    """Leaves the adapter (or the weights) in the run's `warm_start` directory."""
    recipe, run = session.recipe, session.run
    assert recipe.warm_start is not None
    if run.warm_start.is_dir():
        return
    demonstrations = run.logs / "demonstrations.jsonl"
    renderer = Renderer(session.model_dir)
    with demonstrations.open("wb") as file:
        for row in rows:
            messages, tools = _without_nulls(row["messages"]), _without_nulls(row.get("tools") or [])
            ids, mask = render_demonstration(renderer, messages, tools)
            file.write(msgspec.json.encode(Demonstration(ids, mask)) + b"\n")
    config = WarmStartConfig(
        model_dir=str(session.model_dir),
        dtype=recipe.model.dtype,
        lora=recipe.train.lora.model_dump() if recipe.train.lora else None,
        steps=recipe.warm_start.steps,
        batch_size=recipe.warm_start.batch_size,
        learning_rate=recipe.warm_start.learning_rate,
        seed=recipe.seed,
        demonstrations=str(demonstrations),
        out=str(run.warm_start),
        progress=str(run.logs / "warm_start.jsonl"),
        parent_pid=os.getpid(),
    )
    settings = run.logs / "warm_start.json"
    settings.write_bytes(msgspec.json.encode(config))
    Path(config.progress).unlink(missing_ok=True)
    _run(session, settings, config)


def _without_nulls(value: Any) -> Any:
    """Arrow gives every message all columns, null where it has none."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _run(session: Session, settings: Path, config: WarmStartConfig) -> None:
    log = session.run.logs / "warm_start.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "trainers.warm_start", str(settings)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        with session.console.stage("warm start", total=config.steps) as stage:
            while process.poll() is None:
                session.server.check()
                losses = read_progress(Path(config.progress))
                stage.at(len(losses))
                time.sleep(0.25)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if process.returncode != 0:
        words = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise LightningError(
            f"the warm start ended with code {process.returncode}; last words:\n{words}", hint=f"the whole log is {log}"
        )
    losses = read_progress(Path(config.progress))
    if losses:
        session.console.say(f"warm start: loss {losses[0]:.3f} → {losses[-1]:.3f} in {len(losses)} steps")


def read_progress(path: Path) -> list[float]:
    """Losses so far; a line that is being written does not count yet."""
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line)["loss"] for line in text[: text.rfind("\n") + 1].splitlines()]

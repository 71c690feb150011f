"""Where figures go: `metrics.jsonl` always, W&B when the recipe asks for it (traces: `otlp_sink`).

W&B never prompts and never needs a network: without a key it records offline, to be sent later by `wandb sync`.
"""

from __future__ import annotations

import json
import netrc
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lightning_rl.episode import Episode
from lightning_rl.errors import LightningError, MissingExtra
from trainers.evaluation import Score
from trainers.run_directory import RunDirectory


class Sink(Protocol):
    def log(self, metrics: Mapping[str, Any], step: int) -> None: ...

    def evaluation(self, label: str, score: Score, step: int) -> None: ...

    def samples(self, episodes: Iterable[Episode], step: int) -> None: ...

    def finish(self, summary: Mapping[str, Any]) -> None: ...

    def close(self, *, failed: bool) -> None: ...


class MetricsFile:
    """One JSON object a line. A resumed run writes it anew from what its checkpoint knows, plus earlier evaluations."""

    def __init__(self, path: Path, history: Sequence[Mapping[str, Any]]) -> None:
        self.path = path
        rows = [{"step": step, **row} for step, row in enumerate(history, start=1)]
        if path.exists():
            rows += [row for row in read_rows(path) if "evaluation" in row and row["step"] <= len(history)]
        rows.sort(key=lambda row: row["step"])
        scratch = path.with_name(f".{path.name}.tmp")
        scratch.write_text("".join(json.dumps(row) + "\n" for row in rows))
        scratch.replace(path)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    def evaluation(self, label: str, score: Score, step: int) -> None:
        """A line with `evaluation` instead of a step's metrics; once for each label, however often the run is resumed."""
        if all(row.get("evaluation") != label for row in read_rows(self.path)):
            self.log({"evaluation": label, "success": score.value, "ci95": score.ci95, "n": score.n}, step)

    def samples(self, episodes: Iterable[Episode], step: int) -> None:
        """Episodes are in the store already."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The summary has a file of its own."""

    def close(self, *, failed: bool) -> None:
        """Every line is flushed as it is written."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The complete lines: the last one of a killed run may be torn."""
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


class Wandb:
    """The run as Weights & Biases shows it, with a table of sampled episodes per step."""

    def __init__(self, run: RunDirectory, project: str, mode: str, name: str, config: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            import wandb
        except ImportError as error:
            raise MissingExtra(
                "tracking.wandb is set but wandb is not installed", hint="pip install 'lightning-rl[train]'"
            ) from error
        self._wandb = wandb
        identity = run.path / "wandb_id"
        if not identity.exists():
            identity.write_text(secrets.token_hex(4))
        if mode == "online" and not _has_key():
            raise LightningError(
                "tracking.wandb.mode is online, but there is no W&B key",
                hint="set WANDB_API_KEY or run `wandb login`; mode auto records offline without one",
            )
        try:
            self._run = wandb.init(
                project=project,
                name=f"{name}-{run.path.name}",
                id=identity.read_text(),
                resume="allow",
                dir=run.path,
                mode=_resolve_mode(mode),
                config=dict(config),
                settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
            )
        except wandb.Error as error:
            raise LightningError(f"W&B: {error}", hint="tracking.wandb.mode=offline needs no network") from error

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Histograms as such."""
        self._run.log(dict(self._shown(metrics)), step=step)

    def _shown(self, metrics: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
        for name, value in metrics.items():
            if isinstance(value, Mapping) and value.keys() == {"edges", "counts"}:
                yield name, self._wandb.Histogram(np_histogram=(value["counts"], value["edges"]))
            else:
                yield from _flat({name: value})

    def evaluation(self, label: str, score: Score, step: int) -> None:
        self._run.log({"eval/success": score.value, f"eval/{label}": score.value}, step=step)

    def samples(self, episodes: Iterable[Episode], step: int) -> None:
        table = self._wandb.Table(columns=["episode", "outcome", "rewards", "conversation", "answer"])
        for episode in episodes:
            rewards = {reward.name: reward.value for reward in episode.rewards}
            table.add_data(
                episode.id, str(episode.outcome), json.dumps(rewards), _conversation(episode), str(episode.answer)
            )
        self._run.log({"episodes": table}, step=step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(_flat(summary)))

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _resolve_mode(mode: str) -> Any:
    if mode != "auto":
        return mode
    if os.environ.get("WANDB_MODE"):
        return None
    return "online" if _has_key() else "offline"


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}/")
        elif value is not None:
            yield f"{prefix}{key}", value


def _conversation(episode: Episode) -> str:
    if not episode.calls:
        return ""
    last = episode.calls[-1]
    messages = [*last.request.get("messages", []), last.response]
    return "\n".join(json.dumps(message, ensure_ascii=False) for message in messages)

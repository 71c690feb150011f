"""The picture of a run: success over steps, with the three evaluations and their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainers.evaluation import Score

LABELS = {"base": "base model", "warm_start": "after warm start", "final": "after RL"}


def plot_curve(
    path: Path, name: str, steps: Sequence[Mapping[str, Any]], evaluations: Mapping[str, tuple[int, Score]]
) -> None:
    """`evaluations`: label -> (step at which it was taken, score). Written whole or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    xs = [row["step"] for row in steps]
    axes.plot(
        xs, [row["success"] for row in steps], color="#3b6ea8", marker="o", ms=4, label="training episodes (sampled)"
    )
    colours = {"base": "#888888", "warm_start": "#d08a2e", "final": "#2e8b57"}
    for label, (step, score) in evaluations.items():
        low, high = score.ci95
        axes.errorbar(
            [step],
            [score.value],
            yerr=[[max(score.value - low, 0)], [max(high - score.value, 0)]],
            fmt="s",
            ms=7,
            capsize=4,
            color=colours.get(label, "#2e8b57"),
            label=f"{LABELS.get(label, label)}: {score.value:.2f}",
        )
    axes.set(
        xlabel="RL step", ylabel="success", ylim=(-0.03, 1.03), title=f"{name}: held-out tasks, greedy, 95 % intervals"
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)
    scratch = path.with_name(f".{path.name}")
    figure.savefig(scratch, dpi=120, format="png")
    plt.close(figure)
    scratch.replace(path)

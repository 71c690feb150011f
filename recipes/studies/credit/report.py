"""What came of the trainings: all curves as JSON, a table of episodes-to-threshold, and the picture."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from recipes.studies.credit.figures import Interval, episodes_to_threshold, median_of, ratio_of, smoothed
from recipes.studies.credit.run import FIRST_SEED, RULES, TASKS

Curves = dict[str, dict[str, list[list[float]]]]
"""task -> rule -> seed -> share of right decisions by step."""
EPISODES = 16
"""A step has so many: `train.samples_per_task` of the recipe."""
COLOURS = {
    "equal": ("#000000", "-"), "final": ("#999999", "--"), "return_to_go": ("#999999", ":"),
    "step_rewards": ("#0072B2", "-"), "mt_grpo": ("#56B4E9", "--"), "per_agent": ("#D55E00", "-"),
    "gigpo": ("#CC79A7", "--"), "tree": ("#009E73", "-"), "turn_gae": ("#E69F00", "-"), "token_gae": ("#F0E442", "--"),
}  # fmt: skip
"""Okabe and Ito's colours, which the colour-blind can tell apart; dashes tell what remains."""


def report(directory: Path) -> str:
    """Writes results.json, table.md and curves.png beside the results; returns the table."""
    curves = read_curves(directory / "results")
    (directory / "results.json").write_text(as_json(curves))
    table = markdown(curves)
    (directory / "table.md").write_text(table + "\n")
    plot(curves, directory / "curves.png")
    return table


def read_curves(results: Path) -> Curves:
    curves: Curves = {}
    for task in TASKS:
        for rule in RULES:
            found = sorted(results.glob(f"{task}.{rule}.*.json"), key=lambda path: int(path.name.split(".")[2]))
            if found:
                curves.setdefault(task, {})[rule] = [json.loads(path.read_text())["curve"] for path in found]
    return curves


def as_json(curves: Curves) -> str:
    """A line for each training."""
    tasks = []
    for task, rules in curves.items():
        lines = []
        for rule, seeds in rules.items():
            rows = ",\n   ".join(json.dumps([round(share, 4) for share in curve]) for curve in seeds)
            lines.append(f'  "{rule}": [\n   {rows}]')
        tasks.append(f' "{task}": {{\n' + ",\n".join(lines) + "}")
    head = f'{{"first_seed": {FIRST_SEED}, "episodes_per_step": {EPISODES}, "curves": {{\n'
    return head + ",\n".join(tasks) + "\n}}\n"


def markdown(curves: Curves) -> str:
    """Episodes-to-threshold and how many times fewer than `equal` needs, for each task and rule."""
    tasks = list(curves)
    lines = [
        "| rule | " + " | ".join(f"`{task}` | × fewer" for task in tasks) + " |",
        "|---|" + "---|---|" * len(tasks),
    ]
    for rule in RULES:
        cells = []
        for task in tasks:
            seeds = curves[task].get(rule)
            if not seeds:
                cells += ["not run", ""]
                continue
            tried = EPISODES * max(len(curve) for rows in curves[task].values() for curve in rows)
            needed = _needed(seeds)
            base = _needed(curves[task]["equal"]) if "equal" in curves[task] else []
            missed = sum(math.isinf(value) for value in needed)
            short = f", of {len(needed)} only" if len(needed) < len(curves[task].get("equal", needed)) else ""
            never = f", {missed} of {len(needed)} never" if missed else ""
            cells.append(_episodes(median_of(needed), tried) + never + short)
            cells.append("1" if rule == "equal" else _ratio(needed, base, tried))
        lines.append(f"| `{rule}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _needed(seeds: list[list[float]]) -> list[float]:
    return [episodes_to_threshold(curve, EPISODES) for curve in seeds]


def _episodes(interval: Interval, tried: int) -> str:
    def shown(value: float) -> str:
        return f">{tried}" if math.isinf(value) else f"{value:.0f}"

    return f"{shown(interval.median)} ({shown(interval.low)} – {shown(interval.high)})"


def _ratio(needed: list[float], base: list[float], tried: int) -> str:
    """With trainings that did not get there counted as if they had at the end: a bound, marked as one."""
    if not base:
        return ""
    bounded = ratio_of([min(value, tried) for value in base], [min(value, tried) for value in needed])
    slow, base_slow = math.isinf(median_of(needed).median), math.isinf(median_of(base).median)
    mark = "<" if slow and not base_slow else ">" if base_slow and not slow else ""
    return "–" if slow and base_slow else f"{mark}{bounded.median:.1f} ({bounded.low:.1f} – {bounded.high:.1f})"


def plot(curves: Curves, path: Path) -> None:
    """A panel for each task: the mean over seeds, with one standard error on either side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(curves), figsize=(5 * len(curves), 4.4), sharey=True, squeeze=False)
    for panel, (task, rules) in zip(panels[0], curves.items(), strict=True):
        length = max(len(curve) for seeds in rules.values() for curve in seeds)
        for rule, seeds in rules.items():
            _draw(panel, rule, [smoothed(curve, length) for curve in seeds])
        panel.axhline(0.9, color="#bbbbbb", linewidth=0.8, zorder=0)
        panel.set(title=task, xlabel="episodes", ylim=(0, 1.02), xlim=(EPISODES, EPISODES * length))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("right decisions")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=5, frameon=False)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw(panel: Any, rule: str, seeds: list[list[float]]) -> None:
    episodes = [EPISODES * (step + 1) for step in range(len(seeds[0]))]
    means = [math.fsum(column) / len(column) for column in zip(*seeds, strict=True)]
    errors = [
        math.sqrt(math.fsum((x - mean) ** 2 for x in column) / max(len(column) - 1, 1) / len(column))
        for column, mean in zip(zip(*seeds, strict=True), means, strict=True)
    ]
    colour, dashes = COLOURS[rule]
    panel.plot(episodes, means, color=colour, linestyle=dashes, linewidth=2.2 if rule == "equal" else 1.6, label=rule)
    low, high = ([m + sign * e for m, e in zip(means, errors, strict=True)] for sign in (-1, 1))
    panel.fill_between(episodes, low, high, color=colour, alpha=0.10, linewidth=0)

"""A step in figures: what `metrics.jsonl`, the trackers and the console say about it. docs/credit.md explains each.

Means over tokens are over the tokens with a loss, each as often as there are epochs; everything else counts a token once.
"""

from __future__ import annotations

import bisect
import statistics
from collections import Counter
from collections.abc import Mapping
from typing import Any

from lightning_rl.ledger import UNKNOWN_AGENT
from lightning_rl.recipe import Recipe
from lightning_rl.transition import NOT_OF_THE_LEARNER, Mask
from trainers.checkpoint import FIRST_VERSION, TrainState
from trainers.console import duration
from trainers.doubts import groups, groups_of_one, nobody_learns
from trainers.evaluation import score, success_values
from trainers.learning import StepData
from trainers.publish import Gap

ADVANTAGE_EDGES = [step / 2 for step in range(-10, 11)]
"""Of the histogram's bins: from -5 to 5. Each holds its left edge; the outermost ones hold all beyond, too."""


def step_metrics(
    recipe: Recipe,
    data: StepData,
    sums: Mapping[str, float],
    gap: Gap,
    version: int,
    started_at: float,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """`sums` are `loop.update`'s, `started_at` is when the step began in this process, `seconds` are by stage."""
    tokens = max(sums.get("tokens", 0.0), 1.0)
    correctable = sums.get("correctable", 0.0)
    calls = [call for episode in data.counted for call in episode.calls]
    sampled = [len(call.sampled_ids) for episode in data.episodes for call in episode.calls if not call.upstream]
    fresh = sum(len(c.sampled_ids) for e in data.episodes if e.start.started_at >= started_at for c in e.calls)
    names = sorted({reward.name for episode in data.counted for reward in episode.rewards})
    rewards = {name: score(success_values(data.counted, name)) for name in names}
    updates = [] if nobody_learns(recipe, data) else [update for update in data.updates if update.rows]
    computed = sum(len(row.ids) for update in updates for row in update.rows)
    return {
        "success": score(success_values(data.counted, recipe.success_reward)).value,
        "reward": {name: value.value for name, value in rewards.items()},
        "reward_ci95": {name: value.ci95 for name, value in rewards.items()},
        "returns": _returns(data),
        "advantages": _histogram(data),
        "kl": sums["kl_behaviour"] / correctable if correctable else None,
        **({"kl_reference": sums["kl_reference"] / tokens} if "kl_reference" in sums else {}),
        "loss": sums.get("loss", 0.0),
        **({"value": _critic(data, sums)} if "value_loss" in sums else {}),
        "gradient_norm": sums.get("gradient_norm", 0.0),
        "optimiser_steps": len(updates),
        "entropy": sums.get("entropy", 0.0) / tokens,
        "entropy_by_agent": _means(sums, "agent_entropy/", "agent_tokens/"),
        "clip_fraction": sums.get("clip_fraction", 0.0) / tokens,
        "correction": sums.get("correction", 0.0) / tokens,
        "correction_masked": sums.get("correction_masked", 0.0) / tokens,
        "effective_sample_size": _effective_sample_size(sums),
        "masked_fraction": sum(data.ledger.masked.values()) / max(data.ledger.sampled, 1),
        "logprob_gap": {
            "rollout": sums["gap"] / correctable if correctable else None,
            "published": gap.mean,
            "published_max": gap.largest,
            "by_version": _means(sums, "version_gap/", "version_tokens/"),
        },
        "staleness": _staleness(data, version - 1),
        "length": {
            "sampled_per_call": sum(sampled) / max(len(sampled), 1),
            "sampled_per_episode": sum(sampled) / max(len(data.episodes), 1),
            "calls_per_episode": len(calls) / max(len(data.counted), 1),
        },
        "outcomes": dict(Counter(str(episode.outcome) for episode in data.episodes)),
        "groups": group_counts(data),
        "ledger": data.ledger.to_dict(),
        "tokens": {"computed": computed, "sampled": sum(sampled), "sampled_now": fresh},
        "rollout_tokens_per_second": fresh / seconds["rollout"],
        "train_tokens_per_second": computed / seconds["train"],
        "seconds": dict(seconds),
        "policy_version": version,
    }


def group_counts(data: StepData) -> dict[str, int]:
    """`trained`: with a loss; `no_signal`: all that could be trained on has no advantage; `of_one`: see `doubts.groups_of_one`."""
    group_of = {episode.id: episode.start.group for episode in data.counted}
    trained = {group_of[t.episode_id] for t in data.transitions if t.masked is None}
    flat = {group_of[t.episode_id] for t in data.transitions if t.masked is Mask.NO_SIGNAL} - trained
    return {
        "all": len(groups(data)),
        "trained": len(trained),
        "no_signal": len(flat),
        "of_one": len(groups_of_one(data)),
    }


def _returns(data: StepData) -> dict[str, float]:
    """Of the rollouts that count and in which the learner made a call: the mean, and the mean of the groups' std."""
    learners = {t.episode_id for t in data.transitions if t.masked not in NOT_OF_THE_LEARNER}
    counted = [episode for episode in data.counted if episode.id in learners]
    by_group: dict[str, list[float]] = {}
    for episode in counted:
        by_group.setdefault(episode.start.group, []).append(data.returns[episode.id])
    return {
        "mean": statistics.fmean(data.returns[episode.id] for episode in counted) if counted else 0.0,
        "std": statistics.fmean(_std(values) for values in by_group.values()) if by_group else 0.0,
    }


def _staleness(data: StepData, played: int) -> dict[str, float | None]:
    """Of the learner's tokens: how many versions older than the policy that played the step the one that sampled them is."""
    learners = {t.call_id for t in data.transitions if t.masked not in NOT_OF_THE_LEARNER}
    calls = (call for episode in data.counted for call in episode.calls if call.id in learners)
    ages = Counter(played - version for call in calls for version in call.versions)
    mean = sum(age * count for age, count in ages.items()) / ages.total() if ages else None
    return {"mean": mean, "max": max(ages, default=None)}


def _std(values: list[float]) -> float:
    """Unbiased; 0 for one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _histogram(data: StepData) -> dict[str, list[float]]:
    """Of the advantages of the tokens that are trained on, cut ones included."""
    counts: list[float] = [0] * (len(ADVANTAGE_EDGES) - 1)
    for transition in data.transitions:
        if transition.masked is None:
            for advantage in transition.advantages:
                place = bisect.bisect_right(ADVANTAGE_EDGES, advantage) - 1
                counts[min(max(place, 0), len(counts) - 1)] += 1
    return {"edges": ADVANTAGE_EDGES, "counts": counts}


def _means(sums: Mapping[str, float], prefix: str, counts: str) -> dict[str, float]:
    """By what follows the prefix."""
    names = [name.removeprefix(prefix) for name in sums if name.startswith(prefix)]
    return {name or UNKNOWN_AGENT: sums[prefix + name] / max(sums[counts + name], 1.0) for name in sorted(names)}


def _effective_sample_size(sums: Mapping[str, float]) -> float | None:
    """(Σ c)² / (n Σ c²), a share of the tokens that can be corrected: 1 where trainer and server agree (Kish 1965). 0 where all of
    them are masked, None without any."""
    if not sums.get("correctable"):
        return None
    squares = sums["correctable"] * sums["weight_square_sum"]
    return min(sums["weight_sum"] ** 2 / squares, 1.0) if squares else 0.0


def _critic(data: StepData, sums: Mapping[str, float]) -> dict[str, float]:
    """Means over the optimiser steps of the squared error and of the gradient's norm before clipping; and how much of its targets'
    variance the critic had explained before them: 1 − Var(target − value) / Var(target), 0 where the targets do not vary."""
    pairs = [
        (target, value)
        for t in data.transitions
        if t.call_id in data.scores
        for target, value in zip(t.value_targets, data.scores[t.call_id].values, strict=False)
        if target is not None
    ]
    spread = statistics.pvariance([target for target, _ in pairs]) if pairs else 0.0
    left = statistics.pvariance([target - value for target, value in pairs]) if pairs else 0.0
    return {
        "loss": sums["value_loss"],
        "explained_variance": 1 - left / spread if spread > 0 else 0.0,
        "targets": len(pairs),
        "gradient_norm": sums["critic_gradient_norm"],
    }


def step_line(metrics: Mapping[str, Any], recipe: Recipe, seconds: float) -> str:
    kl = "unknown" if metrics["kl"] is None else f"{metrics['kl']:.4f}"
    return (
        f"step {metrics['policy_version'] - FIRST_VERSION}/{recipe.train.steps}: success {metrics['success']:.2f}, "
        f"kl {kl}, entropy {metrics['entropy']:.2f}, gap {metrics['logprob_gap']['published']:.4f}, "
        f"rollout {metrics['seconds']['rollout']:.0f} s at {metrics['rollout_tokens_per_second']:.0f} tok/s, "
        f"train {metrics['seconds']['train']:.0f} s at {metrics['train_tokens_per_second']:.0f} tok/s, "
        f"{seconds:.0f} s in all"
    )


def time_left(state: TrainState, recipe: Recipe, evaluation_seconds: float) -> str:
    if not state.history:
        return ""
    recent = state.history[-3:]
    step_seconds = sum(sum(row["seconds"].values()) for row in recent) / len(recent) * 1.1
    left = step_seconds * (recipe.train.steps - state.step) + evaluation_seconds / 2
    last = state.history[-1]
    return (
        f"success {last['success']:.2f} · {last['rollout_tokens_per_second']:.0f} tok/s sampled · "
        f"{last['train_tokens_per_second']:.0f} tok/s trained · about {duration(left)} left"
    )

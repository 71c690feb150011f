import type { Evaluation, RunDetail } from "../records";
import { words } from "../shared/format";
import { MASKS } from "../shared/masks";
import { type Figure, hasValues, type Line, onSteps, union, type Values } from "./figure";

type Series = RunDetail["series"];

/** What figures are drawn of: as long as none of it changes, they do not. */
export type Measured = Pick<RunDetail, "series" | "steps" | "evaluations">;

/** Every figure that a run has values for, in the order in which one asks: does it learn, how, from what, how fast. */
export function figures(run: Measured): Figure[] {
  const { series, steps } = run;
  const drawn: Figure[] = [
    success(run),
    {
      id: "rewards",
      title: "Rewards",
      meaning: "Mean of each reward over the episodes that count, with its 95 % interval.",
      steps,
      lines: rewardLines(series),
    },
    {
      id: "return",
      title: "Return",
      meaning:
        "Weighted sum of an episode's rewards: its mean, and the mean spread within a group. No spread, nothing to learn.",
      steps,
      lines: named(series, { "returns.mean": "mean", "returns.std": "spread in a group" }),
    },
    {
      id: "ledger",
      title: "Ledger",
      meaning:
        "What became of every sampled token: trained, merged into a shared prefix, masked, truncated or dropped, and why.",
      steps,
      lines: ledgerLines(series),
      stacked: true,
    },
    {
      id: "groups",
      title: "Groups",
      meaning: "Groups that were trained on, whose samples were all alike, and that had one sample alone.",
      steps,
      lines: named(series, { "groups.trained": "trained", "groups.no_signal": "no signal", "groups.of_one": "of one" }),
      stacked: true,
    },
    {
      id: "outcomes",
      title: "Outcomes",
      meaning: "How the episodes of a step ended.",
      steps,
      lines: outcomeLines(series),
      stacked: true,
    },
    {
      id: "entropy",
      title: "Entropy",
      meaning:
        "Of the policy at the tokens that are trained on, in nats, in all and by agent. A fall to zero means that nothing new is tried.",
      steps,
      lines: [...named(series, { entropy: "all" }), ...severalOf(prefixed(series, "entropy_by_agent.", 1))],
    },
    {
      id: "gap",
      title: "Log-prob gap",
      meaning: "Between trainer and server, for the same tokens: of the rollouts, and checked after each publish.",
      steps,
      lines: named(series, {
        "logprob_gap.rollout": "rollout",
        "logprob_gap.published": "published",
        "logprob_gap.published_max": "published, largest",
      }),
      log: true,
    },
    {
      id: "staleness",
      title: "Staleness",
      meaning: "By how many policy versions the tokens were older than the policy that learned from them.",
      steps,
      lines: named(series, { "staleness.mean": "mean", "staleness.max": "largest" }),
    },
    {
      id: "kl",
      title: "KL",
      meaning: "From the policy that sampled, and from the reference policy if there is one.",
      steps,
      lines: named(series, { kl: "behaviour", kl_reference: "reference" }),
      log: true,
    },
    {
      id: "loss",
      title: "Loss",
      meaning: "The objective's loss, and the critic's. It says little about how good the policy is.",
      steps,
      lines: named(series, { loss: "policy", "value.loss": "critic" }),
    },
    {
      id: "gradient",
      title: "Gradient norm",
      meaning: "Before clipping.",
      steps,
      lines: named(series, { gradient_norm: "policy", "value.gradient_norm": "critic" }),
      log: true,
    },
    {
      id: "correction",
      title: "Clipping and correction",
      meaning:
        "Share of tokens that were clipped or masked by the correction, its mean weight, and the effective sample size.",
      steps,
      lines: named(series, {
        clip_fraction: "clipped",
        correction_masked: "masked by the correction",
        correction: "mean weight",
        effective_sample_size: "effective sample size",
      }),
      unit: "share",
    },
    {
      id: "critic",
      title: "Critic",
      meaning: "How much of its targets' variance the critic explained before it learned from them.",
      steps,
      lines: named(series, { "value.explained_variance": "explained variance" }),
    },
    {
      id: "length",
      title: "Length",
      meaning: "Sampled tokens per call and per episode.",
      steps,
      lines: named(series, {
        "length.sampled_per_call": "tokens per call",
        "length.sampled_per_episode": "tokens per episode",
      }),
    },
    {
      id: "calls",
      title: "Calls per episode",
      meaning: "How many calls an episode made.",
      steps,
      lines: named(series, { "length.calls_per_episode": "calls" }),
    },
    {
      id: "seconds",
      title: "Seconds by stage",
      meaning: "What a step spends its time on.",
      steps,
      lines: prefixed(series, "seconds."),
      stacked: true,
      unit: "seconds",
    },
    {
      id: "speed",
      title: "Tokens per second",
      meaning: "Sampled during rollouts, and computed in training.",
      steps,
      lines: named(series, { rollout_tokens_per_second: "rollout", train_tokens_per_second: "train" }),
    },
  ];
  return drawn.filter((figure) => figure.lines.length > 0);
}

function success(run: Measured): Figure {
  const { series } = run;
  const steps = union(
    run.steps,
    run.evaluations.map((evaluation) => evaluation.step),
  );
  const training: Figure = { id: "", title: "", meaning: "", steps: run.steps, lines: [] };
  const values = series.success;
  if (hasValues(values))
    training.lines.push({ label: "training", values, colour: 0, ...interval(series, rewardOf(series, values)) });
  const held = evaluationLine(run.evaluations, steps);
  return {
    id: "success",
    title: "Success",
    meaning: "Of sampled training episodes, and of held-out tasks, greedily (points), with 95 % intervals.",
    steps,
    lines: [...onSteps(training, steps).lines, ...(held ? [held] : [])],
    unit: "share",
  };
}

/** The reward that success is measured by: the one with the same values. */
function rewardOf(series: Series, success: Values): string | null {
  return (
    rewardNames(series).find((name) => series[`reward.${name}`]?.every((value, at) => value === success[at])) ?? null
  );
}

function rewardNames(series: Series): string[] {
  return Object.keys(series).flatMap((name) => (name.startsWith("reward.") ? [name.slice("reward.".length)] : []));
}

function interval(series: Series, reward: string | null): Pick<Line, "low" | "high"> {
  if (reward === null) return {};
  return { low: series[`reward_ci95.${reward}.0`], high: series[`reward_ci95.${reward}.1`] };
}

function rewardLines(series: Series): Line[] {
  return rewardNames(series).map((name, colour) => ({
    label: name,
    values: series[`reward.${name}`] ?? [],
    colour,
    ...interval(series, name),
  }));
}

/** Of evaluations at the same step the last one is shown. */
export function evaluationLine(evaluations: Evaluation[], steps: number[]): Line | null {
  if (evaluations.length === 0) return null;
  const at = new Map(evaluations.map((evaluation) => [evaluation.step, evaluation]));
  const pick = (value: (evaluation: Evaluation) => number | undefined): Values =>
    steps.map((step) => {
      const evaluation = at.get(step);
      return evaluation ? (value(evaluation) ?? null) : null;
    });
  return {
    label: "held-out",
    values: pick((evaluation) => evaluation.success),
    low: pick((evaluation) => evaluation.ci95[0]),
    high: pick((evaluation) => evaluation.ci95[1]),
    colour: 1,
    points: true,
  };
}

/** What becomes of tokens, from the bottom of the picture, each in a colour of its own: reasons are shades of it. */
const LEDGER: Record<string, number> = { trained: 0, merged: 2, masked: 1, truncated: 4, dropped: 5 };

function ledgerLines(series: Series): Line[] {
  const names = Object.keys(series).filter(
    (name) => name.startsWith("ledger.") && !name.startsWith("ledger.by_agent."),
  );
  const parts = Object.keys(LEDGER).flatMap((part) =>
    names.filter((name) => name === `ledger.${part}` || name.startsWith(`ledger.${part}.`)).sort(),
  );
  return parts
    .filter((name) => hasValues(series[name]))
    .map((name) => {
      const [, part = "", reason = ""] = name.split(".");
      return {
        label: words(reason ? `${part}: ${reason}` : part),
        values: series[name] ?? [],
        colour: LEDGER[part] ?? 0,
        shade: reason ? orderOf(part, reason) : 0,
      };
    });
}

/** Reasons keep their shade whatever else occurs. */
function orderOf(part: string, reason: string): number {
  const known = { masked: MASKS, dropped: Object.keys(OUTCOMES).slice(1) }[part] ?? [];
  return Math.max(0, known.indexOf(reason));
}

/** As the badges of episodes are coloured. */
const OUTCOMES: Record<string, number> = {
  completed: 2,
  agent_error: 5,
  timeout: 1,
  infrastructure_error: 3,
  cancelled: 4,
};

function outcomeLines(series: Series): Line[] {
  const names = [...new Set([...Object.keys(OUTCOMES), ...Object.keys(series).flatMap(outcomeOf)])];
  return names.flatMap((name) => {
    const values = series[`outcomes.${name}`];
    return hasValues(values) ? [{ label: words(name), values, colour: OUTCOMES[name] ?? 0 }] : [];
  });
}

function outcomeOf(name: string): string[] {
  return name.startsWith("outcomes.") ? [name.slice("outcomes.".length)] : [];
}

function named(series: Series, labels: Record<string, string>): Line[] {
  return Object.entries(labels).flatMap(([name, label], colour) => {
    const values = series[name];
    return hasValues(values) ? [{ label, values, colour }] : [];
  });
}

function prefixed(series: Series, prefix: string, first = 0): Line[] {
  const names = Object.keys(series).filter((name) => name.startsWith(prefix) && hasValues(series[name]));
  return names.map((name, at) => ({
    label: words(name.slice(prefix.length)),
    values: series[name] ?? [],
    colour: first + at,
  }));
}

/** One agent alone is the same as all. */
function severalOf(lines: Line[]): Line[] {
  return lines.length > 1 ? lines : [];
}

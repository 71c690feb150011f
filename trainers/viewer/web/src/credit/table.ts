import type { CallCredit, CallFacts, GroupReport, RolloutFacts, RuleCredit } from "../records";

export type Order = "best" | "worst" | "sample";

/** A line of the table: a rollout, or a call below it. */
export type Line =
  | { kind: "rollout"; key: string; rollout: RolloutFacts; folded: boolean }
  | { kind: "call"; key: string; rollout: RolloutFacts; call: CallFacts; depth: number };

export function linesOf(report: GroupReport, order: Order, folded: ReadonlySet<string>): Line[] {
  return ordered(report.rollouts, order).flatMap((rollout): Line[] => {
    const closed = folded.has(rollout.episode);
    const head: Line = { kind: "rollout", key: rollout.episode, rollout, folded: closed };
    if (closed) return [head];
    const depths = depthsOf(rollout.calls);
    return [
      head,
      ...rollout.calls.map(
        (call): Line => ({ kind: "call", key: call.id, rollout, call, depth: depths.get(call.id) ?? 0 }),
      ),
    ];
  });
}

export function ordered(rollouts: readonly RolloutFacts[], order: Order): RolloutFacts[] {
  const sign = { best: -1, worst: 1, sample: 0 }[order];
  return [...rollouts].sort((one, other) => sign * (one.ret - other.ret) || one.sample - other.sample);
}

/** How often the way to a call branched: a call that goes on lies beside what it goes on from, a fork or an edit one deeper. */
export function depthsOf(calls: readonly CallFacts[]): Map<string, number> {
  const depths = new Map<string, number>();
  for (const call of calls) {
    const before = call.parent_id === null ? undefined : depths.get(call.parent_id);
    const parted = call.relation === "fork" || call.relation === "edit";
    depths.set(call.id, (before ?? 0) + (parted ? 1 : 0));
  }
  return depths;
}

/** The farthest advantage from zero under any of the rules: where the colours are full. */
export function largestAdvantage(rules: readonly RuleCredit[]): number {
  let largest = 0;
  for (const rule of rules) {
    for (const given of Object.values(rule.calls)) largest = Math.max(largest, Math.abs(given.advantage));
  }
  return largest;
}

/** By how much a rule's advantage is above the own rule's; a masked call learns nothing, so that it counts as 0. Null if one does not know. */
export function difference(other: CallCredit | undefined, own: CallCredit | undefined): number | null {
  if (!other || !own) return null;
  return learned(other) - learned(own);
}

function learned(given: CallCredit): number {
  return given.masked === null ? given.advantage : 0;
}

export function largestDifference(own: RuleCredit, others: readonly RuleCredit[]): number {
  let largest = 0;
  for (const other of others) {
    for (const [id, given] of Object.entries(other.calls)) {
      largest = Math.max(largest, Math.abs(difference(given, own.calls[id]) ?? 0));
    }
  }
  return largest;
}

/** A rule's part in a rollout: the mean advantage over its trained calls, and how many those are. */
export function ofRollout(rollout: RolloutFacts, rule: RuleCredit): { advantage: number | null; trained: number } {
  const given = rollout.calls.map((call) => rule.calls[call.id]).filter((each) => each && each.masked === null);
  const sum = given.reduce((total, each) => total + (each?.advantage ?? 0), 0);
  return { advantage: given.length > 0 ? sum / given.length : null, trained: given.length };
}

/** By how much a rule's advantages are above the own rule's: the mean over the rollout's calls that one of them trains. */
export function differenceOf(rollout: RolloutFacts, other: RuleCredit, own: RuleCredit): number | null {
  const found: number[] = [];
  for (const call of rollout.calls) {
    const [theirs, ours] = [other.calls[call.id], own.calls[call.id]];
    const apart = difference(theirs, ours);
    if (apart !== null && (theirs?.masked === null || ours?.masked === null)) found.push(apart);
  }
  return found.length > 0 ? found.reduce((sum, each) => sum + each, 0) / found.length : null;
}

/** Tokens of a rollout that a rule trains on, and all that were sampled. */
export function tokensOf(rollout: RolloutFacts, rule: RuleCredit): { trained: number; sampled: number } {
  let [trained, sampled] = [0, 0];
  for (const call of rollout.calls) {
    trained += rule.calls[call.id]?.with_loss ?? 0;
    sampled += call.sampled;
  }
  return { trained, sampled };
}

/** Agents by name in the order in which they first called: the place is their colour. */
export function agentsOf(rollouts: readonly RolloutFacts[]): string[] {
  return [...new Set(rollouts.flatMap((rollout) => rollout.calls.map((call) => call.agent)))];
}

/** The key of the line `step` lines from the chosen one; from the beginning or the end if none is. */
export function moved(lines: readonly Line[], key: string | null, step: number): string | null {
  const from = lines.findIndex((line) => line.key === key);
  const at = from < 0 ? (step > 0 ? step - 1 : lines.length + step) : from + step;
  return lines[Math.min(Math.max(at, 0), lines.length - 1)]?.key ?? null;
}

/** Mean of the rollouts' returns, and their unbiased standard deviation. */
export function returnsOf(rollouts: readonly RolloutFacts[]): { mean: number; std: number } {
  const count = rollouts.length;
  if (count === 0) return { mean: 0, std: 0 };
  const mean = rollouts.reduce((sum, rollout) => sum + rollout.ret, 0) / count;
  const squares = rollouts.reduce((sum, rollout) => sum + (rollout.ret - mean) ** 2, 0);
  return { mean, std: count > 1 ? Math.sqrt(squares / (count - 1)) : 0 };
}

import type { EpisodeView } from "../records";
import type { TreeNode } from "./tree";
import { endOf } from "./tree";

/** The common time axis of an episode, in seconds since the epoch. */
export interface Axis {
  start: number;
  end: number;
}

/** Shares of the axis, from 0 to 1. */
export interface Stretch {
  from: number;
  to: number;
}

export interface Bar extends Stretch {
  /** Where the policy (or another model) was at work in it. */
  model: Stretch[];
  /** Where tools were. */
  tools: Stretch[];
}

/** From the first thing that happened to the last; what runs still ends at `now`. */
export function axisOf(nodes: readonly TreeNode[], startedAt: number, endedAt: number | null, now: number): Axis {
  let start = startedAt > 0 ? startedAt : Number.POSITIVE_INFINITY;
  let end = endedAt ?? 0;
  for (const node of nodes) {
    if (node.started_at > 0) start = Math.min(start, node.started_at);
    end = Math.max(end, node.ended_at, node.started_at);
  }
  if (endedAt === null) end = Math.max(end, now);
  if (!Number.isFinite(start)) return { start: 0, end: 1 };
  return { start, end: end > start ? end : start + 1 };
}

/** When something was last heard of an episode: where its axis ends if it did not, and its run has stopped. */
export function lastTime(view: Pick<EpisodeView, "started_at" | "nodes">): number {
  return view.nodes.reduce((last, node) => Math.max(last, node.started_at, node.ended_at), view.started_at);
}

/** Whether a node has begun and not ended. */
export function running(node: TreeNode): boolean {
  return node.started_at > 0 && node.ended_at < node.started_at;
}

export function seconds(node: TreeNode, axis: Axis): number {
  return (running(node) ? axis.end : node.ended_at) - node.started_at;
}

export function stretch(node: TreeNode, axis: Axis): Stretch {
  const share = (time: number) => Math.min(Math.max((time - axis.start) / (axis.end - axis.start), 0), 1);
  const from = share(node.started_at);
  return { from, to: Math.max(share(running(node) ? axis.end : node.ended_at), from) };
}

/** The bar of each node: an agent's shows when its calls and tools ran, and between them that it was at work itself. */
export function barsOf(nodes: readonly TreeNode[], axis: Axis): Map<string, Bar> {
  const bars = new Map<string, Bar>();
  const ends = nodes.map((_, at) => endOf(nodes, at));
  nodes.forEach((node, at) => {
    const model: Stretch[] = [];
    const tools: Stretch[] = [];
    for (let below = at; below < (ends[at] ?? 0); below += 1) {
      const each = nodes[below] as TreeNode;
      if (each.type === "call") model.push(stretch(each, axis));
      else if (each.kind === "tool" && ends[below] === below + 1) tools.push(stretch(each, axis));
    }
    bars.set(node.id, { ...stretch(node, axis), model: joined(model), tools: joined(tools) });
  });
  return bars;
}

/** Stretches that touch, or lie nearer to each other than can be seen, as one. */
export function joined(stretches: readonly Stretch[], gap = 0.001): Stretch[] {
  const result: Stretch[] = [];
  for (const next of [...stretches].sort((one, other) => one.from - other.from)) {
    const last = result.at(-1);
    if (last && next.from <= last.to + gap) last.to = Math.max(last.to, next.to);
    else result.push({ ...next });
  }
  return result;
}

/** Steps that people count in, in seconds; below a second and above a day the powers of ten do. */
const STEPS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14_400, 21_600, 43_200, 86_400];

/** Round numbers of seconds to put marks at, at most `most` of them besides 0. */
export function ticks(length: number, most = 4): number[] {
  if (!(length > 0)) return [0];
  const rough = (length / most) * 0.999_999;
  const power = 10 ** Math.floor(Math.log10(rough));
  const tens = [1, 2, 5, 10].map((factor) => factor * power);
  const step = (rough < 0.5 ? tens : [...STEPS, ...tens]).find((size) => size >= rough) ?? rough;
  const marks: number[] = [];
  for (let count = 0; count * step <= length * 1.000_001; count += 1) marks.push(Number((count * step).toPrecision(6)));
  return marks;
}

import type { CallView, ExpertColumns } from "../records";
import { number, signed } from "../shared/format";
import { categorical, diverging, sequential } from "../shared/scales";
import type { Tokens } from "./tokens";
import type { Training } from "./training";

/** By what tokens are coloured, in the order of the keys 1 to 5. */
export const COLOURS = ["logprob", "entropy", "advantage", "version", "expert"] as const;
export type Colour = (typeof COLOURS)[number] | "none";

export const TITLES: Record<Colour, string> = {
  logprob: "log-prob",
  entropy: "entropy",
  advantage: "advantage",
  version: "version",
  expert: "expert",
  none: "none",
};

/** Colours of the tokens by one thing, and what they mean: nothing while there are no values. */
export interface Painting {
  background: (place: number) => string | undefined;
  legend: Legend | null;
}

export type Legend = NumberLegend | KindLegend;

export interface NumberLegend {
  type: "number";
  title: string;
  low: number;
  high: number;
  ticks: { at: number; label: string }[];
  /** How many tokens have a value in each of equally wide bins. */
  bins: number[];
  colour: (value: number) => string;
}

export interface KindLegend {
  type: "kind";
  title: string;
  entries: { name: string; colour: string; count: number }[];
  /** Tokens of kinds that are not among the entries. */
  others: number;
}

/** A log-prob's scale ends at 0.1 %, an entropy's at that of fifty equally likely tokens: the same for all calls, to compare. */
const LOWEST_LOGPROB = Math.log(0.001);
const HIGHEST_ENTROPY = Math.log(50);
const BINS = 36;
const ALPHA = 0.38;

type Known = number | null | undefined;

/** What sampled tokens are coloured by. */
export type CallFigures = Pick<CallView, "logprobs" | "entropies" | "versions">;

export function paintingOf(
  colour: Colour,
  call: CallFigures,
  tokens: Tokens,
  training: Training,
  experts: ExpertColumns | undefined,
): Painting {
  const sampled = (values: readonly Known[]) => (place: number) => values[place - tokens.prompt];
  switch (colour) {
    case "logprob":
      return byNumber(call.logprobs, sampled(call.logprobs), LOGPROBS);
    case "entropy":
      return byNumber(call.entropies, sampled(call.entropies), ENTROPIES);
    case "advantage": {
      const values = advantagesOf(training, tokens.count - tokens.prompt);
      return byNumber(values, sampled(values), advantageScale(training.largest));
    }
    case "version":
      return byKind("policy version", call.versions, sampled(call.versions), distinct(call.versions));
    case "expert": {
      const first = experts?.experts.map((each) => each[0]) ?? [];
      const start = experts?.start ?? 0;
      return byKind(`first expert of layer ${experts?.layer ?? 0}`, first, (place) => first[place - start], null);
    }
    case "none":
      return PLAIN;
  }
}

export function advantagesOf({ advantage, advantages }: Training, sampled: number): number[] {
  if (advantages.length > 0) return [...advantages];
  return advantage === null ? [] : Array<number>(sampled).fill(advantage);
}

type Scale = Omit<NumberLegend, "type" | "bins">;

const LOGPROBS: Scale = {
  title: "log-prob",
  low: LOWEST_LOGPROB,
  high: 0,
  ticks: [0.001, 0.01, 0.1, 1].map((share) => ({ at: Math.log(share), label: `${share * 100} %` })),
  colour: (value) => sequential(value / LOWEST_LOGPROB),
};

const ENTROPIES: Scale = {
  title: "entropy in nats",
  low: 0,
  high: HIGHEST_ENTROPY,
  ticks: [0, 1, 2, 3].map((at) => ({ at, label: String(at) })),
  colour: (value) => sequential(value / HIGHEST_ENTROPY),
};

function advantageScale(largest: number): Scale {
  const end = largest || 1;
  return {
    title: "advantage",
    low: -end,
    high: end,
    ticks: [-end, 0, end].map((at) => ({ at, label: signed(at, 2) })),
    colour: (value) => diverging(value, end),
  };
}

const PLAIN: Painting = { background: () => undefined, legend: null };

function byNumber(values: readonly Known[], of: (place: number) => Known, scale: Scale): Painting {
  if (values.length === 0) return PLAIN;
  return {
    background: (place) => {
      const value = of(place);
      return isKnown(value) ? scale.colour(value) : undefined;
    },
    legend: { ...scale, type: "number", bins: histogram(values, scale.low, scale.high, BINS) },
  };
}

function isKnown(value: Known): value is number {
  return typeof value === "number" && Number.isFinite(value);
}

/** How many values are in each of so many equally wide bins; those outside are counted in the first and the last. */
export function histogram(values: readonly Known[], low: number, high: number, bins: number): number[] {
  const counts = Array<number>(bins).fill(0);
  for (const value of values) {
    if (!isKnown(value)) continue;
    const at = Math.min(Math.max(Math.floor(((value - low) / (high - low)) * bins), 0), bins - 1);
    counts[at] = (counts[at] ?? 0) + 1;
  }
  return counts;
}

const SHOWN_KINDS = 12;

/** `order`: kinds in the order of their colours; null: each has that of its number, in whatever call it is. */
function byKind(
  title: string,
  values: readonly Known[],
  of: (place: number) => Known,
  order: readonly number[] | null,
): Painting {
  if (values.length === 0) return PLAIN;
  const counts = new Map<number, number>();
  for (const value of values) if (isKnown(value)) counts.set(value, (counts.get(value) ?? 0) + 1);
  const indices = order && new Map(order.map((value, index) => [value, index]));
  const colour = (value: number) => categorical(indices ? (indices.get(value) ?? 0) : value, ALPHA);
  const kinds = [...counts].sort(([one, ones], [other, others]) =>
    order ? one - other : others - ones || one - other,
  );
  return {
    background: (place) => {
      const value = of(place);
      return isKnown(value) ? colour(value) : undefined;
    },
    legend: {
      type: "kind",
      title,
      entries: kinds
        .slice(0, SHOWN_KINDS)
        .map(([value, count]) => ({ name: number(value), colour: colour(value), count })),
      others: kinds.slice(SHOWN_KINDS).reduce((sum, [, count]) => sum + count, 0),
    },
  };
}

function distinct(values: readonly number[]): number[] {
  return [...new Set(values)].sort((one, other) => one - other);
}

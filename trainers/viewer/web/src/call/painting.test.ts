import { expect, test } from "vitest";
import { bucketsOf, hanging } from "./buckets";
import { percent, versionWords } from "./figures";
import { tokensFrom } from "./made";
import { type CallFigures, histogram, paintingOf } from "./painting";
import { trainingOf } from "./training";

const CALL: CallFigures = { logprobs: [-0.1, -5, -50], entropies: [], versions: [3, 3, 4] };
const TOKENS = tokensFrom(["a", "b"], ["x", "y", "z"]);
const NEVER = trainingOf(
  { id: "c", phase: "eval", sampled: { ids: [1, 2, 3], texts: [], special: [], broken: [] } },
  undefined,
);

test("the less likely, the stronger the colour; the prompt has none", () => {
  const { background, legend } = paintingOf("logprob", CALL, TOKENS, NEVER, undefined);
  const strength = (place: number) => Number(background(place)?.match(/([\d.]+)\)$/)?.[1]);
  expect(background(1)).toBeUndefined();
  expect(strength(2)).toBeLessThan(strength(3));
  expect(strength(3)).toBeLessThan(strength(4));
  expect(legend?.type === "number" && legend.bins.reduce((sum, bin) => sum + bin, 0)).toBe(3);
});

test("versions and experts have a colour of their own, counted in the legend", () => {
  const versions = paintingOf("version", CALL, TOKENS, NEVER, undefined);
  expect(versions.background(2)).toBe(versions.background(3));
  expect(versions.background(3)).not.toBe(versions.background(4));
  expect(versions.legend?.type === "kind" && versions.legend.entries.map(({ name, count }) => [name, count])).toEqual([
    ["3", 2],
    ["4", 1],
  ]);
  const many = { layer: 1, layers: 2, start: 1, experts: Array.from({ length: 20 }, (_, at) => [at, 0]) };
  const experts = paintingOf("expert", CALL, TOKENS, NEVER, many);
  expect(experts.background(0)).toBeUndefined();
  expect(experts.background(1)).toBeDefined();
  expect(experts.legend?.type === "kind" && [experts.legend.entries.length, experts.legend.others]).toEqual([12, 8]);
});

test("a histogram counts what lies outside at its ends, and nothing that is no number", () => {
  expect(histogram([-9, 0, 0.5, 1, 9, Number.NaN, null], 0, 1, 4)).toEqual([2, 0, 1, 2]);
});

test("a strip keeps the lowest of each stretch", () => {
  const values = Array.from({ length: 30_000 }, (_, at) => (at === 17_001 ? -9 : -0.5));
  const buckets = bucketsOf(values, 100, 600);
  expect(buckets.length).toBe(600);
  expect(buckets.filter(({ lowest }) => lowest === -9).map(({ place }) => place)).toEqual([17_101]);
  expect(buckets[0]).toEqual({ place: 100, lowest: -0.5, mean: -0.5 });
  expect(bucketsOf([], 0, 600)).toEqual([]);
  expect(hanging([-1, -8], -4)).toBe("M0 0L0 0.250L1 0.250L1 1.000L2 1.000L2 0Z");
});

test("probabilities and versions as people read them", () => {
  expect([0, -Math.LN10, -1e-6, -20, null].map(percent)).toEqual(["100 %", "10 %", ">99.99 %", "2.1e-7 %", "–"]);
  expect([versionWords([]), versionWords([3, 3]), versionWords([3, 4])]).toEqual(["–", "3", "3 to 4"]);
});

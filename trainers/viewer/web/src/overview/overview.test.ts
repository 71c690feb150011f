import { expect, test } from "vitest";
import type { RunDetail } from "../records";
import { differences, overlaid, tellApart } from "./compare";
import { description, last, onSteps } from "./figure";
import { figures } from "./figures";
import { cumulative, errorBars, plot } from "./plot";

const run = (
  series: RunDetail["series"],
  steps = [1, 2, 3],
  evaluations: RunDetail["evaluations"] = [],
): RunDetail => ({
  entry: {
    key: "a.1",
    name: "a",
    path: "",
    state: "finished",
    started_at: 0,
    updated_at: 0,
    model: "",
    seed: 0,
    steps: 3,
    steps_done: 3,
    success: {},
    success_ci95: {},
    note: "",
  },
  steps,
  series,
  every: 1,
  advantage_edges: [],
  advantage_counts: [],
  evaluations,
  stages: {},
  recipe: {},
  formula: "",
});
const figure = (detail: RunDetail, id: string) => {
  const found = figures(detail).find((each) => each.id === id);
  if (!found) throw new Error(`no figure ${id}`);
  return found;
};

test("the interval around success is that of the reward that success is", () => {
  const series = {
    success: [0, 0.5, 1],
    "reward.correct": [0, 0.5, 1],
    "reward_ci95.correct.0": [0, 0.3, 0.8],
    "reward_ci95.correct.1": [0.2, 0.7, 1],
    "reward.numbers": [0.1, 0.2, 0.3],
  };
  const evaluations = [
    { step: 0, label: "base", success: 0.1, ci95: [0, 0.2], n: 10 },
    { step: 3, label: "final", success: 0.9, ci95: [0.8, 1], n: 10 },
  ];
  const drawn = figure(run(series, [1, 2, 3], evaluations), "success");
  expect(drawn.steps).toEqual([0, 1, 2, 3]);
  expect(drawn.lines[0]).toMatchObject({ values: [null, 0, 0.5, 1], high: [null, 0.2, 0.7, 1] });
  expect(drawn.lines[1]).toMatchObject({ values: [0.1, null, null, 0.9], low: [0, null, null, 0.8], points: true });
});

test("the ledger's parts add up to what was sampled, agents apart", () => {
  const drawn = figure(
    run({
      "ledger.sampled": [10, 10, 10],
      "ledger.trained": [4, 5, 6],
      "ledger.masked.no_signal": [6, null, 3],
      "ledger.dropped.timeout": [null, 5, 1],
      "ledger.by_agent.solve.trained": [4, 5, 6],
    }),
    "ledger",
  );
  expect(drawn.lines.map((line) => line.label)).toEqual(["trained", "masked: no signal", "dropped: timeout"]);
  expect(cumulative(drawn.lines.map((line) => line.values)).at(-1)).toEqual([10, 10, 10]);
});

test("each part of the ledger keeps its colour, whatever else occurs", () => {
  const coloured = (series: RunDetail["series"]) =>
    new Map(figure(run(series), "ledger").lines.map(({ label, colour, shade }) => [label, [colour, shade]]));
  const few = coloured({ "ledger.masked.stale": [1], "ledger.dropped.timeout": [1] });
  const more = coloured({
    "ledger.trained": [1],
    "ledger.masked.no_signal": [1],
    "ledger.masked.stale": [1],
    "ledger.dropped.agent_error": [1],
    "ledger.dropped.timeout": [1],
  });
  for (const [label, colour] of few) expect(more.get(label)).toEqual(colour);
  expect(new Set([...more.values()].map(String)).size).toBe(5);
});

test("a step without any value is a gap, not a zero", () => {
  expect(
    cumulative([
      [1, null, 2],
      [null, null, 3],
    ]),
  ).toEqual([
    [1, null, 2],
    [1, null, 5],
  ]);
});

test("charts without values are not there", () => {
  expect(figures(run({ kl: [null, null, null], loss: [0, 0.1, 0.2] })).map((each) => each.id)).toEqual(["loss"]);
});

test("hidden lines leave the rest where it is, error bars included", () => {
  const series = { success: [0, 0.5, 1] };
  const drawn = figure(
    run(series, [1, 2, 3], [{ step: 1, label: "base", success: 0, ci95: [0, 0.1], n: 9 }]),
    "success",
  );
  expect(errorBars(drawn, new Set())).toMatchObject([{ high: 3, low: 4 }]);
  expect(errorBars(drawn, new Set(["training"]))).toMatchObject([{ high: 2, low: 3 }]);
  expect(plot(drawn, { hidden: new Set(["training"]), log: false }).data).toHaveLength(4);
});

test("a logarithmic scale leaves out what has no logarithm", () => {
  const drawn = figure(run({ kl: [0, -1, 0.5] }), "kl");
  expect(plot(drawn, { hidden: new Set(), log: true }).data[1]).toEqual([null, null, 0.5]);
});

test("runs of different lengths are laid over each other, a colour a run", () => {
  const one = run({ loss: [1, 2, 3], "seconds.train": [1, 1, 1] });
  const other = run({ loss: [4, 5] }, [2, 4]);
  const [loss, ...more] = overlaid([one, other], ["one", "other"]);
  expect(more).toEqual([]);
  expect(loss?.steps).toEqual([1, 2, 3, 4]);
  expect(loss?.lines.map((line) => [line.label, line.colour, line.values])).toEqual([
    ["one", 0, [1, 2, 3, null]],
    ["other", 1, [null, 4, null, 5]],
  ]);
});

test("only fields that differ are shown, those that one recipe lacks too", () => {
  expect(
    differences([
      { seed: "0", name: '"a"' },
      { seed: "1", name: '"a"', "train.steps": "3" },
    ]),
  ).toEqual([
    { field: "seed", values: ["0", "1"] },
    { field: "train.steps", values: [undefined, "3"] },
  ]);
});

test("runs of one name are told apart by their times", () => {
  expect(tellApart(["a.b.1", "a.b.2"])).toEqual(["1", "2"]);
  expect(tellApart(["a.1", "b.1"])).toEqual(["a.1", "b.1"]);
});

test("a figure says its last values in words", () => {
  const drawn = onSteps(figure(run({ loss: [1, 0.12345, null] }), "loss"), [1, 2, 3]);
  expect(description(drawn)).toBe("Loss: policy 0.123 at step 2");
  expect(last(drawn, { label: "", values: [null, null, null], colour: 0 })).toBeNull();
});

import { expect, test } from "vitest";
import type { CallNode, SpanNode } from "../records";
import { axisOf, barsOf, joined, lastTime, seconds, ticks } from "./timeline";

const agent = { type: "span", kind: "agent", id: "a", depth: 0, started_at: 100, ended_at: 110 } as SpanNode;
const call = { type: "call", id: "c", depth: 1, started_at: 101, ended_at: 103 } as CallNode;
const tool = { type: "span", kind: "tool", id: "t", depth: 1, started_at: 103, ended_at: 105 } as SpanNode;

test("the axis goes from the first to the last that is known, or to now", () => {
  expect(axisOf([agent], 99, 110, 999)).toEqual({ start: 99, end: 110 });
  expect(axisOf([agent], 99, null, 120)).toEqual({ start: 99, end: 120 });
  expect(axisOf([], 0, null, 0)).toEqual({ start: 0, end: 1 });
});

test("an agent's bar shows its calls and tools", () => {
  const bars = barsOf([agent, call, tool], { start: 100, end: 110 });
  expect(bars.get("a")).toEqual({ from: 0, to: 1, model: [{ from: 0.1, to: 0.3 }], tools: [{ from: 0.3, to: 0.5 }] });
});

test("what has not ended goes to the end of the axis", () => {
  const open = { ...agent, ended_at: 0 };
  expect(seconds(open, { start: 100, end: 130 })).toBe(30);
  expect(barsOf([open], { start: 100, end: 200 }).get("a")?.to).toBe(1);
});

test("stretches that touch are one", () => {
  expect(
    joined([
      { from: 0.5, to: 0.6 },
      { from: 0, to: 0.2 },
      { from: 0.1, to: 0.3 },
    ]),
  ).toEqual([
    { from: 0, to: 0.3 },
    { from: 0.5, to: 0.6 },
  ]);
});

test("marks are round numbers", () => {
  expect(ticks(10)).toEqual([0, 5, 10]);
  expect(ticks(0.37)).toEqual([0, 0.1, 0.2, 0.3]);
  expect(ticks(455)).toEqual([0, 120, 240, 360]);
  expect(ticks(0)).toEqual([0]);
});

test("what never ended is heard of until its last node", () => {
  const nodes = [
    { started_at: 3, ended_at: 0 },
    { started_at: 1, ended_at: 2 },
  ] as SpanNode[];
  expect(lastTime({ started_at: 1, nodes })).toBe(3);
  expect(lastTime({ started_at: 1, nodes: [] })).toBe(1);
});

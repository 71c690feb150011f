import { expect, test } from "vitest";
import type { CallCredit, CallFacts, GroupReport, RolloutFacts, RuleCredit } from "../records";
import { columnsOf } from "./columns";
import { chosenRules, toggled } from "./rules";
import {
  depthsOf,
  difference,
  differenceOf,
  largestAdvantage,
  largestDifference,
  linesOf,
  moved,
  ofRollout,
  returnsOf,
} from "./table";

const call = (id: string, parent_id: string | null = null, relation = "root") =>
  ({ id, parent_id, relation }) as CallFacts;
const rollout = (episode: string, sample: number, ret: number, calls: CallFacts[] = []) =>
  ({ episode, sample, ret, calls }) as RolloutFacts;
const given = (advantage: number, masked: string | null = null) => ({ advantage, masked }) as CallCredit;
const rule = (calls: Record<string, CallCredit>): RuleCredit => ({ rule: "x", calls, unknown: "" });

const report = {
  rollouts: [rollout("low", 0, 0, [call("l0")]), rollout("high", 1, 1, [call("h0"), call("h1")])],
} as GroupReport;

test("rollouts by return, their calls below them unless they are folded", () => {
  const keys = (order: "best" | "worst" | "sample", folded: string[] = []) =>
    linesOf(report, order, new Set(folded)).map((line) => line.key);
  expect(keys("best")).toEqual(["high", "h0", "h1", "low", "l0"]);
  expect(keys("worst", ["low"])).toEqual(["low", "high", "h0", "h1"]);
  expect(keys("sample", ["low", "high"])).toEqual(["low", "high"]);
});

test("only branches go deeper", () => {
  const calls = [
    call("a"),
    call("b", "a", "extension"),
    call("c", "a", "fork"),
    call("d", "c", "extension"),
    call("e"),
  ];
  expect([...depthsOf(calls).values()]).toEqual([0, 0, 1, 1, 0]);
});

test("a masked call counts as one that learns nothing, an unknown one as unknown", () => {
  expect(difference(given(0.5), given(-0.5))).toBe(1);
  expect(difference(given(9, "greedy"), given(-0.5))).toBe(0.5);
  expect(difference(undefined, given(1))).toBeNull();
  expect(largestDifference(rule({ a: given(1), b: given(0) }), [rule({ a: given(0.5), b: given(2) })])).toBe(2);
  expect(largestAdvantage([rule({ a: given(-3) }), rule({})])).toBe(3);
});

test("of a rollout the mean over what is trained on", () => {
  const member = rollout("r", 0, 1, [call("a"), call("b"), call("c")]);
  expect(ofRollout(member, rule({ a: given(1), b: given(0.5), c: given(0, "greedy") }))).toEqual({
    advantage: 0.75,
    trained: 2,
  });
  expect(ofRollout(member, rule({}))).toEqual({ advantage: null, trained: 0 });
  expect(returnsOf(report.rollouts)).toEqual({ mean: 0.5, std: Math.SQRT1_2 });
});

test("of a rollout the mean difference over the calls that one of two rules trains", () => {
  const member = rollout("r", 0, 1, [call("a"), call("b"), call("c")]);
  const own = rule({ a: given(1), b: given(0, "no_credit"), c: given(0, "greedy") });
  const other = rule({ a: given(0.5), b: given(1), c: given(0, "greedy") });
  expect(differenceOf(member, other, own)).toBe(0.25);
  expect(differenceOf(member, rule({}), own)).toBeNull();
});

test("moving stops at the ends, and begins at one without a choice", () => {
  const lines = linesOf(report, "best", new Set());
  expect(moved(lines, null, 1)).toBe("high");
  expect(moved(lines, null, -1)).toBe("l0");
  expect(moved(lines, "h1", 1)).toBe("low");
  expect(moved(lines, "high", Number.NEGATIVE_INFINITY)).toBe("high");
  expect(moved(lines, "h0", Number.POSITIVE_INFINITY)).toBe("l0");
});

test("rules beside the own one: stated, or some; taking out the last is not the default again", () => {
  expect(chosenRules([], "equal")).toEqual(["step_rewards", "tree"]);
  expect(chosenRules(["final", "equal", "final"], "equal")).toEqual(["final"]);
  expect(toggled(["final"], "tree")).toEqual(["final", "tree"]);
  expect(chosenRules(toggled(["final"], "final"), "equal")).toEqual([]);
});

test("a rule's column: being computed, failed, there", () => {
  const credit = rule({ a: given(1) });
  const came = [
    null,
    Object.assign(new Error("no such rule"), { hint: "choose", status: 400 }),
    { ...report, others: [credit] },
  ];
  expect(columnsOf(["x", "y", "z"], came)).toEqual([
    { rule: "x", credit: null, missing: "" },
    { rule: "y", credit: null, missing: "no such rule: choose" },
    { rule: "z", credit, missing: "" },
  ]);
});

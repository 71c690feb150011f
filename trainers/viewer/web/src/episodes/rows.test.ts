import { expect, test } from "vitest";
import type { EpisodeRow } from "../records";
import { heat, moved, PAGE, pagesFor, rewardRanges, sortRows, whereabouts } from "./rows";

const row = (id: string, rewards: Record<string, number> = {}, seconds: number | null = 1): EpisodeRow => ({
  id,
  phase: "train",
  step: 1,
  task: "t",
  sample: 0,
  attempt: 0,
  group: "",
  outcome: null,
  counted: false,
  rewards,
  calls: 0,
  tokens: 0,
  agents: [],
  versions: [],
  started_at: 0,
  seconds,
});
const ids = (rows: EpisodeRow[]) => rows.map(({ id }) => id).join("");

test("the pages asked for cover what is seen, and a bit more as one comes near the end of it", () => {
  expect(pagesFor(0, 20, 100_000)).toEqual([0]);
  expect(pagesFor(0, 20, 0)).toEqual([0]);
  expect(pagesFor(60, 90, 100_000)).toEqual([0, 100]);
  expect(pagesFor(195, 230, 231)).toEqual([100, 200]);
  expect(pagesFor(99_970, 99_999, 100_000)).toEqual([99_900]);
});

test("the selection stays within the rows", () => {
  expect(moved(-1, "down", 10, 5)).toBe(0);
  expect(moved(-1, "up", 10, 5)).toBe(0);
  expect(moved(8, "page down", 10, 5)).toBe(9);
  expect(moved(3, "page up", 10, 5)).toBe(0);
  expect(moved(3, "last", 10, 5)).toBe(9);
});

test("an episode is found again where new ones moved it", () => {
  const pages = new Map([[0, [row("new"), row("a"), row("b")]]]);
  expect(whereabouts("a", 0, pages)).toBe(1);
  expect(whereabouts("b", 2, pages)).toBe(2);
  expect(whereabouts("gone", 7 * PAGE, pages)).toBe(7 * PAGE);
});

test("rows without a value come last in both orders", () => {
  const rows = [row("a", { r: 0.5 }), row("b"), row("c", { r: 1 })];
  expect(ids(sortRows(rows, "reward.r", true))).toBe("cab");
  expect(ids(sortRows(rows, "reward.r", false))).toBe("acb");
  expect(ids(sortRows([row("a", {}, null), row("b", {}, 2)], "seconds", false))).toBe("ba");
});

test("rewards are compared with others of their name", () => {
  const ranges = rewardRanges([row("a", { r: -1 }), row("b", { r: 3, s: 2 })]);
  expect(ranges).toEqual({ r: { low: -1, high: 3 }, s: { low: 2, high: 2 } });
  expect([heat(-1, ranges.r), heat(1, ranges.r), heat(3, ranges.r), heat(2, ranges.s)]).toEqual([-1, 0, 1, 0]);
});

import { expect, test } from "vitest";
import { queryText } from "../address";
import { activeFilters, boundsText, cleared, nextSort, queryOf, readBounds, readFilters, toggled } from "./filters";

const through = (query: string) => queryText(queryOf(readFilters(new URLSearchParams(query))));

test("an address with every filter survives being read and written", () => {
  const query = new URLSearchParams([
    ["text", "a & b"],
    ["phase", "train"],
    ["outcome", "timeout"],
    ["outcome", "running"],
    ["agent", "größe"],
    ["counted", "false"],
    ["step", "3,5"],
    ["tokens", ",900"],
    ["reward.correct", "0.5,"],
    ["sort", "reward.correct"],
    ["descending", "false"],
  ]).toString();
  expect(through(query)).toBe(query);
  expect(through("")).toBe("");
  expect(through("sort=started_at&descending=true")).toBe("");
});

test("ranges may be half open, single numbers, or nonsense that somebody typed", () => {
  expect(readBounds("3,")).toEqual([3, null]);
  expect(readBounds("4")).toEqual([4, 4]);
  expect(readBounds("x,1e3")).toEqual([null, 1000]);
  expect(readBounds("a,b")).toEqual([null, null]);
  expect(boundsText([null, 0])).toBe(",0");
  expect(through("reward.x=,&step=,,")).toBe("");
});

test("each active filter takes only itself away, and clearing takes all", () => {
  const active = activeFilters(
    readFilters(new URLSearchParams("outcome=timeout&outcome=completed&step=3,3&reward.a=0.5,")),
  );
  expect(active.map(({ label }) => label)).toEqual(["outcome: timeout", "outcome: completed", "step = 3", "a ≥ 0.5"]);
  expect(active[0]?.clear).toEqual({ outcome: ["completed"] });
  expect(cleared(active)).toEqual({ outcome: null, step: null, "reward.a": null });
});

test("a click on a column sorts by it, the next one turns the order around", () => {
  const usual = { sort: "started_at", descending: true };
  expect(nextSort(usual, "tokens", true)).toEqual({ sort: "tokens", descending: null });
  expect(nextSort({ sort: "tokens", descending: true }, "tokens", true)).toEqual({ sort: "tokens", descending: false });
  expect(nextSort(usual, "task", false)).toEqual({ sort: "task", descending: false });
  expect(nextSort(usual, "started_at", true)).toEqual({ sort: null, descending: false });
  expect(toggled(["a", "b"], "a")).toEqual(["b"]);
});

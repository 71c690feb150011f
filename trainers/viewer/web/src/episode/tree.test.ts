import { expect, test } from "vitest";
import type { CallNode, SpanNode } from "../records";
import { agentsOf, ancestors, nextWhere, revealing, type TreeNode, visibleRows } from "./tree";

const span = (id: string, depth: number, error = false) =>
  ({ type: "span", id, depth, error: error ? { text: "no", length: 2, place: "" } : null }) as SpanNode;
const call = (id: string, depth: number, index: number, agent: string) =>
  ({ type: "call", id, depth, index, agent, finish_reason: "stop" }) as CallNode;

const nodes: TreeNode[] = [
  span("root", 0),
  span("planner", 1),
  call("c0", 2, 0, "planner"),
  span("tool", 2, true),
  span("worker", 1),
  call("c1", 2, 1, "worker"),
  span("after", 0),
];
const ids = (folded: string[]) => visibleRows(nodes, new Set(folded)).map((row) => row.node.id);

test("closing a node hides what lies below it, and says whether an error does", () => {
  expect(ids([])).toEqual(nodes.map((node) => node.id));
  expect(ids(["planner"])).toEqual(["root", "planner", "worker", "c1", "after"]);
  const rows = visibleRows(nodes, new Set(["root", "planner"]));
  expect(rows.map((row) => [row.node.id, row.parent, row.hidden, row.hiddenError])).toEqual([
    ["root", true, 5, true],
    ["after", false, 0, false],
  ]);
});

test("what is looked for is opened, and the rest stays closed", () => {
  expect(ancestors(nodes, "tool")).toEqual(["planner", "root"]);
  const folded = new Set(["root", "planner", "worker"]);
  expect([...revealing(nodes, folded, "tool")]).toEqual(["worker"]);
  expect(revealing(nodes, folded, "after")).toBe(folded);
});

test("the search for the next one starts anew at the end", () => {
  const broken = (node: TreeNode) => node.type === "span" && node.error !== null;
  expect(nextWhere(nodes, null, broken)).toBe("tool");
  expect(nextWhere(nodes, "worker", broken)).toBe("tool");
  expect(nextWhere(nodes, "tool", () => false)).toBeNull();
  expect(nextWhere([], null, () => true)).toBeNull();
});

test("agents keep their place in the order in which they called", () => {
  expect(agentsOf(nodes)).toEqual(["planner", "worker"]);
});

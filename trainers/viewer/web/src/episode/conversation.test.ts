import { expect, test } from "vitest";
import type { CallNode, SpanNode } from "../records";
import { turnsOf } from "./conversation";

const message = (role: string) => ({ role, text: { text: role, length: 4, place: "" }, tools: [] });

test("what was said before a reply comes before it, tools where they began, agents not at all", () => {
  const call = (id: string, started_at: number, news: string[]) =>
    ({ type: "call", id, started_at, news: news.map(message), reply: message("assistant") }) as unknown as CallNode;
  const span = (id: string, kind: string, started_at: number) =>
    ({ type: "span", id, kind, started_at, error: null }) as SpanNode;
  const turns = turnsOf([
    span("a", "agent", 0),
    call("c1", 3, ["tool"]),
    call("c0", 1, ["system", "user"]),
    span("t", "tool", 2),
  ]);
  expect(turns.map((turn) => (turn.kind === "event" ? turn.span.id : `${turn.call.id} ${turn.message.role}`))).toEqual([
    "c0 system",
    "c0 user",
    "c0 assistant",
    "t",
    "c1 tool",
    "c1 assistant",
  ]);
});

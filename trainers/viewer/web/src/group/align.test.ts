import { describe, expect, it } from "vitest";
import type { SampleMessage } from "../records";
import { aligned, along, common, least, partingRow } from "./align";

function said(text: string, by: "policy" | "user" = "policy", length = text.length): SampleMessage {
  const place = length > text.length ? "somewhere" : "";
  const role = by === "policy" ? "assistant" : "user";
  return {
    call: by === "policy" ? "a call of its own" : null,
    message: { role, text: { text, length, place }, tools: [] },
  };
}

const talk = (...texts: string[]) => texts.map((text) => said(text, text.endsWith("?") ? "user" : "policy"));

describe("aligned", () => {
  it("puts what all said into one row, and each one's own beside that of the others", () => {
    const { rows, same } = aligned([
      talk("train", "seat?", "13F"),
      talk("bus", "or foot", "seat?", "none"),
      talk("seat?"),
    ]);
    expect(rows).toEqual([
      [0, 0, null],
      [null, 1, null],
      [1, 2, 0],
      [2, 3, null],
    ]);
    expect(same.map((places) => [...places])).toEqual([[[1, 1]], [[2, 1]], [[0, 1]]]);
  });

  it("says where they part, and that the same ones never do", () => {
    expect(partingRow(aligned([talk("a", "b?", "c"), talk("a", "b?", "d")]))).toBe(2);
    expect(partingRow(aligned([talk("a", "b?"), talk("a", "b?")]))).toBe(-1);
    expect(aligned([talk("a", "b?")]).rows).toEqual([[0], [1]]);
    expect(aligned([[], []]).rows).toEqual([]);
  });

  it("takes the same words of another role, and of texts that were cut, for different ones", () => {
    expect(partingRow(aligned([[said("x")], [said("x", "user")]]))).toBe(0);
    expect(partingRow(aligned([[said("x", "policy", 9)], [said("x", "policy", 9)]]))).toBe(0);
  });
});

it("common finds the longest common subsequence", () => {
  expect([...common([1, 2, 3, 4], [2, 9, 4])]).toEqual([
    [1, 0],
    [3, 2],
  ]);
  expect(common([-1], [-1]).size).toBe(0);
});

describe("along", () => {
  const start = (one: SampleMessage, other: SampleMessage, counted?: number) =>
    along(one.message, other.message, counted).text;

  it("counts the common beginning, not through a character, and asks the server about what was cut", () => {
    expect(start(said("By train."), said("By bus."))).toBe(3);
    expect(start(said("🙂"), said("🙃"))).toBe(0);
    expect(start(said("same"), said("same", "user"))).toBe(0);
    expect(start(said("ab", "policy", 100), said("ab", "policy", 100), 40)).toBe(40);
    expect(start(said("ab"), said("abc"), 40)).toBe(2);
  });

  it("looks into the arguments of tools, and takes the least of several", () => {
    const use = (name: string, expression: string) => ({
      role: "assistant",
      text: said("").message.text,
      tools: [{ name, arguments: said(`{"x": "${expression}"}`).message.text }],
    });
    const laid = '{\n  "x": "1'.length;
    expect(along(use("sum", "1+2"), use("sum", "1-2")).tools).toEqual([laid]);
    expect(along(use("sum", "1+2"), use("max", "1+2")).tools).toEqual([0]);
    expect(
      least([
        { text: 3, tools: [5] },
        { text: 4, tools: [2] },
      ]),
    ).toEqual({ text: 3, tools: [2] });
    expect(least([])).toBeUndefined();
  });
});

import { expect, test } from "vitest";
import { isCut, laidOut, unitsOf, upTo } from "./text";

test("a text is cut if the rest has a place, whatever its length is counted in", () => {
  const smiles = { text: "🙂".repeat(10), length: 10, place: "" };
  expect(isCut(smiles)).toBe(false);
  expect(isCut({ ...smiles, length: 12, place: "[1]" })).toBe(true);
});

test("JSON is laid out where the whole of it is here", () => {
  expect(laidOut({ text: '{"a":1}', length: 7, place: "" }).text).toBe('{\n  "a": 1\n}');
  expect(laidOut({ text: '{"a":1', length: 99, place: "[1]" }).text).toBe('{"a":1');
});

test("no character is cut in half", () => {
  expect(upTo("a🙂b", 2)).toBe("a");
  expect(upTo("a🙂b", 3)).toBe("a🙂");
  expect(unitsOf("a🙂b", 2)).toBe(3);
  expect(unitsOf("ab", 9)).toBe(9);
});

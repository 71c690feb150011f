import { expect, test } from "vitest";
import { blockAt, blocksOf, foldAt, linesOf } from "./blocks";
import { tokensFrom } from "./made";

test("blocks cover all tokens once, and end at line breaks where there are any", () => {
  const tokens = tokensFrom(
    [],
    Array.from({ length: 2000 }, (_, at) => (at % 70 === 69 ? ".\n" : " word")),
  );
  const blocks = blocksOf(tokens, 0, tokens.count);
  expect(blocks.flatMap(({ start, end }) => Array.from({ length: end - start }, (_, at) => start + at))).toEqual(
    Array.from({ length: 2000 }, (_, at) => at),
  );
  expect(blocks.every(({ whole }) => whole)).toBe(true);
  expect(blocks.slice(0, -1).every(({ end }) => tokens.text(end - 1) === ".\n")).toBe(true);
  expect(blockAt(blocks, 1999)).toBe(blocks.length - 1);
  expect(blockAt(blocks, 2000)).toBe(-1);
});

test("a line that never ends is broken, and says so", () => {
  const tokens = tokensFrom([], Array<string>(1500).fill("x"));
  const blocks = blocksOf(tokens, 0, 1500);
  expect(blocks.map(({ end, whole }) => [end, whole])).toEqual([
    [600, false],
    [1200, false],
    [1500, true],
  ]);
});

test("lines are guessed from the text", () => {
  const tokens = tokensFrom([], ["one\n", "two ", "and", "x".repeat(25)]);
  expect(linesOf(tokens, { start: 0, end: 2, whole: true }, 80)).toBe(2);
  expect(linesOf(tokens, { start: 3, end: 4, whole: true }, 10)).toBe(3);
});

test("a long prompt is folded, to the start of a line if one is near", () => {
  const prompt = Array<string>(1000).fill("x");
  expect(foldAt(tokensFrom(prompt, []), false)).toBe(800);
  prompt[780] = "\n";
  expect(foldAt(tokensFrom(prompt, []), false)).toBe(781);
  expect(foldAt(tokensFrom(prompt, []), true)).toBe(0);
  expect(foldAt(tokensFrom(prompt.slice(0, 250), []), false)).toBe(0);
});

import { expect, test } from "vitest";
import { tokensFrom } from "./made";
import { piecesOf } from "./pieces";
import { aroundBroken, plainText, sampledEarlier, tokensOf } from "./tokens";

test("prompt and sampled tokens are one row", () => {
  const tokens = tokensFrom(["a", "b"], ["<|im_end|>"], { special: [0] });
  expect([tokens.count, tokens.prompt, tokens.text(1), tokens.text(2)]).toEqual([3, 2, "b", "<|im_end|>"]);
  expect([tokens.special(0), tokens.special(2)]).toEqual([false, true]);
});

test("without texts there are ids", () => {
  const ids = { ids: [17, 4], texts: [], special: [], broken: [] };
  const tokens = tokensOf({ prompt: ids, sampled: ids });
  expect([tokens.texts, tokens.text(2), plainText(tokens, 0, 4)]).toEqual([false, "17", "17 4 17 4"]);
});

test("a character split over tokens is whole in the text that is copied", () => {
  const tokens = tokensFrom([], ["Hi ", "\\xf0\\x9f", "\\x99\\x82", "!"], { broken: [1, 2] });
  expect(plainText(tokens, 0, 4)).toBe("Hi 🙂!");
  expect(aroundBroken(tokens, 2)).toBe("🙂");
});

test("who sampled a prompt token", () => {
  const parts = [
    { start: 0, end: 2, call: null, index: null },
    { start: 2, end: 4, call: "c0", index: 0 },
  ];
  expect([sampledEarlier(parts, 1), sampledEarlier(parts, 3)?.index]).toEqual([undefined, 0]);
});

test("white space keeps its text, so that a selection copies it; what would hide or reorder is replaced", () => {
  const pieces = piecesOf("a  b\n\t\u202e");
  expect(pieces.map(({ kind }) => kind)).toEqual(["text", "space", "text", "newline", "tab", "invisible"]);
  expect(
    pieces
      .slice(0, -1)
      .map(({ text }) => text)
      .join(""),
  ).toBe("a  b\n\t");
  expect(pieces.at(-1)?.text).toBe("\\u{202e}");
});

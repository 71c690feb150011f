import { expect, test } from "vitest";
import { visible } from "./visible";

const shown = (text: string, all = false) =>
  visible(text, all)
    .map((piece) => (piece.invisible ? `[${piece.text}]` : piece.text))
    .join("");

test("what would command a terminal, reorder a line or hide is shown as what it is", () => {
  expect(shown("a\u001b[31mred")).toBe("a[␛][31mred");
  expect(shown("ab\u202ecd")).toBe("ab[\\u{202e}]cd");
  expect(shown("zero\u200bwidth\ufeff")).toBe("zero[\\u{200b}]width[\\u{feff}]");
  expect(shown("lone \ud800 half")).toBe("lone [\\u{d800}] half");
});

test("what has no width, or another width than it seems, is shown, pictures are left alone", () => {
  expect(shown("a\u{e0101}b\u3164c\u2009d")).toBe("a[\\u{e0101}]b[\\u{3164}]c[\\u{2009}]d");
  expect(shown("❤\ufe0f")).toBe("❤\ufe0f");
});

test("line breaks and tabs stay in texts, and are shown in tokens", () => {
  expect(shown("a\n\tb c")).toBe("a\n\tb c");
  expect(shown("a\n b", true)).toBe("a[↵\n·]b");
});

import { expect, test } from "vitest";
import type { CallNode, MessageView, SpanNode } from "../records";
import { pretty } from "../shared/text";
import { firstWords, lastLine, parting, replyWords, spanWords } from "./words";

const text = (text: string) => ({ text, length: text.length, place: "" });

test("the end of a traceback is what went wrong, also when it has lines below", () => {
  const traceback =
    "Traceback (most recent call last):\n  File 'a.py', line 1\n    x()\nValueError: no such thing\n  hint\n";
  expect(lastLine(traceback)).toBe("ValueError: no such thing");
  expect(lastLine("only this")).toBe("only this");
});

test("a row has one line", () => {
  expect(firstWords("  a\n\tb  c ")).toBe("a b c");
  expect(firstWords("x".repeat(1_000_000), 10)).toBe(`${"x".repeat(10)}…`);
});

test("replies and tools in a line", () => {
  const reply: MessageView = {
    role: "assistant",
    text: text("Let me see."),
    tools: [{ name: "add", arguments: text("{}") }],
  };
  expect(replyWords(reply)).toBe("Let me see.  → add({})");
  const tool = { arguments: text('{"a": 1}'), result: text("2"), error: null } as SpanNode;
  expect(spanWords(tool)).toBe('{"a": 1} → 2');
  expect(spanWords({ ...tool, error: text("Traceback\nOSError: gone") })).toBe('OSError: gone  ← {"a": 1}');
});

test("JSON is laid out, all else left alone", () => {
  expect(pretty('{"a":[1]}')).toBe('{\n  "a": [\n    1\n  ]\n}');
  expect(pretty('{"a":')).toBe('{"a":');
  expect(pretty("12 apples")).toBe("12 apples");
});

test("only forks and edits are marked", () => {
  expect(parting({ relation: "fork", parted_at: 1234 } as CallNode)).toBe("fork at token 1\u202f234");
  expect(parting({ relation: "extension", parted_at: null } as CallNode)).toBe("");
});

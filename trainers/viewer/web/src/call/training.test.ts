import { expect, test } from "vitest";
import type { CallCredit, GroupReport } from "../records";
import { trainedWords, trainingOf } from "./training";

const call = { id: "c1", phase: "train", sampled: { ids: [1, 2, 3], texts: [], special: [], broken: [] } };

function report(credit: Partial<CallCredit> | null, unknown = ""): GroupReport {
  const given = { ret: 1, advantage: -0.5, token_advantages: [], with_loss: 3, masked: null, ...credit };
  const calls: Record<string, CallCredit> = credit ? { c1: given } : {};
  const own = { rule: "grpo", calls, unknown };
  return { group: "1/t", task: "t", objective: "grpo", rollouts: [], own, others: [], notes: [] };
}

test("which tokens have a loss, and why others have none", () => {
  expect(trainingOf(call, report({}))).toMatchObject({ state: "known", trained: 3, advantage: -0.5, largest: 0.5 });
  const masked = trainingOf(call, report({ masked: "greedy", with_loss: 0 }));
  expect(masked.trained).toBe(0);
  expect(masked.sentence).toMatch(/^Not trained on\. .*temperature 0/);
  const cut = trainingOf(call, report({ with_loss: 2 }));
  expect([cut.trained, cut.sentence]).toEqual([2, expect.stringContaining("train.max_row_tokens")]);
  expect(trainingOf(call, report(null))).toMatchObject({ state: "known", trained: 0 });
});

test("a few words say how much is trained on", () => {
  const words = (state: "asked" | "never" | "known", trained: number) => trainedWords({ state, trained }, 5);
  expect([words("known", 5), words("known", 2), words("known", 0), words("never", 0), words("asked", 0)]).toEqual([
    "trained on",
    "the first 2 trained on",
    "not trained on",
    "not trained on",
    "",
  ]);
});

test("what nobody can say is not said", () => {
  expect(trainingOf({ ...call, phase: "eval-base" }, undefined)).toMatchObject({ state: "never", trained: 0 });
  expect(trainingOf(call, undefined)).toMatchObject({ state: "asked" });
  expect(trainingOf(call, undefined, "no store").sentence).toContain("no store");
  expect(trainingOf(call, report({}, "it needs a critic"))).toMatchObject({ state: "unknown", advantage: null });
});

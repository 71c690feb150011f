import type { CallView, GroupReport } from "../records";
import { number } from "../shared/format";
import { maskSentence } from "../shared/masks";

/** Which tokens of a call have a loss, as far as one can say. */
export interface Training {
  /** `asked`: the answer is on its way; `unknown`: nobody can say. */
  state: "asked" | "unknown" | "never" | "known";
  /** How many sampled tokens, from the first, have a loss, if that is known. */
  trained: number;
  /** In a sentence or two. */
  sentence: string;
  advantage: number | null;
  ret: number | null;
  /** Of each sampled token, where they differ. */
  advantages: readonly number[];
  /** The largest advantage in size of the group: what colours are measured by. */
  largest: number;
}

const NOTHING = { trained: 0, advantage: null, ret: null, advantages: [], largest: 0 } as const;

export function trainingOf(
  call: Pick<CallView, "id" | "phase" | "sampled">,
  report: GroupReport | undefined,
  failure?: string,
): Training {
  if (call.phase !== "train") {
    return { ...NOTHING, state: "never", sentence: "Made in an evaluation: such calls are never trained on." };
  }
  if (failure) return { ...NOTHING, state: "unknown", sentence: `Whether it was trained on is not known: ${failure}` };
  if (!report) return { ...NOTHING, state: "asked", sentence: "Its credit is being computed." };
  if (report.own.unknown) {
    return { ...NOTHING, state: "unknown", sentence: `Its credit is not known: ${report.own.unknown}.` };
  }
  const credit = report.own.calls[call.id];
  if (!credit) {
    const sentence = "Not trained on: its episode is no counted sample of its group.";
    return { ...NOTHING, state: "known", sentence };
  }
  const sampled = call.sampled.ids.length;
  return {
    state: "known",
    trained: credit.masked === null ? Math.min(credit.with_loss, sampled) : 0,
    sentence: sentenceOf(credit.masked, credit.with_loss, sampled),
    advantage: credit.advantage,
    ret: credit.ret,
    advantages: credit.token_advantages,
    largest: largestOf(report),
  };
}

/** The same in a few words, beside the count of sampled tokens; empty where nobody knows. */
export function trainedWords({ state, trained }: Pick<Training, "state" | "trained">, sampled: number): string {
  if (state === "never" || (state === "known" && trained === 0)) return "not trained on";
  if (state !== "known" || sampled === 0) return "";
  return trained >= sampled ? "trained on" : `the first ${number(trained)} trained on`;
}

function sentenceOf(masked: string | null, withLoss: number, sampled: number): string {
  if (masked !== null) return `Not trained on. ${maskSentence(masked)}`;
  if (withLoss >= sampled) return "All its sampled tokens are trained on.";
  const cut = "the others lie beyond train.max_row_tokens.";
  return withLoss === 0
    ? "Not trained on. Its prompt alone is longer than train.max_row_tokens."
    : `Only its first ${number(withLoss)} sampled tokens are trained on; ${cut}`;
}

function largestOf(report: GroupReport): number {
  let largest = 0;
  for (const credit of Object.values(report.own.calls)) {
    largest = Math.max(largest, Math.abs(credit.advantage));
    for (const value of credit.token_advantages) largest = Math.max(largest, Math.abs(value));
  }
  return largest;
}

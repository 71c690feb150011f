import { useRef } from "react";
import type { GroupReport, RuleCredit } from "../records";
import type { SourceError } from "../source";

/** Another rule's column: what it gave, or why that is not there. */
export interface Column {
  rule: string;
  /** Null while it is being computed, and if that failed. */
  credit: RuleCredit | null;
  /** Why there are no numbers; empty if there are, or will be. */
  missing: string;
}

/** `came` is what the server said of each rule; null while it has not. */
export function columnsOf(rules: readonly string[], came: readonly (GroupReport | SourceError | null)[]): Column[] {
  return rules.map((rule, at) => {
    const answer = came[at] ?? null;
    if (answer instanceof Error) {
      return { rule, credit: null, missing: [answer.message, answer.hint].filter(Boolean).join(": ") };
    }
    const credit = answer?.others[0] ?? null;
    return { rule, credit, missing: credit?.unknown ?? "" };
  });
}

/** The list of before while its entries are the same, so that rows need not be drawn anew. */
export function useSame<T>(list: readonly T[]): readonly T[] {
  const kept = useRef(list);
  const before = kept.current;
  if (before.length !== list.length || before.some((each, at) => each !== list[at])) kept.current = list;
  return kept.current;
}

import type { CallNode, PromptPart } from "../records";
import { number } from "../shared/format";

/** A log-prob as a probability: `12.3 %`. */
export function percent(logprob: number | null | undefined): string {
  if (logprob === null || logprob === undefined || !Number.isFinite(logprob)) return "–";
  const share = Math.exp(logprob) * 100;
  if (share > 99.99 && share < 100) return ">99.99 %";
  return share < 0.001 ? `${share.toExponential(1)} %` : `${number(share)} %`;
}

/** How a call stands to the one that it continues, in words that the link to that one follows. */
export function relationWords({ relation, parted_at: at }: CallNode): string {
  if (relation === "extension") return "extends";
  if (relation === "fork") return at === null ? "branches from" : `branches at token ${number(at)} from`;
  if (relation === "edit") return at === null ? "edits the history of" : `parts at token ${number(at)} from`;
  return "begins a conversation";
}

/** Number of a call in its episode, if the prompt says it. */
export function indexOf(parts: readonly PromptPart[], call: string): number | null {
  return parts.find((part) => part.call === call)?.index ?? null;
}

export function versionWords(versions: readonly number[]): string {
  const [low, high] = versions;
  if (low === undefined) return "–";
  return high === undefined || high === low ? `${low}` : `${low} to ${high}`;
}

import type { CallNode, MessageView, RewardView, SpanNode } from "../records";
import { number } from "../shared/format";

/** What fits into a row: the beginning, on one line. */
export function firstWords(text: string, most = 160): string {
  const line = text
    .slice(0, most * 4)
    .replace(/\s+/g, " ")
    .trim();
  return line.length > most ? `${line.slice(0, most)}…` : line;
}

/** A reply in a line: the tools that it asks for, else what it says. */
export function replyWords(reply: MessageView, most = 160): string {
  const asked = reply.tools.map((tool) => `→ ${tool.name}(${firstWords(tool.arguments.text, 80)})`).join("  ");
  const said = firstWords(reply.text.text, most);
  return [said, asked].filter(Boolean).join("  ");
}

/** A span in a line: what went in and what came out. */
export function spanWords(node: SpanNode): string {
  const went = node.arguments ? firstWords(node.arguments.text, 80) : "";
  if (node.error) return [lastLine(node.error.text), went].filter(Boolean).join("  ← ");
  const came = node.result ? firstWords(node.result.text, 100) : "";
  return [went, came].filter(Boolean).join(" → ");
}

/** What a traceback says in the end: its last line that is not empty or indented. */
export function lastLine(traceback: string): string {
  const lines = traceback.trimEnd().split("\n");
  const said = lines.findLast((line) => /^\S/.test(line) && !line.startsWith("Traceback")) ?? lines.at(-1) ?? "";
  return said.trim();
}

/** How a call stands to the one that it continues, if that is worth a mark. */
export function parting(call: Pick<CallNode, "relation" | "parted_at">): string {
  const at = call.parted_at === null ? "" : ` at token ${number(call.parted_at)}`;
  if (call.relation === "fork") return `fork${at}`;
  if (call.relation === "edit") return `edit${at}`;
  return "";
}

export function relationSentence(call: Pick<CallNode, "relation" | "parted_at">, of: string): string {
  const at = call.parted_at === null ? "" : number(call.parted_at);
  if (call.relation === "extension") return `Goes on where ${of} ended: the same tokens, and more.`;
  if (call.relation === "fork")
    return `A branch: ${of} was continued before, in another way.${at && ` They part at token ${at}.`}`;
  if (call.relation === "edit")
    return `The agent changed what had been said: ${at && `from token ${at} on `}its prompt differs from ${of}.`;
  return "A new conversation: its prompt has no earlier call's tokens before it.";
}

export function weighted(rewards: readonly RewardView[]): number {
  return rewards.reduce((sum, reward) => sum + reward.weight * reward.value, 0);
}

export function versionWords(versions: readonly number[]): string {
  const [low, high] = [versions[0], versions.at(-1)];
  if (low === undefined) return "";
  return low === high ? `v${low}` : `v${low}–${high}`;
}

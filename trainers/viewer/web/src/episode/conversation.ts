import type { CallNode, MessageView, SpanNode } from "../records";
import type { TreeNode } from "./tree";

/** A piece of the whole episode read as a talk. */
export type Turn =
  | { kind: "said"; key: string; call: CallNode; message: MessageView }
  | { kind: "reply"; key: string; call: CallNode; message: MessageView }
  | { kind: "event"; key: string; span: SpanNode };

/** Everything that was said, in order of time; tools and handoffs appear where they began. */
export function turnsOf(nodes: readonly TreeNode[]): Turn[] {
  const ordered = nodes
    .map((node, at) => ({ node, at }))
    .filter(({ node }) => node.type === "call" || node.kind === "tool" || node.kind === "handoff" || node.error)
    .sort((one, other) => one.node.started_at - other.node.started_at || one.at - other.at);
  return ordered.flatMap(({ node }): Turn[] => {
    if (node.type === "span") return [{ kind: "event", key: node.id, span: node }];
    const said = node.news.map((message, at): Turn => ({ kind: "said", key: `${node.id} ${at}`, call: node, message }));
    return [...said, { kind: "reply", key: node.id, call: node, message: node.reply }];
  });
}

import type { CallNode, SpanNode } from "../records";

/** An episode as rows: nodes come depth first, so a node's descendants are those after it that lie deeper. */
export type TreeNode = SpanNode | CallNode;

export interface Row {
  node: TreeNode;
  /** Whether there is anything to fold away. */
  parent: boolean;
  /** Nodes that are folded away below it. */
  hidden: number;
  /** Whether one of those has an error. */
  hiddenError: boolean;
}

/** What is to be seen while the nodes in `folded` are closed. */
export function visibleRows(nodes: readonly TreeNode[], folded: ReadonlySet<string>): Row[] {
  const rows: Row[] = [];
  let at = 0;
  while (at < nodes.length) {
    const node = nodes[at] as TreeNode;
    const end = endOf(nodes, at);
    const closed = folded.has(node.id);
    const below = closed ? nodes.slice(at + 1, end) : [];
    rows.push({ node, parent: end > at + 1, hidden: below.length, hiddenError: below.some(failed) });
    at = closed ? end : at + 1;
  }
  return rows;
}

/** The place after the last descendant of the node at `at`. */
export function endOf(nodes: readonly TreeNode[], at: number): number {
  const depth = nodes[at]?.depth ?? 0;
  let end = at + 1;
  while (end < nodes.length && (nodes[end] as TreeNode).depth > depth) end += 1;
  return end;
}

/** Ids of the nodes in which `id` lies, the nearest first. */
export function ancestors(nodes: readonly TreeNode[], id: string): string[] {
  const at = nodes.findIndex((node) => node.id === id);
  const found: string[] = [];
  let depth = nodes[at]?.depth ?? 0;
  for (let above = at - 1; above >= 0 && depth > 0; above -= 1) {
    const node = nodes[above] as TreeNode;
    if (node.depth < depth) {
      found.push(node.id);
      depth = node.depth;
    }
  }
  return found;
}

/** Open what hides `id`. */
export function revealing(nodes: readonly TreeNode[], folded: ReadonlySet<string>, id: string): ReadonlySet<string> {
  const hiding = ancestors(nodes, id).filter((each) => folded.has(each));
  if (hiding.length === 0) return folded;
  const next = new Set(folded);
  for (const each of hiding) next.delete(each);
  return next;
}

/** The next node after `id`, from the beginning again after the last, of which `wanted` is true; null if it is of none. */
export function nextWhere(
  nodes: readonly TreeNode[],
  id: string | null,
  wanted: (node: TreeNode) => boolean,
): string | null {
  const from = nodes.findIndex((node) => node.id === id);
  for (let step = 1; step <= nodes.length; step += 1) {
    const node = nodes[(from + step) % nodes.length] as TreeNode;
    if (wanted(node)) return node.id;
  }
  return null;
}

export function failed(node: TreeNode): boolean {
  return node.type === "span" ? node.error !== null : node.finish_reason === "abort";
}

export function calls(nodes: readonly TreeNode[]): CallNode[] {
  return nodes.filter((node) => node.type === "call").sort((one, other) => one.index - other.index);
}

/** Agents by name, in the order in which they first called: the place is their colour. */
export function agentsOf(nodes: readonly TreeNode[]): string[] {
  return [...new Set(calls(nodes).map((call) => call.agent))];
}

import { useVirtualizer } from "@tanstack/react-virtual";
import { type ReactNode, useEffect, useMemo, useRef } from "react";
import styles from "./episode.module.css";
import { type Row, type TreeNode, visibleRows } from "./tree";
import { TreeRow } from "./tree-row";

/** Cells beside each node: the time line, or what credit says. */
export interface Aside {
  /** As `grid-template-columns`, behind the node's own. */
  columns: string;
  head: ReactNode;
  cells: (node: TreeNode) => ReactNode;
}

interface Props {
  nodes: TreeNode[];
  agents: string[];
  folded: ReadonlySet<string>;
  selected: string | null;
  pointed: string | null;
  narrow: boolean;
  aside: Aside;
  onSelect: (id: string) => void;
  onFold: (id: string) => void;
  onPoint: (id: string | null) => void;
}

/** All nodes as rows, of which only those in sight are drawn. */
export function TreeList(props: Props) {
  const { nodes, folded, selected, narrow, aside } = props;
  const pane = useRef<HTMLDivElement>(null);
  const rows = useMemo(() => visibleRows(nodes, folded), [nodes, folded]);
  const agentOf = useMemo(
    () => new Map(nodes.map((node) => [node.id, node.type === "span" ? node.name : ""])),
    [nodes],
  );
  const height = narrow ? 46 : 30;
  const virtual = useVirtualizer({
    count: rows.length,
    getScrollElement: () => pane.current,
    estimateSize: () => height,
    overscan: 12,
    paddingStart: 26,
    scrollPaddingStart: 30,
  });
  // biome-ignore lint/correctness/useExhaustiveDependencies: new rows of a running episode must not move what one reads
  useEffect(() => {
    const at = rows.findIndex((row) => row.node.id === selected);
    if (at >= 0) virtual.scrollToIndex(at, { align: "auto" });
  }, [selected]);
  // biome-ignore lint/correctness/useExhaustiveDependencies: rows have another height
  useEffect(() => virtual.measure(), [height]);
  const columns = `minmax(0, 1fr) ${aside.columns}`;
  return (
    <div ref={pane} className={styles.pane}>
      <div
        role="tree"
        aria-label="What happened"
        tabIndex={0}
        aria-activedescendant={selected ? `node-${selected}` : undefined}
        style={{ height: virtual.getTotalSize(), position: "relative", minWidth: "fit-content" }}
      >
        <div className={styles.axis} style={{ gridTemplateColumns: columns }}>
          {aside.head}
        </div>
        {virtual.getVirtualItems().map(({ index, start }) => {
          const row = rows[index] as Row;
          return (
            <TreeRow
              key={row.node.id}
              row={row}
              top={start}
              height={height}
              columns={columns}
              narrow={narrow}
              agent={
                row.node.type === "call" ? props.agents.indexOf(row.node.agent) : props.agents.indexOf(row.node.name)
              }
              within={row.node.parent ? (agentOf.get(row.node.parent) ?? "") : ""}
              selected={row.node.id === selected}
              pointed={row.node.id === props.pointed}
              cells={aside.cells}
              onSelect={props.onSelect}
              onFold={props.onFold}
              onPoint={props.onPoint}
            />
          );
        })}
      </div>
    </div>
  );
}

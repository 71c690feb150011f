import { duration } from "../shared/format";
import styles from "./episode.module.css";
import { type Axis, type Bar, running, type Stretch, seconds, ticks } from "./timeline";
import { failed, type TreeNode } from "./tree";
import type { Aside } from "./tree-list";

/** The time line as cells beside the tree. */
export function timeAside(axis: Axis, bars: Map<string, Bar>, narrow: boolean): Aside {
  const length = axis.end - axis.start;
  const marks = ticks(length);
  return {
    columns: narrow ? "22% 56px" : "30% 72px",
    head: (
      <>
        <span>{narrow ? "" : <Legend />}</span>
        <div className={styles.lane}>
          {marks.map((mark) => (
            <span
              key={mark}
              style={{
                position: "absolute",
                left: `${(mark / length) * 100}%`,
                translate: mark === 0 ? undefined : mark / length > 0.9 ? "-100%" : "-50%",
                lineHeight: "26px",
                whiteSpace: "nowrap",
                display: narrow && mark !== 0 && mark !== marks.at(-1) ? "none" : undefined,
              }}
            >
              {mark === 0 ? "0" : duration(mark)}
            </span>
          ))}
        </div>
        <span className={styles.figure}>took</span>
      </>
    ),
    cells: (node) => {
      const bar = bars.get(node.id);
      return (
        <>
          <div className={styles.lane}>
            {marks.map((mark) => (
              <span key={mark} className={styles.tick} style={{ left: `${(mark / length) * 100}%` }} />
            ))}
            {bar && <Lane node={node} bar={bar} />}
          </div>
          <span className={styles.figure}>{running(node) ? "running" : duration(seconds(node, axis))}</span>
        </>
      );
    },
  };
}

function Lane({ node, bar }: { node: TreeNode; bar: Bar }) {
  const open = running(node) ? styles.open : "";
  if (failed(node)) return <Piece at={bar} look={`${styles.broken} ${open}`} />;
  if (node.type === "call") return <Piece at={bar} look={`${styles.model} ${open}`} />;
  if (node.kind === "tool" && bar.model.length === 0) return <Piece at={bar} look={`${styles.tool} ${open}`} />;
  return (
    <>
      <Piece at={bar} look={`${styles.own} ${open}`} />
      {bar.model.map((at) => (
        <Piece key={`m${at.from}`} at={at} look={styles.model ?? ""} />
      ))}
      {bar.tools.map((at) => (
        <Piece key={`t${at.from}`} at={at} look={styles.tool ?? ""} />
      ))}
    </>
  );
}

function Piece({ at, look }: { at: Stretch; look: string }) {
  return (
    <span
      className={`${styles.bar} ${look}`}
      style={{ left: `${at.from * 100}%`, width: `${(at.to - at.from) * 100}%` }}
    />
  );
}

function Legend() {
  return (
    <>
      <span className={`${styles.legend} ${styles.model}`} />
      model
      <span className={`${styles.legend} ${styles.tool}`} />
      tool
      <span className={`${styles.legend} ${styles.own}`} />
      agent, waiting
    </>
  );
}

import { Badge } from "@mantine/core";
import {
  IconAlertTriangle,
  IconArrowsRightLeft,
  IconChevronDown,
  IconChevronRight,
  IconGitFork,
  IconLink,
  IconMessage2,
  IconPencil,
  IconRobot,
  IconTool,
} from "@tabler/icons-react";
import { memo, type ReactNode } from "react";
import type { CallNode, RewardView } from "../records";
import { number, signed } from "../shared/format";
import { categorical } from "../shared/scales";
import { Visible } from "../shared/written";
import styles from "./episode.module.css";
import type { Row, TreeNode } from "./tree";
import { failed } from "./tree";
import { parting, replyWords, spanWords, versionWords, weighted } from "./words";

interface Props {
  row: Row;
  top: number;
  height: number;
  columns: string;
  narrow: boolean;
  /** Place of its agent among the agents, or -1. */
  agent: number;
  /** Name of the span in which it lies. */
  within: string;
  selected: boolean;
  pointed: boolean;
  cells: (node: TreeNode) => ReactNode;
  onSelect: (id: string) => void;
  onFold: (id: string) => void;
  onPoint: (id: string | null) => void;
}

export const TreeRow = memo(function TreeRow({ row, onSelect, onFold, onPoint, ...props }: Props) {
  const { node } = row;
  const wrong = failed(node);
  const said = node.type === "call" ? replyWords(node.reply) : spanWords(node);
  const words = (
    <span className={`${styles.words} ${wrong ? styles.wrong : ""}`}>
      <Visible text={said} />
    </span>
  );
  return (
    // biome-ignore lint/a11y/useKeyWithClickEvents: the page's keys move the selection
    <div
      id={`node-${node.id}`}
      role="treeitem"
      tabIndex={-1}
      aria-level={node.depth + 1}
      aria-selected={props.selected}
      aria-expanded={row.parent ? row.hidden === 0 : undefined}
      className={`${styles.row} ${props.pointed ? styles.pointed : ""}`}
      style={{ height: props.height, transform: `translateY(${props.top}px)`, gridTemplateColumns: props.columns }}
      onClick={() => onSelect(node.id)}
    >
      <div className={styles.what} style={{ paddingInlineStart: Math.min(node.depth, 12) * (props.narrow ? 10 : 16) }}>
        <Fold row={row} onFold={onFold} />
        <Kind node={node} agent={props.agent} wrong={wrong} />
        <span className={styles.name}>
          <Name node={node} within={props.within} />
        </span>
        {row.hidden > 0 && (
          <span className={`${styles.facts} ${row.hiddenError ? styles.wrong : ""}`}>{number(row.hidden)} within</span>
        )}
        {node.type === "call" && <Parted call={node} onPoint={onPoint} onSelect={onSelect} />}
        {props.narrow ? <span style={{ flex: 1 }} /> : words}
        <RewardSum rewards={node.rewards} />
        {node.type === "call" && !props.narrow && <Facts call={node} />}
      </div>
      {props.cells(node)}
      {props.narrow && said && (
        <div className={styles.second} style={{ paddingInlineStart: Math.min(node.depth, 12) * 10 + 24 }}>
          {words}
        </div>
      )}
    </div>
  );
});

function Fold({ row, onFold }: { row: Row; onFold: (id: string) => void }) {
  if (!row.parent) return <span className={styles.fold} />;
  const Icon = row.hidden ? IconChevronRight : IconChevronDown;
  return (
    // biome-ignore lint/a11y/useKeyWithClickEvents: the left and right keys do the same
    // biome-ignore lint/a11y/noStaticElementInteractions: see above
    <span
      className={styles.fold}
      onClick={(event) => {
        event.stopPropagation();
        onFold(row.node.id);
      }}
    >
      <Icon size={14} aria-hidden />
    </span>
  );
}

const KINDS = {
  agent: IconRobot,
  chain: IconLink,
  tool: IconTool,
  handoff: IconArrowsRightLeft,
  call: IconMessage2,
};

function Kind({ node, agent, wrong }: { node: TreeNode; agent: number; wrong: boolean }) {
  const kind = node.type === "call" ? "call" : node.kind;
  const Icon = wrong && node.type === "span" ? IconAlertTriangle : (KINDS[kind as keyof typeof KINDS] ?? IconLink);
  const colour = wrong ? "var(--mantine-color-red-6)" : agent >= 0 ? categorical(agent) : "var(--mantine-color-dimmed)";
  return <Icon size={15} color={colour} style={{ flex: "none" }} aria-label={wrong ? `${kind}, failed` : kind} />;
}

function Name({ node, within }: { node: TreeNode; within: string }) {
  if (node.type === "span") {
    return (
      <span style={{ fontWeight: node.kind === "agent" ? 600 : 400 }}>
        <Visible text={node.name.slice(0, 120)} />
      </span>
    );
  }
  return (
    <>
      <span style={{ fontVariantNumeric: "tabular-nums" }}>#{node.index}</span>
      {node.agent && node.agent !== within && (
        <>
          {" "}
          <Visible text={node.agent.slice(0, 60)} />
        </>
      )}
    </>
  );
}

/** The mark of a fork or an edit; it shows and opens the call that it parted from. */
function Parted({
  call,
  onPoint,
  onSelect,
}: {
  call: CallNode;
  onPoint: (id: string | null) => void;
  onSelect: (id: string) => void;
}) {
  const words = parting(call);
  if (!words) return null;
  const Icon = call.relation === "fork" ? IconGitFork : IconPencil;
  return (
    <Badge
      component="button"
      type="button"
      size="xs"
      tt="none"
      variant="light"
      color="violet"
      leftSection={<Icon size={11} />}
      style={{ flex: "none", cursor: "pointer" }}
      title="Go to the call that it parted from"
      onMouseEnter={() => onPoint(call.continues)}
      onMouseLeave={() => onPoint(null)}
      onFocus={() => onPoint(call.continues)}
      onBlur={() => onPoint(null)}
      onClick={(event) => {
        event.stopPropagation();
        if (call.continues) onSelect(call.continues);
      }}
    >
      {words}
    </Badge>
  );
}

function RewardSum({ rewards }: { rewards: RewardView[] }) {
  if (rewards.length === 0) return null;
  const names = rewards.map((reward) => `${reward.name} ${number(reward.value)} × ${number(reward.weight)}`).join(", ");
  return (
    <Badge size="xs" tt="none" variant="light" color="yellow" title={names} style={{ flex: "none" }}>
      {signed(weighted(rewards))}
    </Badge>
  );
}

function Facts({ call }: { call: CallNode }) {
  const facts = [
    call.upstream && "other model",
    `${number(call.sampled_tokens)} tok`,
    call.mean_logprob?.toFixed(2),
    versionWords(call.versions),
  ];
  return (
    <span className={styles.facts} title="sampled tokens, their mean log-prob, policy version">
      {facts.filter(Boolean).join(" · ")}
    </span>
  );
}

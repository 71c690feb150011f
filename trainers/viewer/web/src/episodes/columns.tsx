import type { ReactNode } from "react";
import { href } from "../address";
import type { EpisodeRow, Range } from "../records";
import { duration, number, time, words } from "../shared/format";
import { OutcomeBadge } from "../shared/outcome";
import { diverging } from "../shared/scales";
import { Visible } from "../shared/written";
import classes from "./episodes.module.css";
import { heat } from "./rows";

export interface Column {
  key: string;
  label: string;
  /** In pixels; 0 for the one that has what is left. */
  width: number;
  /** The name to sort by; none where there is no order. */
  sort?: string;
  numeric?: boolean;
  /** What an empty cell under the pointer, or a short one, says in full. */
  title?: (row: EpisodeRow) => string;
  background?: (row: EpisodeRow) => string | undefined;
  cell: (row: EpisodeRow) => ReactNode;
}

/** Names are somebody else's: they may be of any length. */
const LONGEST = 160;

export function Name({ text }: { text: string }) {
  return <Visible text={text.length > LONGEST ? `${text.slice(0, LONGEST)}…` : text} all={false} />;
}

export function columnsOf(run: string, rewards: Record<string, Range>): Column[] {
  const figure = (key: "step" | "calls" | "tokens", width: number): Column => ({
    key,
    label: key,
    width,
    sort: key,
    numeric: true,
    cell: (row) => number(row[key]),
  });
  return [
    { key: "task", label: "task", width: 0, sort: "task", title: (row) => row.task, cell: () => null },
    {
      key: "sample",
      label: "sample",
      width: 74,
      sort: "sample",
      numeric: true,
      title: (row) =>
        `sample ${row.sample}${row.attempt ? `, attempt ${row.attempt + 1}` : ""}${row.group ? `: the group ${row.group}` : ""}`,
      cell: (row) => <SampleLink run={run} row={row} />,
    },
    { key: "phase", label: "phase", width: 82, sort: "phase", cell: (row) => <Name text={row.phase} /> },
    figure("step", 60),
    {
      key: "outcome",
      label: "outcome",
      width: 176,
      sort: "outcome",
      cell: (row) => <OutcomeBadge outcome={row.outcome} counted={row.counted} short />,
    },
    ...Object.entries(rewards).map(([name, range]) => rewardColumn(name, range)),
    figure("calls", 64),
    figure("tokens", 76),
    {
      key: "agents",
      label: "agents",
      width: 132,
      title: (row) => row.agents.join(", "),
      cell: (row) => <Name text={row.agents.join(", ")} />,
    },
    {
      key: "versions",
      label: "version",
      width: 72,
      numeric: true,
      title: () => "policy versions that sampled it",
      cell: ({ versions: [low, high] }) =>
        low === undefined ? "" : high === undefined || low === high ? number(low) : `${low}–${high}`,
    },
    {
      key: "started",
      label: "started",
      width: 122,
      sort: "started_at",
      numeric: true,
      title: (row) => `${time(row.started_at)} UTC`,
      cell: (row) => time(row.started_at).slice(5),
    },
    {
      key: "seconds",
      label: "took",
      width: 92,
      sort: "seconds",
      numeric: true,
      cell: (row) => (row.seconds === null ? "" : duration(row.seconds)),
    },
  ];
}

function rewardColumn(name: string, range: Range): Column {
  return {
    key: `reward.${name}`,
    label: words(name),
    width: Math.min(Math.max(72, 32 + 7 * name.length), 140),
    sort: `reward.${name}`,
    numeric: true,
    title: (row) => `${name}: ${row.rewards[name] ?? "none"}`,
    background: (row) => {
      const value = row.rewards[name];
      return value === undefined ? undefined : diverging(heat(value, range) * 0.7, 1);
    },
    cell: (row) => (row.rewards[name] === undefined ? "" : number(row.rewards[name])),
  };
}

function SampleLink({ run, row }: { run: string; row: EpisodeRow }) {
  const label = row.attempt ? `${row.sample}·${row.attempt}` : `${row.sample}`;
  if (!row.group) return label;
  return (
    <a className={classes.inner} href={href("run", run, "group", row.group)} tabIndex={-1}>
      {label}
    </a>
  );
}

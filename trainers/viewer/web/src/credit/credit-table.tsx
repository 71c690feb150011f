import { Anchor, Loader, Tooltip } from "@mantine/core";
import { IconChevronDown, IconChevronRight, IconGitFork, IconPencil } from "@tabler/icons-react";
import { useVirtualizer } from "@tanstack/react-virtual";
import { memo, type ReactNode, useEffect, useRef } from "react";
import { href } from "../address";
import { parting } from "../episode/words";
import type { CallFacts, RolloutFacts, RuleCredit } from "../records";
import { number, signed } from "../shared/format";
import { categorical, diverging } from "../shared/scales";
import { Visible } from "../shared/written";
import type { Column } from "./columns";
import styles from "./credit.module.css";
import { Advantage, fixed, Trained } from "./given";
import { ruleSentence } from "./rules";
import { difference, differenceOf, type Line, ofRollout, tokensOf } from "./table";

export interface Scale {
  /** Whether the other rules' columns show by how much they are above the own rule. */
  apart: boolean;
  /** Where colours are full: of advantages, and of differences. */
  largest: number;
  farthest: number;
}

interface Props {
  run: string;
  lines: Line[];
  own: RuleCredit;
  others: Column[];
  agents: string[];
  scale: Scale;
  selected: string | null;
  narrow: boolean;
  onSelect: (key: string) => void;
  onFold: (episode: string) => void;
}

const HEAD = 42;

/** Rollouts and their calls as rows, what each rule gave as columns; only rows in sight are drawn, and the first column stays. */
export function CreditTable(props: Props) {
  const { lines, own, others, selected, narrow, scale } = props;
  const pane = useRef<HTMLDivElement>(null);
  const height = narrow ? 34 : 28;
  const virtual = useVirtualizer({
    count: lines.length,
    getScrollElement: () => pane.current,
    estimateSize: () => height,
    overscan: 12,
    paddingStart: HEAD,
    scrollPaddingStart: HEAD + height,
  });
  // biome-ignore lint/correctness/useExhaustiveDependencies: only a choice moves what one reads, not new rows
  useEffect(() => {
    const at = lines.findIndex((line) => line.key === selected);
    if (at >= 0) virtual.scrollToIndex(at, { align: "auto" });
  }, [selected]);
  // biome-ignore lint/correctness/useExhaustiveDependencies: rows have another height
  useEffect(() => virtual.measure(), [height]);
  const columns = columnsFor(others.length, narrow);
  return (
    <div ref={pane} className={styles.pane}>
      <table
        // biome-ignore lint/a11y/noNoninteractiveElementToInteractiveRole: rows open, and are chosen
        role="treegrid"
        aria-label="Credit by call"
        aria-rowcount={lines.length + 1}
        tabIndex={0}
        aria-activedescendant={selected ? `line-${selected}` : undefined}
        className={styles.table}
        style={{ height: virtual.getTotalSize() }}
      >
        <thead>
          <Heads own={own} others={others} apart={scale.apart} narrow={narrow} columns={columns} />
        </thead>
        <tbody>
          {virtual.getVirtualItems().map(({ index, start }) => {
            const line = lines[index] as Line;
            return (
              <Row
                key={line.key}
                run={props.run}
                line={line}
                index={index}
                start={start}
                height={height}
                columns={columns}
                own={own}
                others={others}
                agents={props.agents}
                scale={scale}
                narrow={narrow}
                selected={line.key === selected}
                onSelect={props.onSelect}
                onFold={props.onFold}
              />
            );
          })}
        </tbody>
      </table>
    </div>
  );
}

interface RowProps extends Omit<Props, "lines" | "selected"> {
  line: Line;
  index: number;
  start: number;
  height: number;
  columns: string;
  selected: boolean;
}

const Row = memo(function Row(props: RowProps) {
  const { line } = props;
  return (
    <tr
      id={`line-${line.key}`}
      tabIndex={-1}
      aria-rowindex={props.index + 2}
      aria-level={line.kind === "rollout" ? 1 : 2}
      aria-expanded={line.kind === "rollout" ? !line.folded : undefined}
      aria-selected={props.selected}
      className={styles.line}
      style={{
        height: props.height,
        transform: `translateY(${props.start}px)`,
        gridTemplateColumns: props.columns,
      }}
      onClick={() => props.onSelect(line.key)}
    >
      {line.kind === "rollout" ? (
        <RolloutCells {...props} rollout={line.rollout} folded={line.folded} />
      ) : (
        <CallCells {...props} call={line.call} depth={line.depth} />
      )}
    </tr>
  );
});

/** As `grid-template-columns`. On a phone there is room for what the page is about; the rest stands in the drawer. */
function columnsFor(others: number, narrow: boolean): string {
  return narrow
    ? `8rem 3rem 5rem${" 5rem".repeat(others)}`
    : `minmax(14rem, 1fr) minmax(8rem, 0.6fr) 4rem 4.5rem 6.5rem 5.5rem${" 6.5rem".repeat(others)}`;
}

function Heads({
  own,
  others,
  apart,
  narrow,
  columns,
}: {
  own: RuleCredit;
  others: Column[];
  apart: boolean;
  narrow: boolean;
  columns: string;
}) {
  return (
    <tr className={styles.head} aria-rowindex={1} style={{ gridTemplateColumns: columns }}>
      <th scope="col" className={styles.first}>
        rollout, call
      </th>
      {!narrow && <th scope="col">earned there</th>}
      {!narrow && <Head>sampled</Head>}
      <Head>return</Head>
      <Head rule={own.rule}>advantage</Head>
      {!narrow && <Head>trained</Head>}
      {others.map((column) => (
        <Head key={column.rule} rule={column.rule}>
          {apart ? `less ${own.rule}` : "advantage"}
        </Head>
      ))}
    </tr>
  );
}

function Head({ rule, children }: { rule?: string; children: ReactNode }) {
  return (
    <Tooltip label={rule && ruleSentence(rule)} disabled={!rule} multiline maw={320}>
      <th scope="col" className={styles.figure} style={{ fontSize: 11 }}>
        {rule && <span className={styles.rule}>{rule}</span>}
        {children}
      </th>
    </Tooltip>
  );
}

function RolloutCells({
  run,
  rollout,
  folded,
  own,
  others,
  scale,
  narrow,
  onFold,
}: RowProps & { rollout: RolloutFacts; folded: boolean }) {
  const Icon = folded ? IconChevronRight : IconChevronDown;
  const { trained, sampled } = tokensOf(rollout, own);
  return (
    <>
      <th scope="row" className={styles.first}>
        {/* biome-ignore lint/a11y/useKeyWithClickEvents: the left and right keys do the same */}
        {/* biome-ignore lint/a11y/noStaticElementInteractions: see above */}
        <span
          className={styles.fold}
          onClick={(event) => {
            event.stopPropagation();
            onFold(rollout.episode);
          }}
        >
          <Icon size={14} aria-hidden />
        </span>
        <Anchor
          className={styles.cut}
          size="sm"
          fw={600}
          title={rollout.episode}
          href={href("run", run, "episode", rollout.episode)}
        >
          sample {rollout.sample}
        </Anchor>
        {!narrow && (
          <span className={styles.side}>
            {number(rollout.calls.length)} {rollout.calls.length === 1 ? "call" : "calls"}
          </span>
        )}
      </th>
      {!narrow && <Earned rewards={rollout.outcome_rewards} />}
      {!narrow && <Cell>{number(sampled)}</Cell>}
      <Cell>
        <strong>{number(rollout.ret)}</strong>
      </Cell>
      <Mean value={ofRollout(rollout, own).advantage} largest={scale.largest} missing={own.unknown} />
      {!narrow && <Cell>{own.unknown ? "?" : `${number(trained)} tok`}</Cell>}
      {others.map((column) =>
        column.credit === null ? (
          <Absent key={column.rule} column={column} first />
        ) : scale.apart ? (
          <Mean
            key={column.rule}
            value={differenceOf(rollout, column.credit, own)}
            largest={scale.farthest}
            missing={column.missing || own.unknown}
          />
        ) : (
          <Mean
            key={column.rule}
            value={ofRollout(rollout, column.credit).advantage}
            largest={scale.largest}
            missing={column.missing}
          />
        ),
      )}
    </>
  );
}

function CallCells({
  run,
  call,
  depth,
  own,
  others,
  agents,
  scale,
  narrow,
}: RowProps & { call: CallFacts; depth: number }) {
  const given = own.calls[call.id];
  const Icon = call.relation === "fork" ? IconGitFork : IconPencil;
  return (
    <>
      <th scope="row" className={styles.first} style={{ paddingInlineStart: 28 + Math.min(depth, 6) * 12 }}>
        <Anchor size="xs" href={href("run", run, "call", call.id)} style={{ flex: "none" }} title="Its tokens">
          #{call.index}
        </Anchor>
        {call.agent && (
          <span className={styles.cut} title={call.agent.slice(0, 300)}>
            <span style={{ color: categorical(Math.max(agents.indexOf(call.agent), 0)) }} aria-hidden>
              ●
            </span>{" "}
            <Visible text={call.agent.slice(0, 60)} />
          </span>
        )}
        {parting(call) && (
          <span className={styles.side} title={parting(call)}>
            <Icon size={12} aria-hidden style={{ verticalAlign: "-2px" }} /> {!narrow && call.relation}
          </span>
        )}
      </th>
      {!narrow && <Earned rewards={call.rewards} />}
      {!narrow && <Cell>{number(call.sampled)}</Cell>}
      <Cell>{given ? number(given.ret) : ""}</Cell>
      <td className={styles.cell}>
        <Advantage given={given} unknown={own.unknown} largest={scale.largest} />
      </td>
      {!narrow && <Cell>{given ? <Trained facts={call} given={given} /> : ""}</Cell>}
      {others.map((column) => {
        const other = column.credit?.calls[call.id];
        if (column.credit === null) return <Absent key={column.rule} column={column} />;
        return scale.apart ? (
          <Mean
            key={column.rule}
            value={difference(other, given)}
            largest={scale.farthest}
            missing={column.missing || own.unknown}
          />
        ) : (
          <td key={column.rule} className={styles.cell}>
            <Advantage given={other} unknown={column.missing} largest={scale.largest} />
          </td>
        );
      })}
    </>
  );
}

/** Rewards by name, weighted. */
function Earned({ rewards }: { rewards: Record<string, number> }) {
  const entries = Object.entries(rewards);
  const text = entries.map(([name, value]) => `${name} ${signed(value)}`).join(", ");
  return (
    <td className={styles.earned} title={text.slice(0, 500)}>
      {entries.map(([name, value], at) => (
        <span key={name} className={value === 0 ? styles.faint : undefined}>
          {at > 0 && ", "}
          <Visible text={name.slice(0, 60)} /> {signed(value)}
        </span>
      ))}
    </td>
  );
}

function Cell({ children }: { children: ReactNode }) {
  return <td className={styles.figure}>{children}</td>;
}

/** A number on its colour; a question mark where it cannot be known, a dash where there is nothing. */
function Mean({ value, largest, missing }: { value: number | null; largest: number; missing: string }) {
  if (value === null) {
    return (
      <td className={`${styles.figure} ${styles.faint}`} title={missing || undefined}>
        {missing ? "?" : "–"}
      </td>
    );
  }
  return (
    <td className={styles.figure} style={{ background: diverging(value, largest) }}>
      {fixed(value)}
    </td>
  );
}

/** A rule that has not answered, or could not. */
function Absent({ column, first = false }: { column: Column; first?: boolean }) {
  if (column.missing) return <Mean value={null} largest={0} missing={column.missing} />;
  return (
    <td className={`${styles.figure} ${styles.faint}`}>
      {first ? <Loader size={12} type="dots" aria-label="being computed" /> : "…"}
    </td>
  );
}

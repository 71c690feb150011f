import { IconArrowDown, IconArrowUp } from "@tabler/icons-react";
import type { VirtualItem } from "@tanstack/react-virtual";
import { memo } from "react";
import { href, type Query } from "../address";
import type { EpisodeRow } from "../records";
import { duration, number, several } from "../shared/format";
import { OutcomeBadge } from "../shared/outcome";
import { type Column, Name } from "./columns";
import classes from "./episodes.module.css";
import { type Filters, nextSort } from "./filters";

export const ROW = 30;
export const CARD = 56;

export interface Shown {
  run: string;
  columns: Column[];
  items: VirtualItem[];
  /** Height of all rows. */
  height: number;
  matched: number;
  selected: number;
  at: (index: number) => EpisodeRow | undefined;
  choose: (index: number) => void;
}

/** The rows that can be seen, in a table as high as if all were there. */
export function Table({ filters, sort, ...shown }: Shown & { filters: Filters; sort: (query: Query) => void }) {
  const { columns, items, height, matched } = shown;
  const before = items[0] ? items[0].start - ROW : 0;
  const after = height - (items.at(-1)?.end ?? ROW) + ROW;
  const width = columns.reduce((sum, column) => sum + (column.width || 190), 0);
  return (
    <table className={classes.table} style={{ minWidth: width }} aria-rowcount={matched + 1}>
      <colgroup>
        {columns.map(({ key, width }) => (
          <col key={key} style={{ width: width || undefined }} />
        ))}
      </colgroup>
      <thead>
        <tr aria-rowindex={1}>
          {columns.map((column) => (
            <Head key={column.key} column={column} filters={filters} sort={sort} />
          ))}
        </tr>
      </thead>
      <tbody>
        <Space height={before} />
        {items.map(({ index }) => (
          <Row
            key={index}
            index={index}
            run={shown.run}
            row={shown.at(index)}
            columns={columns}
            selected={index === shown.selected}
            choose={shown.choose}
          />
        ))}
        <Space height={after} />
      </tbody>
    </table>
  );
}

function Space({ height }: { height: number }) {
  return height > 0 ? <tr aria-hidden style={{ height }} /> : null;
}

function Head({ column, filters, sort }: { column: Column; filters: Filters; sort: (query: Query) => void }) {
  const { sort: name, label, numeric = false } = column;
  if (name === undefined) {
    return (
      <th scope="col" className={`${classes.head} ${classes.plain} ${numeric ? classes.numeric : ""}`}>
        {label}
      </th>
    );
  }
  const active = filters.sort === name;
  const Arrow = filters.descending ? IconArrowDown : IconArrowUp;
  return (
    <th
      scope="col"
      className={classes.head}
      aria-sort={active ? (filters.descending ? "descending" : "ascending") : undefined}
    >
      <button
        type="button"
        className={`${classes.sorter} ${numeric ? classes.numeric : ""}`}
        title={`sort by ${label}`}
        onClick={() => sort(nextSort(filters, name, numeric))}
      >
        {active && numeric && <Arrow size={12} aria-hidden />}
        <span>{label}</span>
        {active && !numeric && <Arrow size={12} aria-hidden />}
      </button>
    </th>
  );
}

interface RowProps {
  run: string;
  index: number;
  row: EpisodeRow | undefined;
  columns: Column[];
  selected: boolean;
  choose: (index: number) => void;
}

const Row = memo(function Row({ run, index, row, columns, selected, choose }: RowProps) {
  return (
    <tr className={classes.row} aria-rowindex={index + 2} aria-current={selected || undefined}>
      {columns.map((column, at) => (
        <td
          key={column.key}
          className={column.numeric ? classes.numeric : undefined}
          title={row && column.title?.(row)}
          style={{ background: row && column.background?.(row) }}
        >
          {row === undefined ? (
            at === 0 && <span className={classes.bone} />
          ) : column.key === "task" ? (
            <a
              className={classes.open}
              href={href("run", run, "episode", row.id)}
              tabIndex={selected ? 0 : -1}
              onClick={() => choose(index)}
            >
              <Name text={row.task} />
            </a>
          ) : (
            column.cell(row)
          )}
        </td>
      ))}
    </tr>
  );
});

/** The same on a phone: two lines an episode. */
export function Cards({ run, columns, items, height, selected, at, choose }: Shown) {
  const rewards = columns.filter(({ background }) => background !== undefined);
  return (
    <div className={classes.list} style={{ height }}>
      {items.map(({ index, start }) => {
        const row = at(index);
        const place = { transform: `translateY(${start}px)`, height: CARD };
        if (!row) {
          return (
            <div key={index} className={classes.card} style={place}>
              <span className={classes.bone} />
            </div>
          );
        }
        return (
          <a
            key={index}
            className={classes.card}
            style={place}
            href={href("run", run, "episode", row.id)}
            aria-current={index === selected || undefined}
            onClick={() => choose(index)}
          >
            <span className={classes.line}>
              <span className={classes.grow}>
                <Name text={row.task} />
              </span>
              {rewards
                .filter(({ cell }) => cell(row) !== "")
                .slice(0, 2)
                .map((column) => (
                  <span
                    key={column.key}
                    className={`${classes.small} ${classes.value}`}
                    style={{ background: column.background?.(row) }}
                  >
                    {column.label} {column.cell(row)}
                  </span>
                ))}
            </span>
            <span className={`${classes.line} ${classes.small}`}>
              <OutcomeBadge outcome={row.outcome} counted={row.counted} short />
              <span>
                <Name text={row.phase} /> {number(row.step)} · #{row.sample}
              </span>
              <span className={`${classes.grow} ${classes.end}`}>
                {several(row.calls, "call")} · {number(row.tokens)} tok
                {row.seconds !== null && ` · ${duration(row.seconds)}`}
              </span>
            </span>
          </a>
        );
      })}
    </div>
  );
}

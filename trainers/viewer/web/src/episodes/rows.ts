import type { EpisodeRow, Range } from "../records";

/** Which rows are asked for together, and how the table moves through rows that are not all here. */

export const PAGE = 100;

/** Offsets of the pages that hold rows `first` to `last`, and of the next one if its rows are near. */
export function pagesFor(first: number, last: number, matched: number): number[] {
  const near = Math.min(last + PAGE / 4, Math.max(matched - 1, 0));
  const offsets: number[] = [];
  for (let at = pageOf(Math.max(first, 0)); at <= near || offsets.length === 0; at += PAGE) offsets.push(at);
  return offsets;
}

export function pageOf(index: number): number {
  return Math.floor(index / PAGE) * PAGE;
}

export const MOVES = ["up", "down", "page up", "page down", "first", "last"] as const;
export type Move = (typeof MOVES)[number];

/** Where a move from `index` (-1: nothing is selected) leads in `count` rows, of which `screen` are seen at once. */
export function moved(index: number, move: Move, count: number, screen: number): number {
  const to = {
    up: index - 1,
    down: index + 1,
    "page up": index - screen,
    "page down": Math.max(index, 0) + screen,
    first: 0,
    last: count - 1,
  }[move];
  return Math.max(0, Math.min(to, count - 1));
}

/** Where an episode is now, given where it was: in a live run rows come and move others down. */
export function whereabouts(id: string, was: number, pages: ReadonlyMap<number, readonly EpisodeRow[]>): number {
  if (pages.get(pageOf(was))?.[was % PAGE]?.id === id) return was;
  for (const [offset, rows] of pages) {
    const at = rows.findIndex((row) => row.id === id);
    if (at >= 0) return offset + at;
  }
  return was;
}

/** Rows in order, as the server would have them: those without a value last. For a page that has no server. */
export function sortRows(rows: readonly EpisodeRow[], sort: string, descending: boolean): EpisodeRow[] {
  const valued = rows.map((row) => ({ row, value: sortValue(row, sort) }));
  return valued.sort((one, other) => compare(one.value, other.value, descending)).map(({ row }) => row);
}

type Value = number | string | null;

function compare(one: Value, other: Value, descending: boolean): number {
  if (one === null || other === null) return (one === null ? 1 : 0) - (other === null ? 1 : 0);
  const order = one < other ? -1 : one > other ? 1 : 0;
  return descending ? -order : order;
}

function sortValue(row: EpisodeRow, sort: string): Value {
  if (sort.startsWith("reward.")) return row.rewards[sort.slice(7)] ?? null;
  const value = row[sort as keyof EpisodeRow];
  if (typeof value === "number" || typeof value === "string") return value;
  if (typeof value === "boolean") return Number(value);
  return null;
}

/** What values rewards have in some rows, by name. */
export function rewardRanges(rows: readonly EpisodeRow[]): Record<string, Range> {
  const ranges: Record<string, Range> = {};
  for (const row of rows) {
    for (const [name, value] of Object.entries(row.rewards)) {
      const known = ranges[name];
      ranges[name] = {
        low: Math.min(known?.low ?? value, value),
        high: Math.max(known?.high ?? value, value),
      };
    }
  }
  return ranges;
}

/** How good a reward is among those of its name, from -1 to 1; 0 where all are the same. */
export function heat(value: number, range: Range | undefined): number {
  if (!range || range.high <= range.low) return 0;
  return Math.max(-1, Math.min(1, (2 * (value - range.low)) / (range.high - range.low) - 1));
}

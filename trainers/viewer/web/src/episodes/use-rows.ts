import { useQueries, useQueryClient } from "@tanstack/react-query";
import { useEffect, useMemo, useRef } from "react";
import { type Query, queryText } from "../address";
import type { EpisodePage, EpisodeRow, Indexing } from "../records";
import { fetchJson, isFile, mayRecover, ofRun, RETRY, type SourceError, useAnswer } from "../source";
import { PAGE, pageOf, sortRows } from "./rows";

/** The rows that a query matches, as far as they are here. */
export interface Rows {
  at: (index: number) => EpisodeRow | undefined;
  pages: ReadonlyMap<number, readonly EpisodeRow[]>;
  matched: number;
  total: number;
  revision: number;
  indexing: Indexing;
  /** Whether these are the rows of an earlier query, shown until those of this one are here. */
  earlier: boolean;
  error: SourceError | null;
}

/** Milliseconds after which rows are asked for again: of a run that goes on, and of any, which somebody may still write to. */
const LIVE = 2_000;
const IDLE = 20_000;

/** Pages of rows from the server: those at `offsets` are kept up to date, others are shown as they were a minute ago at most. */
function useServerRows(run: string, query: Query, offsets: readonly number[], live: boolean): Rows | null {
  const client = useQueryClient();
  const path = ofRun(run, "episodes");
  const name = queryText(query);
  const keyOf = (offset: number) => ["episodes", path, name, offset];
  const answers = useQueries({
    queries: offsets.map((offset) => ({
      queryKey: keyOf(offset),
      queryFn: ({ signal }: { signal: AbortSignal }) =>
        fetchJson<EpisodePage>(path, { ...query, offset, limit: PAGE }, signal),
      refetchInterval: ({
        state: { data, error },
      }: {
        state: { data: EpisodePage | undefined; error: Error | null };
      }) => (mayRecover(error) ? RETRY : live || (data && data.indexing.done < data.indexing.total) ? LIVE : IDLE),
      staleTime: live ? LIVE : IDLE,
    })),
  });
  const latest = answers.reduce<(typeof answers)[number] | undefined>(
    (best, each) => (each.data && (!best || each.dataUpdatedAt > best.dataUpdatedAt) ? each : best),
    undefined,
  );
  const error = answers.find((each) => each.error)?.error as SourceError | undefined;
  const before = useRef<Rows | null>(null);
  const page = latest?.data;
  const pages = new Map<number, readonly EpisodeRow[]>();
  answers.forEach(({ data }, at) => {
    if (data) pages.set(offsets[at] ?? 0, data.rows);
  });
  const rows: Rows | null = page
    ? {
        at: (index) => {
          const offset = pageOf(index);
          const known = pages.get(offset) ?? client.getQueryData<EpisodePage>(keyOf(offset))?.rows;
          return known?.[index - offset];
        },
        pages,
        matched: page.matched,
        total: page.total,
        revision: page.revision,
        indexing: page.indexing,
        earlier: false,
        error: error ?? null,
      }
    : null;
  useEffect(() => {
    if (rows) before.current = rows;
  });
  if (rows) return rows;
  const shown = before.current ?? (error ? NONE : null);
  return shown && { ...shown, earlier: true, error: error ?? null };
}

const NONE: Rows = {
  at: () => undefined,
  pages: new Map(),
  matched: 0,
  total: 0,
  revision: 0,
  indexing: { done: 0, total: 0 },
  earlier: true,
  error: null,
};

/** All rows that a file holds, put in order here. */
function useFileRows(run: string, query: Query): Rows | null {
  const { data, error } = useAnswer<EpisodePage>(ofRun(run, "episodes"));
  const { sort, descending } = query;
  const sorted = useMemo(
    () => data && sortRows(data.rows, typeof sort === "string" ? sort : "started_at", descending !== false),
    [data, sort, descending],
  );
  if (!data || !sorted) return error ? { ...NONE, error } : null;
  return {
    at: (index) => sorted[index],
    pages: new Map([[0, sorted]]),
    matched: sorted.length,
    total: data.total,
    revision: data.revision,
    indexing: data.indexing,
    earlier: false,
    error: null,
  };
}

export const useRows: typeof useServerRows = isFile ? useFileRows : useServerRows;

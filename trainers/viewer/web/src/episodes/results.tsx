import { Button } from "@mantine/core";
import { useVirtualizer } from "@tanstack/react-virtual";
import { useCallback, useEffect, useLayoutEffect, useRef, useState } from "react";
import { go, href, type Query } from "../address";
import { useKeys } from "../shared/keys";
import { Nothing } from "../shared/states";
import { isFile } from "../source";
import type { Column } from "./columns";
import classes from "./episodes.module.css";
import { type Active, cleared, type Filters, sortQuery } from "./filters";
import { type Place, remember } from "./place";
import { type Move, moved, pagesFor, whereabouts } from "./rows";
import { CARD, Cards, ROW, Table } from "./table";
import type { Rows } from "./use-rows";

interface Props {
  run: string;
  live: boolean;
  /** The query as text. */
  name: string;
  filters: Filters;
  active: Active[];
  columns: Column[];
  rows: Rows;
  phone: boolean;
  /** Where somebody was when they left this query. */
  place: Place | null;
  /** Tells which pages are looked at. */
  look: (offsets: number[]) => void;
  apply: (changes: Query) => void;
  search: () => void;
}

const NOWHERE = { index: -1, id: "" };

/** The rows, of which a screenful is in the page, and the one that is selected. */
export function Results({ run, name, filters, columns, rows, phone, place, look, apply, ...props }: Props) {
  const scroll = useRef<HTMLDivElement>(null);
  const [selected, select] = useState(place ? { index: place.index, id: place.id } : NOWHERE);
  const size = phone ? CARD : ROW;
  const head = phone ? 0 : ROW;
  const virtualizer = useVirtualizer({
    count: rows.matched,
    getScrollElement: () => scroll.current,
    estimateSize: () => size,
    overscan: 12,
    scrollMargin: head,
    scrollPaddingStart: head,
  });
  // biome-ignore lint/correctness/useExhaustiveDependencies: heights are asked for again when they have changed
  useLayoutEffect(() => virtualizer.measure(), [size]);

  useSettled(rows.earlier ? null : name, (first) => {
    const element = scroll.current;
    if (!element) return;
    if (first && place) element.scrollTop = place.index * size - element.clientHeight / 2;
    if (!first) {
      element.scrollTop = 0;
      select(NOWHERE);
    }
  });
  useAnchor(scroll, rows, size, name);
  useLayoutEffect(() => {
    if (rows.earlier || selected.index < 0) return;
    const index = selected.id ? whereabouts(selected.id, selected.index, rows.pages) : selected.index;
    const id = selected.id || (rows.at(index)?.id ?? "");
    if (index !== selected.index || id !== selected.id) select({ index, id });
  });

  const items = virtualizer.getVirtualItems();
  const current = rows.at(selected.index);
  const [moves, setMoves] = useState(0);
  const reached = current !== undefined && items.some(({ index }) => index === selected.index);
  const wanted = pagesFor(items[0]?.index ?? 0, items.at(-1)?.index ?? 0, rows.matched).join();
  useEffect(() => {
    if (rows.earlier || items.length === 0) return;
    const later = setTimeout(() => look(wanted.split(",").map(Number)), REST);
    return () => clearTimeout(later);
  }, [rows.earlier, items.length, wanted, look]);

  const choose = useCallback(
    (index: number, id = "") => {
      select({ index, id });
      remember(run, { query: name, index, id });
    },
    [run, name],
  );
  const pick = (index: number) => choose(index, rows.at(index)?.id);
  const move = (how: Move) => {
    if (rows.matched === 0) return;
    const element = scroll.current;
    const screen = Math.max(1, Math.floor(((element?.clientHeight ?? 0) - head) / size) - 1);
    const top = Math.ceil((element?.scrollTop ?? 0) / size);
    const to = moved(selected.index < 0 ? top - 1 : selected.index, how, rows.matched, screen);
    pick(to);
    virtualizer.scrollToIndex(to, { align: "auto" });
    setMoves((count) => count + 1);
  };
  // The row that the keys have reached has the focus, too: it is what Enter opens and what a screen reader reads.
  // biome-ignore lint/correctness/useExhaustiveDependencies: once for each move, when its row is here
  useEffect(() => {
    if (moves === 0) return;
    scroll.current?.querySelector<HTMLElement>("tr[aria-current] a, a[aria-current]")?.focus({ preventScroll: true });
  }, [moves, selected.index, reached]);
  useKeys([
    { key: "/", label: "search", run: props.search },
    { key: "j", label: "next episode", run: () => move("down") },
    { key: "ArrowDown", label: "next episode", run: () => move("down") },
    { key: "k", label: "episode before", run: () => move("up") },
    { key: "ArrowUp", label: "episode before", run: () => move("up") },
    { key: "PageDown", label: "a screen down", run: () => move("page down") },
    { key: "PageUp", label: "a screen up", run: () => move("page up") },
    { key: "Home", label: "first episode", run: () => move("first") },
    { key: "End", label: "last episode", run: () => move("last") },
    {
      key: "Enter",
      label: "open the episode",
      run: () => {
        if (!current) return;
        pick(selected.index);
        go(href("run", run, "episode", current.id));
      },
    },
    {
      key: "g",
      label: "open its group",
      run: () => {
        if (current?.group) go(href("run", run, "group", current.group));
      },
    },
    { key: "r", label: "turn the order around", run: () => apply(sortQuery(filters.sort, !filters.descending)) },
    { key: "x", label: "clear all filters", run: () => apply(cleared(props.active)) },
  ]);

  const shown = {
    run,
    columns,
    items,
    height: virtualizer.getTotalSize(),
    matched: rows.matched,
    selected: selected.index,
    at: rows.at,
    choose,
  };
  return (
    <section ref={scroll} className={`${classes.scroll} ${rows.earlier ? classes.earlier : ""}`} aria-label="Episodes">
      {rows.matched === 0 ? (
        <Empty {...props} rows={rows} clear={() => apply(cleared(props.active))} />
      ) : phone ? (
        <Cards {...shown} />
      ) : (
        <Table {...shown} filters={filters} sort={apply} />
      )}
    </section>
  );
}

/** Milliseconds that one rests at rows before they are asked for: not all that a dragged scroll bar flies over. */
const REST = 60;

/** Calls back when the rows of a query are here: `first` for that which the page began with. */
function useSettled(name: string | null, then: (first: boolean) => void): void {
  const last = useRef<string | null>(null);
  useLayoutEffect(() => {
    if (name === null || name === last.current) return;
    const first = last.current === null;
    last.current = name;
    then(first);
  });
}

/** Keeps the rows that one reads where they are while new ones come before them; at the very top one sees them come. */
function useAnchor(scroll: { current: HTMLElement | null }, rows: Rows, size: number, name: string): void {
  const anchor = useRef<{ name: string; id: string; index: number } | null>(null);
  useLayoutEffect(() => {
    const element = scroll.current;
    if (!element || rows.earlier) return;
    const { current } = anchor;
    if (current?.name === name && element.scrollTop > 0) {
      const now = whereabouts(current.id, current.index, rows.pages);
      if (now !== current.index) element.scrollTop += (now - current.index) * size;
    }
    const index = Math.floor(element.scrollTop / size);
    const row = rows.at(index);
    anchor.current = row ? { name, id: row.id, index } : null;
  });
}

function Empty(props: { rows: Rows; live: boolean; active: Active[]; clear: () => void }) {
  const { rows, live, active, clear } = props;
  if (rows.error) return null;
  if (rows.total > 0 && active.length > 0) {
    return (
      <Nothing
        title="No episode matches."
        hint={
          <>
            {rows.indexing.done < rows.indexing.total && "Texts of some are still being read. "}
            <Button size="compact-sm" variant="light" onClick={clear}>
              Clear the filters
            </Button>
          </>
        }
      />
    );
  }
  if (isFile) return <Nothing title="No episodes in this file." />;
  return (
    <Nothing
      title={live ? "No episodes yet." : "This run has no episodes."}
      hint={live ? "The run is starting; they come here as they begin." : "Nothing was recorded."}
    />
  );
}

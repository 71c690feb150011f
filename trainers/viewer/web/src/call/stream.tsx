import { Anchor, Badge, Text } from "@mantine/core";
import { useMergedRef, useResizeObserver } from "@mantine/hooks";
import { useWindowVirtualizer } from "@tanstack/react-virtual";
import { type RefObject, useEffect, useLayoutEffect, useMemo, useState } from "react";
import { number } from "../shared/format";
import { type Look, TokenBlock } from "./block";
import { type Block, blockAt, blocksOf, foldAt, linesOf } from "./blocks";
import type { Cell } from "./cell";
import classes from "./tokens.module.css";

/** Places [start, end) that are on the screen, roughly. */
export interface Seen {
  start: number;
  end: number;
}

const LINE = 22;
const HEADING = 40;
const CHARACTER = 7.85;
/** Header and toolbar, which cover the top of the page. */
const COVERED = 180;

type Row = { type: "prompt" } | { type: "sampled" } | { type: "block"; block: Block };

/** All tokens of a call, of which only those near the screen are on the page. */
export function Stream({
  look,
  whole,
  pinned,
  hovered,
  seen,
  trained,
  place: reference,
  onPin,
  onWhole,
}: {
  look: Look;
  /** How much of it is trained on, in words. */
  trained: string;
  /** Whether all of the prompt is shown. */
  whole: boolean;
  pinned: number | null;
  hovered: Cell<number | null>;
  seen: Cell<Seen>;
  place: RefObject<HTMLDivElement | null>;
  onPin: (place: number | null) => void;
  onWhole: (whole: boolean) => void;
}) {
  const { tokens } = look;
  const fold = foldAt(tokens, whole);
  const rows = useMemo(() => {
    const shown = (blocks: Block[]) => blocks.map((block): Row => ({ type: "block", block }));
    const prompt = shown(blocksOf(tokens, fold, tokens.prompt));
    const sampled = shown(blocksOf(tokens, tokens.prompt, tokens.count));
    return [{ type: "prompt" } as Row, ...prompt, { type: "sampled" } as Row, ...sampled];
  }, [tokens, fold]);
  const [size, { width }] = useResizeObserver<HTMLDivElement>();
  const columns = Math.max(Math.floor(((width || 900) - 24) / CHARACTER), 20);
  const [margin, setMargin] = useState(0);
  useLayoutEffect(() => {
    const element = reference.current;
    if (element) setMargin(Math.round(element.getBoundingClientRect().top + window.scrollY));
  });
  const virtualizer = useWindowVirtualizer({
    count: rows.length,
    estimateSize: (at) => {
      const row = rows[at];
      return row?.type === "block" ? linesOf(tokens, row.block, columns) * LINE : HEADING;
    },
    getItemKey: (at) => {
      const row = rows[at];
      return row?.type === "block" ? row.block.start : `${row?.type}`;
    },
    overscan: 2,
    scrollMargin: margin,
    scrollPaddingStart: COVERED,
  });
  useReveal(reference, pinned, (place) => {
    const blocks = rows.map((row) => (row.type === "block" ? row.block : { start: -1, end: -1, whole: true }));
    const at = blockAt(blocks, place);
    if (at >= 0) virtualizer.scrollToIndex(at, { align: "center" });
  });
  const items = virtualizer.getVirtualItems();
  useEffect(() => {
    const top = (virtualizer.scrollOffset ?? 0) + COVERED;
    const bottom = top + window.innerHeight - COVERED;
    const blocks = items
      .filter((item) => item.end > top && item.start < bottom)
      .map((item) => rows[item.index])
      .flatMap((row) => (row?.type === "block" ? [row.block] : []));
    const [first, last] = [blocks[0], blocks.at(-1)];
    if (first && last) seen.set({ start: first.start, end: last.end });
  });
  return (
    // biome-ignore lint/a11y/useKeyWithClickEvents: the page binds the keys
    // biome-ignore lint/a11y/noStaticElementInteractions: tokens are many, and are reached by keys of the page
    <div
      ref={useMergedRef(reference, size)}
      className={classes.stream}
      style={{ height: virtualizer.getTotalSize() }}
      onPointerOver={(event) => hovered.set(placeOf(event.target))}
      onPointerLeave={() => hovered.set(null)}
      onClick={(event) => {
        const place = placeOf(event.target);
        if (place !== null && !window.getSelection()?.toString()) onPin(place === pinned ? null : place);
      }}
    >
      {items.map((item) => {
        const row = rows[item.index];
        return (
          <div
            key={item.key}
            data-index={item.index}
            ref={virtualizer.measureElement}
            className={classes.row}
            style={{ transform: `translateY(${item.start - margin}px)` }}
          >
            {row?.type === "block" && (
              <TokenBlock block={row.block} look={look} pinned={within(row.block, pinned) ? pinned : null} />
            )}
            {row?.type === "prompt" && (
              <Heading title="Prompt" count={tokens.prompt}>
                {(whole || fold > 0) && (
                  <Anchor component="button" type="button" size="xs" onClick={() => onWhole(!whole)}>
                    {whole ? "fold it" : `show the ${number(fold)} before these, too`}
                  </Anchor>
                )}
              </Heading>
            )}
            {row?.type === "sampled" && (
              <Heading title="Sampled" count={tokens.count - tokens.prompt}>
                {trained && (
                  <Badge size="sm" variant="light" tt="none" color={trained === "not trained on" ? "gray" : "teal"}>
                    {trained}
                  </Badge>
                )}
              </Heading>
            )}
          </div>
        );
      })}
    </div>
  );
}

function Heading({ title, count, children }: { title: string; count: number; children?: React.ReactNode }) {
  return (
    <div className={classes.heading}>
      <Text component="h3" size="sm" fw={600}>
        {title}
      </Text>
      <Text size="xs" c="dimmed">
        {number(count)} {count === 1 ? "token" : "tokens"}
      </Text>
      {children}
    </div>
  );
}

function within(block: Block, place: number | null): boolean {
  return place !== null && block.start <= place && place < block.end;
}

function placeOf(target: EventTarget): number | null {
  const element = target instanceof Element ? target.closest<HTMLElement>("[data-at]") : null;
  return element ? Number(element.dataset.at) : null;
}

export function tokenElement(stream: HTMLElement | null, place: number): HTMLElement | null {
  return stream?.querySelector<HTMLElement>(`[data-at="${place}"]`) ?? null;
}

const TRIES = 30;

/** Bring a token onto the screen once it is pinned: first its block, then, when that is there, itself. */
function useReveal(
  stream: RefObject<HTMLDivElement | null>,
  pinned: number | null,
  bring: (place: number) => void,
): void {
  // biome-ignore lint/correctness/useExhaustiveDependencies: only another token is brought onto the screen
  useEffect(() => {
    if (pinned === null) return;
    let frame = 0;
    let tries = 0;
    const look = () => {
      const element = tokenElement(stream.current, pinned);
      if (element) element.scrollIntoView({ block: "nearest" });
      else if (tries === 0) bring(pinned);
      tries += 1;
      if (!element && tries < TRIES) frame = requestAnimationFrame(look);
    };
    frame = requestAnimationFrame(look);
    return () => cancelAnimationFrame(frame);
  }, [pinned]);
}

import { ActionIcon, Anchor, Button, Group, Text as Paragraph } from "@mantine/core";
import { IconArrowBarToLeft } from "@tabler/icons-react";
import { useEffect, useMemo, useRef, useState } from "react";
import { href, setQuery } from "../address";
import { Traceback } from "../episode/message";
import type { SampleView } from "../records";
import { number } from "../shared/format";
import { OutcomeBadge, Rewards } from "../shared/outcome";
import { Written } from "../shared/written";
import { type Along, aligned, along, least, partingRow } from "./align";
import { based, type Choice, type Mode } from "./choice";
import classes from "./group.module.css";
import { named } from "./group-head";
import { OneMessage } from "./sample-message";

/** Rows that are there at first, and with each wish for more. */
const ROWS = 60;

interface Props {
  run: string;
  choice: Choice;
  mode: Mode;
  best: SampleView;
}

/** The samples in columns, row by row what they said. */
export function Samples({ run, choice, mode, best }: Props) {
  const { shown, base } = choice;
  const [limit, setLimit] = useState(ROWS);
  const grid = useRef<HTMLElement>(null);
  const alone = shown.length === 1 && shown[0] !== base;
  const columns = useMemo(() => (alone ? [base, ...shown] : shown), [alone, base, shown]);
  const hidden = alone ? 1 : 0;
  const alignment = useMemo(() => aligned(columns.map(({ messages }) => messages)), [columns]);
  const parting = columns.length > 1 ? partingRow(alignment) : -1;
  const rows = alignment.rows.map((row, at) => ({ row, at })).filter(({ row }) => row.slice(hidden).some(isPlace));

  const selected = choice.selected.episode;
  const before = useRef(selected);
  useEffect(() => {
    if (before.current === selected) return;
    before.current = selected;
    grid.current
      ?.querySelector("[data-selected=true]")
      ?.scrollIntoView({ block: "nearest", inline: mode === "all" ? "center" : "nearest" });
  }, [selected, mode]);

  /** In the row where they part, how far a sample still goes along; the first one as far as any other does. */
  const goes = (row: (number | null)[], column: number): Along | undefined => {
    const messages = row.map((place, at) => (place === null ? undefined : columns[at]?.messages[place]));
    const [first, own] = [messages[0], messages[column]];
    if (!first || !own) return undefined;
    const counted = (sample: SampleView | undefined, place: number | null | undefined) =>
      base === best && place === 0 ? (sample?.same_characters ?? 0) : 0;
    if (column > 0) return along(own.message, first.message, counted(columns[column], row[column]));
    const others = messages.slice(1).map((other, at) => {
      const same = other && along(first.message, other.message, counted(columns[at + 1], row[0]));
      return same ?? { text: 0, tools: [] };
    });
    return least(others);
  };
  const template = `repeat(${shown.length}, minmax(${mode === "one" ? "0" : "20rem"}, 1fr))`;
  return (
    <section ref={grid} className={classes.columns} style={{ gridTemplateColumns: template }} aria-label="Samples">
      {shown.map((sample) => (
        <ColumnHead key={sample.episode} run={run} sample={sample} choice={choice} mode={mode} best={best} />
      ))}
      {rows.slice(0, limit).map(({ row, at }) => (
        <div key={at} className={classes.row}>
          {at === parting && at > 0 && (
            <div className={classes.rule}>
              <span>Here they part.</span>
            </div>
          )}
          {row.slice(hidden).map((place, index) => {
            const column = index + hidden;
            const said = place === null ? undefined : columns[column]?.messages[place];
            const equal = place !== null && columns.length > 1 && alignment.same[column]?.has(place);
            return (
              <div key={columns[column]?.episode} className={classes.cell}>
                {said && (
                  <OneMessage
                    key={place}
                    run={run}
                    said={said}
                    equal={equal}
                    same={at === parting && !equal ? goes(row, column) : undefined}
                  />
                )}
              </div>
            );
          })}
        </div>
      ))}
      {rows.length > limit && (
        <div className={classes.rule}>
          <span>
            <Button size="compact-sm" variant="light" onClick={() => setLimit(limit + 4 * ROWS)}>
              {number(rows.length - limit)} more rows
            </Button>
          </span>
        </div>
      )}
      {rows.length <= limit && shown.map((sample) => <End key={sample.episode} run={run} sample={sample} />)}
    </section>
  );
}

function isPlace(place: number | null): boolean {
  return place !== null;
}

function ColumnHead(props: { run: string; sample: SampleView; choice: Choice; mode: Mode; best: SampleView }) {
  const { run, sample, choice, mode, best } = props;
  const isBase = sample === choice.base;
  return (
    <header className={classes.head} data-selected={sample === choice.selected}>
      <Group gap={8}>
        <Anchor size="sm" fw={600} href={href("run", run, "episode", sample.episode)}>
          {named(sample)}
        </Anchor>
        <OutcomeBadge outcome={sample.outcome} counted={sample.counted} />
        {sample.total !== null && (
          <Paragraph size="sm" fw={600} style={{ fontVariantNumeric: "tabular-nums" }}>
            R {number(sample.total)}
          </Paragraph>
        )}
        {sample === best && sample.total !== null && (
          <Paragraph size="xs" c="dimmed">
            best
          </Paragraph>
        )}
        {!isBase && mode !== "one" && (
          <ActionIcon
            size="sm"
            variant="subtle"
            color="gray"
            ml="auto"
            title="Compare the others with this sample"
            aria-label="Compare the others with this sample"
            onClick={() => setQuery(based(choice, sample))}
          >
            <IconArrowBarToLeft size={14} />
          </ActionIcon>
        )}
      </Group>
      <Group gap={8} mt={2}>
        <Rewards rewards={sample.rewards} />
        <Paragraph size="xs" c="dimmed">
          {number(sample.tokens)} tokens
        </Paragraph>
      </Group>
    </header>
  );
}

/** How it ended: the error, and the answer. */
function End({ run, sample }: { run: string; sample: SampleView }) {
  return (
    <div className={classes.cell} style={{ paddingBottom: 12 }}>
      {sample.messages.length === 0 && (
        <Paragraph size="xs" c="dimmed" fs="italic">
          {sample.outcome === null ? "It has said nothing more yet." : "It said nothing more."}
        </Paragraph>
      )}
      {sample.answer && sample.answer.text !== sample.messages.at(-1)?.message.text.text && (
        <div className={classes.message}>
          <div className={classes.who}>
            <b>answer</b>
          </div>
          <Written run={run} text={sample.answer} />
        </div>
      )}
      {sample.error && <Traceback run={run} text={sample.error} />}
    </div>
  );
}

import { Anchor, Group, Text as Paragraph } from "@mantine/core";
import { useVirtualizer } from "@tanstack/react-virtual";
import { memo, useEffect, useRef } from "react";
import { href } from "../address";
import { duration, number } from "../shared/format";
import { categorical } from "../shared/scales";
import { Visible } from "../shared/written";
import type { Turn } from "./conversation";
import styles from "./episode.module.css";
import { Message } from "./message";
import { spanWords } from "./words";

interface Props {
  run: string;
  turns: Turn[];
  agents: string[];
  selected: string | null;
  onSelect: (id: string) => void;
}

/** The whole episode as a talk. */
export function ConversationView({ run, turns, agents, selected, onSelect }: Props) {
  const pane = useRef<HTMLDivElement>(null);
  const virtual = useVirtualizer({
    count: turns.length,
    getScrollElement: () => pane.current,
    estimateSize: () => 90,
    getItemKey: (at) => turns[at]?.key ?? at,
    overscan: 6,
  });
  // biome-ignore lint/correctness/useExhaustiveDependencies: new turns of a running episode must not move what one reads
  useEffect(() => {
    const at = turns.findIndex((turn) => turn.key === selected);
    if (at >= 0) virtual.scrollToIndex(at, { align: "center" });
  }, [selected]);
  return (
    <div ref={pane} className={styles.pane}>
      <div style={{ height: virtual.getTotalSize(), position: "relative" }}>
        {virtual.getVirtualItems().map(({ index, start, key }) => (
          // biome-ignore lint/a11y/useKeyWithClickEvents: the page's keys move the selection
          // biome-ignore lint/a11y/noStaticElementInteractions: see above
          <div
            key={key}
            ref={virtual.measureElement}
            data-index={index}
            className={styles.turn}
            data-selected={turns[index]?.key === selected}
            style={{ transform: `translateY(${start}px)` }}
            onClick={({ target }) => {
              const busy = target instanceof Element && target.closest("a, button") !== null;
              if (busy || !window.getSelection()?.isCollapsed) return; // what they do, or what is selected, is meant
              const turn = turns[index] as Turn;
              onSelect(turn.kind === "event" ? turn.span.id : turn.call.id);
            }}
          >
            <TurnBlock run={run} turn={turns[index] as Turn} agents={agents} />
          </div>
        ))}
      </div>
    </div>
  );
}

const TurnBlock = memo(function TurnBlock({ run, turn, agents }: { run: string; turn: Turn; agents: string[] }) {
  if (turn.kind === "event") {
    const { span } = turn;
    return (
      <Group gap={8} wrap="nowrap" px={10}>
        <Paragraph size="xs" fw={600} c={span.error ? "red" : "teal"} style={{ flex: "none" }}>
          {span.kind} <Visible text={span.name.slice(0, 80)} />
        </Paragraph>
        <span className={`${styles.words} ${span.error ? styles.wrong : ""}`}>
          <Visible text={spanWords(span)} />
        </span>
        <span className={styles.facts}>
          {span.ended_at < span.started_at ? "running" : duration(span.ended_at - span.started_at)}
        </span>
      </Group>
    );
  }
  if (turn.kind === "said") return <Message run={run} message={turn.message} />;
  const { call } = turn;
  return (
    <div>
      <Group gap={8} mb={2}>
        <Paragraph size="sm" fw={600}>
          <span style={{ color: categorical(Math.max(agents.indexOf(call.agent), 0)) }} aria-hidden>
            ●
          </span>{" "}
          <Visible text={call.agent || "the policy"} />
        </Paragraph>
        <Anchor size="xs" href={href("run", run, "call", call.id)}>
          #{call.index}, {number(call.sampled_tokens)} {call.sampled_tokens === 1 ? "token" : "tokens"}
        </Anchor>
      </Group>
      <Message run={run} message={turn.message} sampled who={call.upstream ? `reply, by ${call.upstream}` : "reply"} />
    </div>
  );
});

import { Badge, Group } from "@mantine/core";
import { IconCircleOff } from "@tabler/icons-react";
import type { Outcome } from "../records";
import { number, words } from "./format";
import { Visible } from "./written";

const COLOURS: Record<string, string> = {
  completed: "teal",
  agent_error: "red",
  timeout: "orange",
  infrastructure_error: "grape",
  cancelled: "gray",
  running: "blue",
};

/** How an episode ended; `short` where there is no room to write that it does not count. */
export function OutcomeBadge({
  outcome,
  counted = true,
  short = false,
}: {
  outcome: Outcome | null;
  counted?: boolean;
  short?: boolean;
}) {
  const name = outcome ?? "running";
  const left = !counted && outcome !== null;
  return (
    <Badge
      color={COLOURS[name] ?? "gray"}
      variant={left ? "outline" : "light"}
      title={left ? `${words(name)}: does not count, neither for training nor in the figures` : undefined}
      rightSection={left && short ? <IconCircleOff size={11} role="img" aria-label="not counted" /> : undefined}
      style={{ flexShrink: 0 }}
      size="sm"
      tt="none"
    >
      {words(name)}
      {left && !short && " · not counted"}
    </Badge>
  );
}

/** Rewards by name. */
export function Rewards({ rewards }: { rewards: Record<string, number> }) {
  return (
    <Group gap={4}>
      {Object.entries(rewards).map(([name, value]) => (
        <Badge key={name} variant="default" size="sm" tt="none" style={{ fontVariantNumeric: "tabular-nums" }}>
          <Visible text={name} /> {number(value)}
        </Badge>
      ))}
    </Group>
  );
}

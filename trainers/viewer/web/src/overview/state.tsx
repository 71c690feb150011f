import { Badge, Box, Group, Text } from "@mantine/core";
import type { RunEntry } from "../records";
import { number } from "../shared/format";

const COLOURS = { running: "blue", finished: "teal", stopped: "orange", recorded: "gray" } as const;

export function StateBadge({ state }: { state: RunEntry["state"] }) {
  return (
    <Badge variant={state === "running" ? "dot" : "light"} color={COLOURS[state]} size="sm" tt="none" miw="max-content">
      {state}
    </Badge>
  );
}

const ORDER = ["base", "warm_start", "final"];

/** The policies that were measured, as a run goes through them: before, between, after. */
export function measured(success: Record<string, number>): string[] {
  const known = ORDER.filter((label) => label in success);
  return [...known, ...Object.keys(success).filter((label) => !ORDER.includes(label))];
}

/** From the first policy measured to the last. */
export function Success({ entry }: { entry: RunEntry }) {
  const labels = ORDER.filter((label) => label in entry.success);
  if (labels.length === 0) return <Text size="sm">–</Text>;
  return (
    <Group gap={4} style={{ rowGap: 0 }}>
      {labels.map((label, at) => (
        <Box key={label} lh={1.2} title={`${label.replace("_", " ")}: ${interval(entry.success_ci95[label])}`}>
          <Text
            span
            size="sm"
            fw={at === labels.length - 1 ? 600 : 400}
            style={{ fontVariantNumeric: "tabular-nums", whiteSpace: "nowrap" }}
          >
            {at > 0 && "→ "}
            {number(entry.success[label], 3)}
          </Text>
        </Box>
      ))}
    </Group>
  );
}

export function interval(ends: number[] | undefined): string {
  return ends?.length === 2 ? `${number(ends[0])} … ${number(ends[1])}` : "interval not known";
}

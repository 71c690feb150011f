import { Button, Group, Progress, Text } from "@mantine/core";
import { IconX } from "@tabler/icons-react";
import type { Query } from "../address";
import type { Indexing } from "../records";
import { number } from "../shared/format";
import { Name } from "./columns";
import classes from "./episodes.module.css";
import type { Active } from "./filters";
import { cleared } from "./filters";

/** How many episodes one sees of how many, and what narrows them. */
export function StatusLine(props: {
  matched: number;
  total: number;
  indexing: Indexing;
  active: Active[];
  apply: (changes: Query) => void;
}) {
  const { matched, total, indexing, active, apply } = props;
  return (
    <Group gap={6} mih={24}>
      <Text size="xs" role="status" style={{ fontVariantNumeric: "tabular-nums" }} mr={4}>
        <b>{number(matched)}</b>
        {matched !== total && ` of ${number(total)}`} {total === 1 ? "episode" : "episodes"}
      </Text>
      {indexing.done < indexing.total && <Reading indexing={indexing} />}
      {active.map(({ key, label, clear }) => (
        <Button
          key={key}
          className={classes.chip}
          size="compact-xs"
          variant="light"
          fw={500}
          rightSection={<IconX size={12} aria-hidden />}
          aria-label={`Take away ${label}`}
          onClick={() => apply(clear)}
        >
          <Name text={label} />
        </Button>
      ))}
      {active.length > 0 && (
        <Button size="compact-xs" variant="subtle" color="gray" onClick={() => apply(cleared(active))}>
          Clear
        </Button>
      )}
    </Group>
  );
}

function Reading({ indexing: { done, total } }: { indexing: Indexing }) {
  const share = (100 * done) / total;
  return (
    <Group
      gap={6}
      wrap="nowrap"
      title="Words, agents and versions of older episodes are still being read: filters by them do not find all yet."
    >
      <Progress value={share} w={64} size="xs" aria-label="texts read" />
      <Text size="xs" c="dimmed">
        texts of {number(done)} of {number(total)} read
      </Text>
    </Group>
  );
}

import {
  Anchor,
  Box,
  Button,
  Checkbox,
  Code,
  Group,
  Progress,
  Stack,
  Table,
  Text,
  TextInput,
  Title,
} from "@mantine/core";
import { IconSearch } from "@tabler/icons-react";
import { useRef, useState } from "react";
import { go, href, setQuery, useAddress, withQuery } from "../address";
import type { RunEntry, Runs } from "../records";
import { CopyJson } from "../shared/copy-json";
import { number, time } from "../shared/format";
import { useKeys } from "../shared/keys";
import { Answered, Nothing } from "../shared/states";
import { useAnswer } from "../source";
import { StateBadge, Success } from "./state";

/** All runs, the latest first. */
export function RunsPage() {
  const [live, setLive] = useState(false);
  const answer = useAnswer<Runs>("runs", {}, { every: live ? 3_000 : 15_000 });
  const runs = answer.data?.runs;
  const expected = runs !== undefined && (runs.length === 0 || runs.some((run) => run.state === "running"));
  if (expected !== live) setLive(expected);
  return <Answered answer={answer}>{(runs) => <RunList runs={runs} />}</Answered>;
}

function RunList({ runs }: { runs: Runs }) {
  const { query } = useAddress();
  const [chosen, setChosen] = useState<string[]>([]);
  const [at, setAt] = useState(0);
  const search = useRef<HTMLInputElement>(null);
  const wanted = query.get("name") ?? "";
  const shown = runs.runs.filter((run) =>
    `${run.name} ${run.key} ${run.model}`.toLowerCase().includes(wanted.toLowerCase()),
  );
  const compare = () => go(withQuery(href("compare"), { run: chosen }));
  const toggle = (key: string) =>
    setChosen(chosen.includes(key) ? chosen.filter((each) => each !== key) : [...chosen, key]);
  const current = shown[Math.min(at, shown.length - 1)];
  useKeys([
    { key: "/", label: "search runs", run: () => search.current?.focus() },
    { key: "j", label: "next run", run: () => setAt(Math.min(at + 1, shown.length - 1)) },
    { key: "k", label: "previous run", run: () => setAt(Math.max(at - 1, 0)) },
    { key: "Enter", label: "open the run", run: () => current && go(href("run", current.key)) },
    { key: "x", label: "choose the run for comparison", run: () => current && toggle(current.key) },
    { key: "c", label: "compare the chosen runs", run: () => chosen.length > 1 && compare() },
  ]);
  if (runs.runs.length === 0) {
    return (
      <Nothing
        title={`No runs in ${runs.place} yet`}
        hint={
          <>
            Start one with <Code>lrl train recipe.yaml</Code>: it appears here at once.
          </>
        }
      />
    );
  }
  return (
    <Stack gap="sm">
      <Group justify="space-between">
        <Title order={2} size="h3">
          Runs
        </Title>
        <Group gap="xs">
          <TextInput
            ref={search}
            size="xs"
            placeholder="Name or model"
            aria-label="Search runs"
            leftSection={<IconSearch size={14} />}
            value={wanted}
            onChange={(event) => setQuery({ name: event.currentTarget.value })}
          />
          <Button size="compact-sm" disabled={chosen.length < 2} onClick={compare}>
            Compare {chosen.length > 1 ? chosen.length : ""}
          </Button>
          <CopyJson data={runs} />
        </Group>
      </Group>
      <Table.ScrollContainer minWidth={320}>
        <Table highlightOnHover verticalSpacing={6}>
          <Table.Thead>
            <Table.Tr>
              <Table.Th w={36} aria-label="chosen" />
              <Table.Th>run</Table.Th>
              <Table.Th visibleFrom="sm">state</Table.Th>
              <Table.Th>success</Table.Th>
              <Table.Th visibleFrom="sm">steps</Table.Th>
              <Table.Th visibleFrom="md">model</Table.Th>
              <Table.Th visibleFrom="lg">seed</Table.Th>
              <Table.Th visibleFrom="md">started (UTC)</Table.Th>
            </Table.Tr>
          </Table.Thead>
          <Table.Tbody>
            {shown.map((run, row) => (
              <Row
                key={run.key}
                run={run}
                marked={row === at && shown.length > 1}
                latest={run.key === runs.chosen}
                chosen={chosen.includes(run.key)}
                toggle={() => toggle(run.key)}
              />
            ))}
          </Table.Tbody>
        </Table>
      </Table.ScrollContainer>
      {shown.length === 0 && <Nothing title="No run has such a name." />}
    </Stack>
  );
}

interface RowProps {
  run: RunEntry;
  marked: boolean;
  latest: boolean;
  chosen: boolean;
  toggle: () => void;
}

function Row({ run, marked, latest, chosen, toggle }: RowProps) {
  return (
    <Table.Tr bg={marked ? "var(--mantine-color-default-hover)" : undefined} aria-current={marked || undefined}>
      <Table.Td>
        <Checkbox size="xs" checked={chosen} onChange={toggle} aria-label={`Compare ${run.key}`} />
      </Table.Td>
      <Table.Td style={{ overflowWrap: "anywhere" }}>
        <Anchor href={href("run", run.key)} fw={latest ? 700 : 500}>
          {run.name}
        </Anchor>
        <Text size="xs" c="dimmed">
          {run.path}
        </Text>
        <Box hiddenFrom="sm">
          <StateBadge state={run.state} />
        </Box>
        {run.note && (
          <Text size="xs" c="orange">
            {run.note}
          </Text>
        )}
      </Table.Td>
      <Table.Td visibleFrom="sm">
        <StateBadge state={run.state} />
      </Table.Td>
      <Table.Td>
        <Success entry={run} />
      </Table.Td>
      <Table.Td visibleFrom="sm" miw={90}>
        <Text size="sm">
          {number(run.steps_done)}
          {run.steps !== null && ` of ${number(run.steps)}`}
        </Text>
        {run.state === "running" && run.steps !== null && run.steps > 0 && (
          <Progress value={(100 * run.steps_done) / run.steps} size={3} aria-label="steps done" />
        )}
      </Table.Td>
      <Table.Td visibleFrom="md" style={{ overflowWrap: "anywhere" }}>
        <Text size="sm">{run.model || "–"}</Text>
      </Table.Td>
      <Table.Td visibleFrom="lg">
        <Text size="sm">{run.seed ?? "–"}</Text>
      </Table.Td>
      <Table.Td visibleFrom="md">
        <Text size="sm" style={{ whiteSpace: "nowrap", fontVariantNumeric: "tabular-nums" }}>
          {run.started_at ? time(run.started_at) : "–"}
        </Text>
      </Table.Td>
    </Table.Tr>
  );
}

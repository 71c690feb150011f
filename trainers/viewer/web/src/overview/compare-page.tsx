import { Anchor, Badge, Code, Group, SimpleGrid, Stack, Table, Text, Title } from "@mantine/core";
import { type UseQueryResult, useQueries } from "@tanstack/react-query";
import { useMemo } from "react";
import { href, useAddress } from "../address";
import type { RunDetail } from "../records";
import { CopyJson } from "../shared/copy-json";
import { number, several, words } from "../shared/format";
import { categorical } from "../shared/scales";
import { Failed, Loading, Nothing } from "../shared/states";
import { fetchJson, isFile, ofRun, type SourceError } from "../source";
import { Chart } from "./chart";
import { differences, overlaid, tellApart } from "./compare";
import { interval, measured, StateBadge, Success } from "./state";

/** Several runs over each other. */
export function ComparePage() {
  const keys = useAddress().query.getAll("run");
  const { runs, failed } = useQueries({
    combine: together,
    queries: keys.map((key) => ({
      queryKey: [ofRun(key)],
      queryFn: ({ signal }: { signal: AbortSignal }) => fetchJson<RunDetail>(ofRun(key), {}, signal),
      refetchInterval: isFile ? (false as const) : 5_000,
    })),
  });
  if (keys.length === 0)
    return <Nothing title="Which runs?" hint={<Anchor href={href()}>Choose them in the list.</Anchor>} />;
  return (
    <Stack gap="md">
      {failed.map((error) => (
        <Failed key={error.message} error={error} />
      ))}
      {runs.length === 0 && failed.length === 0 && <Loading />}
      {runs.length > 0 && <Comparison runs={runs} />}
    </Stack>
  );
}

/** The same as long as nothing changed. */
function together(answers: UseQueryResult<RunDetail>[]): { runs: RunDetail[]; failed: SourceError[] } {
  return {
    runs: answers.flatMap(({ data }) => (data ? [data] : [])),
    failed: answers.flatMap(({ error }) => (error ? [error as SourceError] : [])),
  };
}

function Comparison({ runs }: { runs: RunDetail[] }) {
  const names = useMemo(() => tellApart(runs.map((run) => run.entry.key)), [runs]);
  const drawn = useMemo(() => overlaid(runs, names), [runs, names]);
  const differing = useMemo(() => differences(runs.map((run) => run.recipe)), [runs]);
  return (
    <>
      <Group justify="space-between">
        <Title order={2} size="h3">
          {several(runs.length, "run")}
        </Title>
        <CopyJson data={{ runs: runs.map((run) => run.entry), differences: differing }} />
      </Group>
      <Ends runs={runs} names={names} />
      {runs.length > 1 && (
        <Title order={3} size="h5">
          What differs in their recipes
        </Title>
      )}
      {runs.length < 2 ? null : differing.length === 0 ? (
        <Text size="sm" c="dimmed">
          Nothing: they are repetitions of one another.
        </Text>
      ) : (
        <Table.ScrollContainer minWidth={300}>
          <Table fz="xs" verticalSpacing={2}>
            <Table.Thead>
              <Table.Tr>
                <Table.Th>field</Table.Th>
                {names.map((name, at) => (
                  <Table.Th key={name}>
                    <Name name={name} at={at} />
                  </Table.Th>
                ))}
              </Table.Tr>
            </Table.Thead>
            <Table.Tbody>
              {differing.map(({ field, values }) => (
                <Table.Tr key={field}>
                  <Table.Td>{field}</Table.Td>
                  {values.map((value, at) => (
                    <Table.Td key={names[at]}>
                      {value === undefined ? "–" : <Code style={{ overflowWrap: "anywhere" }}>{value}</Code>}
                    </Table.Td>
                  ))}
                </Table.Tr>
              ))}
            </Table.Tbody>
          </Table>
        </Table.ScrollContainer>
      )}
      <SimpleGrid cols={{ base: 1, md: 2, xl: 3 }} spacing="sm">
        {drawn.map((figure) => (
          <Chart key={figure.id} figure={figure} />
        ))}
      </SimpleGrid>
    </>
  );
}

function Ends({ runs, names }: { runs: RunDetail[]; names: string[] }) {
  return (
    <Table.ScrollContainer minWidth={620}>
      <Table verticalSpacing={4} fz="sm">
        <Table.Thead>
          <Table.Tr>
            <Table.Th>run</Table.Th>
            <Table.Th>state</Table.Th>
            <Table.Th>steps</Table.Th>
            <Table.Th>success</Table.Th>
            <Table.Th>last, with its 95 % interval</Table.Th>
          </Table.Tr>
        </Table.Thead>
        <Table.Tbody>
          {runs.map(({ entry }, at) => {
            const label = measured(entry.success)
              .filter((each) => ["base", "warm_start", "final"].includes(each))
              .at(-1);
            return (
              <Table.Tr key={entry.key}>
                <Table.Td>
                  <Anchor href={href("run", entry.key)} size="sm">
                    <Name name={names[at] ?? entry.key} at={at} />
                  </Anchor>
                </Table.Td>
                <Table.Td>
                  <StateBadge state={entry.state} />
                </Table.Td>
                <Table.Td>{number(entry.steps_done)}</Table.Td>
                <Table.Td>
                  <Success entry={entry} />
                </Table.Td>
                <Table.Td>
                  {label
                    ? `${words(label)} ${number(entry.success[label])}, ${interval(entry.success_ci95[label])}`
                    : "–"}
                </Table.Td>
              </Table.Tr>
            );
          })}
        </Table.Tbody>
      </Table>
    </Table.ScrollContainer>
  );
}

function Name({ name, at }: { name: string; at: number }) {
  return (
    <Group gap={4} wrap="nowrap" display="inline-flex" style={{ verticalAlign: "middle" }}>
      <Badge size="xs" circle style={{ background: categorical(at) }} aria-hidden />
      {name}
    </Group>
  );
}

import { Button, Code, Group, Paper, Progress, SimpleGrid, Stack, Table, Text, TextInput, Title } from "@mantine/core";
import { useCallback, useMemo, useState } from "react";
import { go, href, withQuery } from "../address";
import { EpisodesPage } from "../episodes/episodes-page";
import type { RunDetail } from "../records";
import { CopyJson } from "../shared/copy-json";
import { duration, number, time, words } from "../shared/format";
import { useKeys } from "../shared/keys";
import { Answered } from "../shared/states";
import { isFile, ofRun, useAnswer } from "../source";
import { Chart } from "./chart";
import { figures } from "./figures";
import { AdvantageMap } from "./histogram";
import { interval, measured, StateBadge } from "./state";

/** One run in figures, live while it trains; of a store alone, which has none, its episodes. */
export function RunPage({ run }: { run: string }) {
  const [live, setLive] = useState(true);
  const answer = useAnswer<RunDetail>(ofRun(run), {}, { every: live ? 2_000 : 15_000 });
  const state = answer.data?.entry.state;
  const going = state === "running" || state === "stopped"; // it may have begun just now, or be resumed
  if (answer.data && going !== live) setLive(going);
  return (
    <Answered answer={answer}>
      {(detail) =>
        detail.entry.state === "recorded" && detail.steps.length === 0 && detail.evaluations.length === 0 ? (
          <EpisodesPage run={run} />
        ) : (
          <Detail run={detail} />
        )
      }
    </Answered>
  );
}

function Detail({ run }: { run: RunDetail }) {
  const { entry } = run;
  const { series, steps, evaluations } = run;
  const drawn = useMemo(() => figures({ series, steps, evaluations }), [series, steps, evaluations]);
  const episodes = href("run", entry.key, "episodes");
  const ofStep = useCallback(
    (step: number) => go(withQuery(episodes, { phase: "train", step: `${step},${step}` })),
    [episodes],
  );
  useKeys([{ key: "e", label: "episodes of the run", run: () => go(episodes) }]);
  return (
    <Stack gap="md">
      <Group justify="space-between" align="flex-start">
        <Stack gap={2}>
          <Group gap="xs">
            <Title order={2} size="h3" style={{ overflowWrap: "anywhere" }}>
              {entry.name}
            </Title>
            <StateBadge state={entry.state} />
          </Group>
          <Text size="xs" c="dimmed" style={{ overflowWrap: "anywhere" }}>
            {entry.path} {entry.model && `· ${entry.model}`}{" "}
            {entry.started_at > 0 && `· started ${time(entry.started_at)} UTC`}
          </Text>
          {entry.note && (
            <Text size="sm" c="orange">
              {entry.note}
            </Text>
          )}
        </Stack>
        <Group gap="xs">
          <Button size="compact-sm" component="a" href={episodes}>
            Episodes
          </Button>
          <CopyJson data={run} />
        </Group>
      </Group>
      <Headline run={run} />
      {drawn.length > 0 && (
        <SimpleGrid cols={{ base: 1, md: 2, xl: 3 }} spacing="sm">
          {drawn.map((figure) => (
            <Chart key={figure.id} figure={figure} onStep={isFile ? undefined : ofStep} />
          ))}
          <AdvantageMap run={run} />
        </SimpleGrid>
      )}
      {drawn.length === 0 && entry.state !== "recorded" && (
        <Text c="dimmed">No step is done yet. The first figures come with the first evaluation.</Text>
      )}
      {run.formula && (
        <Paper withBorder p="sm">
          <Text fw={600} size="sm" component="h3">
            Objective
          </Text>
          <Text className="written">{run.formula}</Text>
        </Paper>
      )}
      <Recipe recipe={run.recipe} />
    </Stack>
  );
}

function Headline({ run }: { run: RunDetail }) {
  const { entry, stages } = run;
  const seconds = Object.values(stages).reduce((sum, value) => sum + value, 0);
  const slowest = Object.entries(stages).sort(([, one], [, other]) => other - one);
  return (
    <SimpleGrid cols={{ base: 2, sm: 3, lg: 6 }} spacing="sm">
      {measured(entry.success).map((label) => (
        <Fact
          key={label}
          label={`success, ${words(label)}`}
          value={number(entry.success[label])}
          note={interval(entry.success_ci95[label])}
        />
      ))}
      {entry.state !== "recorded" && (
        <Fact
          label="steps"
          value={
            entry.steps === null ? number(entry.steps_done) : `${number(entry.steps_done)} of ${number(entry.steps)}`
          }
        >
          {entry.state === "running" && entry.steps ? (
            <Progress value={(100 * entry.steps_done) / entry.steps} size={4} mt={4} aria-label="steps done" />
          ) : null}
        </Fact>
      )}
      {seconds > 0 && (
        <Fact
          label="time spent"
          value={duration(seconds)}
          note={slowest
            .slice(0, 3)
            .map(([stage, value]) => `${words(stage)} ${duration(value)}`)
            .join(", ")}
        />
      )}
    </SimpleGrid>
  );
}

function Fact({
  label,
  value,
  note,
  children,
}: {
  label: string;
  value: string;
  note?: string;
  children?: React.ReactNode;
}) {
  return (
    <Paper withBorder p="xs">
      <Text size="xs" c="dimmed">
        {label}
      </Text>
      <Text fw={600} size="lg" style={{ fontVariantNumeric: "tabular-nums" }}>
        {value}
      </Text>
      {note && (
        <Text size="xs" c="dimmed">
          {note}
        </Text>
      )}
      {children}
    </Paper>
  );
}

function Recipe({ recipe }: { recipe: Record<string, string> }) {
  const [wanted, setWanted] = useState("");
  const [open, setOpen] = useState(false);
  const fields = Object.entries(recipe).filter(([name, value]) =>
    `${name} ${value}`.toLowerCase().includes(wanted.toLowerCase()),
  );
  if (Object.keys(recipe).length === 0) return null;
  return (
    <Paper withBorder p="sm">
      <Group justify="space-between">
        <Text fw={600} size="sm" component="h3">
          Recipe, as it was resolved
        </Text>
        <Group gap="xs">
          <TextInput
            size="xs"
            placeholder="Field or value"
            aria-label="Search the recipe"
            value={wanted}
            onChange={(event) => {
              setWanted(event.currentTarget.value);
              setOpen(true);
            }}
          />
          <Button size="compact-sm" variant="default" onClick={() => setOpen(!open)} aria-expanded={open}>
            {open ? "Fold" : `${number(Object.keys(recipe).length)} fields`}
          </Button>
        </Group>
      </Group>
      {open && (
        <Table fz="xs" verticalSpacing={2} mt="xs">
          <Table.Tbody>
            {fields.map(([name, value]) => (
              <Table.Tr key={name}>
                <Table.Td style={{ whiteSpace: "nowrap" }}>{name}</Table.Td>
                <Table.Td>
                  <Code style={{ overflowWrap: "anywhere", whiteSpace: "pre-wrap" }}>{value}</Code>
                </Table.Td>
              </Table.Tr>
            ))}
          </Table.Tbody>
        </Table>
      )}
      {open && fields.length === 0 && (
        <Text size="xs" c="dimmed" mt="xs">
          No field has that.
        </Text>
      )}
    </Paper>
  );
}

import {
  ActionIcon,
  Box,
  Group,
  Paper,
  ScrollArea,
  Table,
  Text,
  Tooltip,
  UnstyledButton,
  useComputedColorScheme,
} from "@mantine/core";
import { useElementSize } from "@mantine/hooks";
import { IconInfoCircle, IconTable } from "@tabler/icons-react";
import { memo, useEffect, useMemo, useRef, useState } from "react";
import uPlot from "uplot";
import { CopyJson } from "../shared/copy-json";
import { duration, number } from "../shared/format";
import { categorical } from "../shared/scales";
import { Visible } from "../shared/written";
import { description, type Figure, last } from "./figure";
import { errorBars, plot } from "./plot";

const HEIGHT = 200;
const ROWS = 200;

/** A figure with its legend: point at a step to read its values, click on it to go there. */
export const Chart = memo(function Chart({ figure, onStep }: { figure: Figure; onStep?: (step: number) => void }) {
  const [hidden, setHidden] = useState<ReadonlySet<string>>(new Set());
  const [log, setLog] = useState(false);
  const [asTable, setAsTable] = useState(false);
  const [at, setAt] = useState<number | null>(null);
  const toggle = (label: string) => {
    const next = new Set(hidden);
    if (!next.delete(label)) next.add(label);
    setHidden(next);
  };
  return (
    <Paper withBorder p="xs" component="section" aria-label={figure.title} data-figure={figure.id}>
      <Group justify="space-between" wrap="nowrap" gap={4}>
        <Group gap={4} wrap="nowrap">
          <Text fw={600} size="sm" component="h3">
            {figure.title}
          </Text>
          <Tooltip label={figure.meaning} multiline w={280} events={{ hover: true, focus: true, touch: true }}>
            <ActionIcon
              variant="transparent"
              color="gray"
              size="xs"
              aria-label={`What ${figure.title} means: ${figure.meaning}`}
            >
              <IconInfoCircle size={14} />
            </ActionIcon>
          </Tooltip>
        </Group>
        <Group gap={2} wrap="nowrap">
          {figure.log && (
            <ActionIcon
              variant={log ? "light" : "subtle"}
              color="gray"
              size="sm"
              onClick={() => setLog(!log)}
              aria-pressed={log}
              aria-label="Logarithmic scale"
              title="Logarithmic scale"
            >
              <Text span size="xs">
                log
              </Text>
            </ActionIcon>
          )}
          <ActionIcon
            variant={asTable ? "light" : "subtle"}
            color="gray"
            size="sm"
            onClick={() => setAsTable(!asTable)}
            aria-pressed={asTable}
            aria-label="As a table"
            title="As a table"
          >
            <IconTable size={14} />
          </ActionIcon>
          <CopyJson data={figure} small />
        </Group>
      </Group>
      {asTable ? (
        <Values figure={figure} />
      ) : (
        <Canvas figure={figure} hidden={hidden} log={log} onAt={setAt} onStep={onStep} />
      )}
      <Legend figure={figure} hidden={hidden} toggle={toggle} at={at} />
    </Paper>
  );
});

function Canvas({
  figure,
  hidden,
  log,
  onAt,
  onStep,
}: {
  figure: Figure;
  hidden: ReadonlySet<string>;
  log: boolean;
  onAt: (at: number | null) => void;
  onStep?: (step: number) => void;
}) {
  const { ref, width } = useElementSize<HTMLDivElement>();
  const host = useRef<HTMLDivElement>(null);
  const chart = useRef<uPlot>(null);
  const scheme = useComputedColorScheme("light");
  const drawn = useMemo(() => plot(figure, { hidden, log }), [figure, hidden, log]);
  const bars = useMemo(() => errorBars(figure, hidden), [figure, hidden]);
  const latest = useRef({ drawn, figure, onAt, onStep });
  latest.current = { drawn, figure, onAt, onStep };
  const shape = `${scheme} ${log} ${figure.unit} ${drawn.series.map((series) => series.label).join("\n")}`;
  const known = width > 0;

  // biome-ignore lint/correctness/useExhaustiveDependencies: made anew when its shape changes; data and size are set below
  useEffect(() => {
    if (!known || !host.current) return;
    const ink = scheme === "dark" ? "#a6a7ab" : "#495057";
    const grid = { stroke: scheme === "dark" ? "#ffffff14" : "#00000012", width: 1 };
    const made = new uPlot(
      {
        width,
        height: HEIGHT,
        series: latest.current.drawn.series,
        bands: latest.current.drawn.bands,
        legend: { show: false },
        cursor: { sync: { key: "steps" }, points: { size: 6 }, drag: { x: true, y: false } },
        scales: {
          x: { time: false },
          y: { distr: log ? 3 : 1, range: log ? undefined : padded(figure) },
        },
        axes: [
          {
            stroke: ink,
            grid,
            ticks: grid,
            font: "11px system-ui",
            size: 28,
            incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000],
          },
          {
            stroke: ink,
            grid,
            ticks: grid,
            font: "11px system-ui",
            size: widest,
            values: (_, ticks) => ticks.map(short),
          },
        ],
        hooks: {
          setCursor: [(self) => latest.current.onAt(self.cursor.idx ?? null)],
          draw: [(self) => drawBars(self, bars)],
        },
      },
      latest.current.drawn.data,
      host.current,
    );
    made.over.addEventListener("click", () => {
      const { figure, onStep } = latest.current;
      const step = figure.steps[made.cursor.idx ?? -1];
      if (onStep && step !== undefined && step > 0) onStep(step);
    });
    made.over.style.cursor = onStep ? "pointer" : "default";
    chart.current = made;
    return () => made.destroy();
  }, [shape, known]);

  useEffect(() => chart.current?.setData(drawn.data), [drawn]);
  useEffect(() => {
    if (width > 0) chart.current?.setSize({ width, height: HEIGHT });
  }, [width]);
  return (
    <Box ref={ref} mih={HEIGHT}>
      <div ref={host} role="img" aria-label={description(figure)} />
    </Box>
  );
}

/** Shares stand between 0 and 1, sums on 0, others where they are. */
function padded(figure: Figure): uPlot.Scale.Range | undefined {
  if (figure.unit === "share") return (_self, low, high) => [Math.min(0, low ?? 0), Math.max(1, high ?? 1)];
  if (figure.stacked) return (_self, _low, high) => [0, (high ?? 1) * 1.05 || 1];
  return undefined;
}

function drawBars(self: uPlot, bars: { high: number; low: number; colour: string }[]): void {
  const { ctx } = self;
  ctx.save();
  ctx.lineWidth = 1.5 * devicePixelRatio;
  for (const bar of bars) {
    ctx.strokeStyle = bar.colour;
    self.data[0].forEach((step, at) => {
      const high = self.data[bar.high]?.[at];
      const low = self.data[bar.low]?.[at];
      if (typeof high !== "number" || typeof low !== "number") return;
      const x = self.valToPos(step, "x", true);
      ctx.beginPath();
      ctx.moveTo(x, self.valToPos(high, "y", true));
      ctx.lineTo(x, self.valToPos(low, "y", true));
      ctx.stroke();
    });
  }
  ctx.restore();
}

/** Of the labels of an axis, in pixels. */
function widest(_self: uPlot, labels: string[] | null): number {
  return Math.max(44, 20 + 6.5 * Math.max(0, ...(labels ?? []).map((label) => label.length)));
}

function short(value: number | null): string {
  if (value === null) return "";
  if (value !== 0 && Math.abs(value) < 1e-3) return Number(value.toPrecision(2)).toExponential();
  if (Math.abs(value) >= 1e6) return `${number(value / 1e6)}M`;
  if (Math.abs(value) >= 1e4) return `${number(value / 1e3)}k`;
  return number(value);
}

function Legend({
  figure,
  hidden,
  toggle,
  at,
}: {
  figure: Figure;
  hidden: ReadonlySet<string>;
  toggle: (label: string) => void;
  at: number | null;
}) {
  const step = at === null ? undefined : figure.steps[at];
  return (
    <Group gap="xs" mt={4} style={{ rowGap: 0 }}>
      <Text size="xs" c="dimmed" style={{ fontVariantNumeric: "tabular-nums" }}>
        {step === undefined ? "last" : `step ${step}`}
      </Text>
      {figure.lines.map((line) => {
        const value = at === null ? last(figure, line)?.value : line.values[at];
        return (
          <UnstyledButton
            key={line.label}
            onClick={() => toggle(line.label)}
            aria-pressed={!hidden.has(line.label)}
            maw="100%"
          >
            <Group gap={4} wrap="nowrap" opacity={hidden.has(line.label) ? 0.4 : 1}>
              <Box
                w={10}
                h={10}
                style={{
                  borderRadius: line.points ? 5 : 2,
                  background: categorical(line.colour, 1, line.shade),
                  flexShrink: 0,
                }}
              />
              <Text size="xs" truncate>
                <Visible text={line.label} />
              </Text>
              <Text size="xs" c="dimmed" style={{ fontVariantNumeric: "tabular-nums" }}>
                {figure.unit === "seconds" ? duration(value) : number(value)}
              </Text>
            </Group>
          </UnstyledButton>
        );
      })}
    </Group>
  );
}

function Values({ figure }: { figure: Figure }) {
  const rows = figure.steps.map((step, at) => ({ step, at })).slice(-ROWS);
  return (
    <ScrollArea h={HEIGHT}>
      <Table stickyHeader fz="xs" verticalSpacing={2}>
        <Table.Thead>
          <Table.Tr>
            <Table.Th>step</Table.Th>
            {figure.lines.map((line) => (
              <Table.Th key={line.label}>
                <Visible text={line.label} />
              </Table.Th>
            ))}
          </Table.Tr>
        </Table.Thead>
        <Table.Tbody>
          {rows.map(({ step, at }) => (
            <Table.Tr key={step}>
              <Table.Td>{step}</Table.Td>
              {figure.lines.map((line) => (
                <Table.Td key={line.label}>
                  {number(line.values[at])}
                  {line.low && line.high && line.values[at] != null && (
                    <Text span size="xs" c="dimmed">
                      {" "}
                      {number(line.low[at])} … {number(line.high[at])}
                    </Text>
                  )}
                </Table.Td>
              ))}
            </Table.Tr>
          ))}
        </Table.Tbody>
      </Table>
      {figure.steps.length > ROWS && (
        <Text size="xs" c="dimmed">
          the last {ROWS} of {number(figure.steps.length)} steps
        </Text>
      )}
    </ScrollArea>
  );
}

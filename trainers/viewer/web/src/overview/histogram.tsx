import { Box, Group, Paper, Text } from "@mantine/core";
import { useEffect, useRef, useState } from "react";
import type { RunDetail } from "../records";
import { CopyJson } from "../shared/copy-json";
import { number } from "../shared/format";

const HEIGHT = 200;

/** Advantages of the trained tokens, a column a step: how they spread, and whether they stay around zero. */
export function AdvantageMap({ run }: { run: RunDetail }) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const [at, setAt] = useState<number | null>(null);
  const { advantage_counts: counts, advantage_edges: edges, steps } = run;
  const bins = edges.length - 1;
  useEffect(() => {
    const context = canvas.current?.getContext("2d");
    if (!context) return;
    context.clearRect(0, 0, counts.length, bins);
    counts.forEach((column, x) => {
      const most = Math.max(1, ...(column ?? []));
      column?.forEach((count, bin) => {
        const middle = ((edges[bin] ?? 0) + (edges[bin + 1] ?? 0)) / 2;
        context.fillStyle = `rgb(${middle > 0 ? "34 139 230" : "247 103 7"} / ${count ? 0.15 + (0.85 * count) / most : 0})`;
        context.fillRect(x, bins - 1 - bin, 1, 1);
      });
    });
  }, [counts, edges, bins]);
  const known = counts.findLastIndex((column) => column !== null);
  if (bins < 1 || known < 0) return null;
  const place = at ?? known;
  const column = counts[place] ?? [];
  const total = column.reduce((sum, count) => sum + count, 0);
  const positive = column.reduce((sum, count, bin) => ((edges[bin] ?? 0) >= 0 ? sum + count : sum), 0);
  return (
    <Paper withBorder p="xs" component="section" aria-label="Advantages" data-figure="advantages">
      <Group justify="space-between" wrap="nowrap">
        <Text fw={600} size="sm" component="h3">
          Advantages
        </Text>
        <CopyJson data={{ steps, edges, counts }} small />
      </Group>
      <Group gap={6} wrap="nowrap" align="stretch">
        <Text
          size="xs"
          c="dimmed"
          component="div"
          style={{ display: "grid", alignContent: "space-between", textAlign: "right" }}
        >
          <span>{edges[bins]}</span>
          <span>0</span>
          <span>{edges[0]}</span>
        </Text>
        <Box flex={1} bd="1px solid var(--mantine-color-default-border)">
          <canvas
            ref={canvas}
            width={counts.length}
            height={bins}
            role="img"
            aria-label={`Advantages at step ${steps[place]}: ${number(positive)} of ${number(total)} trained tokens at zero or above`}
            style={{ width: "100%", height: HEIGHT - 8, imageRendering: "pixelated", display: "block" }}
            onPointerMove={(event) => {
              const box = event.currentTarget.getBoundingClientRect();
              setAt(
                Math.min(
                  counts.length - 1,
                  Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * counts.length)),
                ),
              );
            }}
            onPointerLeave={() => setAt(null)}
          />
        </Box>
      </Group>
      <Text size="xs" c="dimmed" mt={4}>
        step {steps[place]}: {number(positive)} of {number(total)} trained tokens at zero or above
      </Text>
    </Paper>
  );
}

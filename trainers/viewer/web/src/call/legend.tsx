import { Group, Text } from "@mantine/core";
import { memo } from "react";
import { number } from "../shared/format";
import type { KindLegend, Legend, NumberLegend } from "./painting";

const WIDTH = 216;
const HEIGHT = 18;
const BAR = 8;
/** Room for the labels of the ends. */
const SIDE = 18;

/** What colours mean, and how many tokens have them. */
export const LegendOf = memo(function LegendOf({ legend }: { legend: Legend | null }) {
  if (!legend) return null;
  return legend.type === "number" ? <Numbers legend={legend} /> : <Kinds legend={legend} />;
});

function Numbers({ legend }: { legend: NumberLegend }) {
  const { low, high, bins, ticks } = legend;
  const step = WIDTH / bins.length;
  const most = Math.log1p(Math.max(...bins, 1));
  const value = (bin: number) => low + ((bin + 0.5) / bins.length) * (high - low);
  const left = (at: number) => ((at - low) / (high - low)) * WIDTH;
  return (
    <svg
      width={WIDTH + 2 * SIDE}
      height={HEIGHT + BAR + 13}
      viewBox={`${-SIDE} 0 ${WIDTH + 2 * SIDE} ${HEIGHT + BAR + 13}`}
      role="img"
      aria-label={`Scale of ${legend.title}`}
    >
      <title>{`${legend.title}: the scale, and how many tokens are where (heights are logarithmic)`}</title>
      {bins.map((count, bin) => {
        const height = (Math.log1p(count) / most) * HEIGHT;
        return (
          // biome-ignore lint/suspicious/noArrayIndexKey: bins have no identity but their place
          <g key={bin}>
            <rect
              x={bin * step}
              y={HEIGHT - height}
              width={Math.max(step - 0.6, 0.5)}
              height={height}
              fill="var(--mantine-color-dimmed)"
              opacity={0.6}
            />
            <rect x={bin * step} y={HEIGHT + 1} width={step + 0.1} height={BAR} fill={legend.colour(value(bin))} />
          </g>
        );
      })}
      <rect
        x={0}
        y={HEIGHT + 1}
        width={WIDTH}
        height={BAR}
        fill="none"
        stroke="var(--mantine-color-default-border)"
        strokeWidth={1}
      />
      {ticks.map(({ at, label }) => (
        <text
          key={label}
          x={left(at)}
          y={HEIGHT + BAR + 12}
          fontSize={10}
          textAnchor="middle"
          fill="var(--mantine-color-dimmed)"
        >
          {label}
        </text>
      ))}
    </svg>
  );
}

function Kinds({ legend }: { legend: KindLegend }) {
  return (
    <Group gap="4px 10px" aria-label={legend.title}>
      <Text size="xs" c="dimmed">
        {legend.title}
      </Text>
      {legend.entries.map(({ name, colour, count }) => (
        <Group key={name} gap={4} wrap="nowrap">
          <span style={{ width: 12, height: 12, borderRadius: 2, background: colour }} />
          <Text size="xs" style={{ fontVariantNumeric: "tabular-nums" }}>
            {name}{" "}
            <Text span c="dimmed" inherit>
              {number(count)}
            </Text>
          </Text>
        </Group>
      ))}
      {legend.others > 0 && (
        <Text size="xs" c="dimmed">
          others {number(legend.others)}
        </Text>
      )}
    </Group>
  );
}

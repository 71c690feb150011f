import { Group, RangeSlider, Stack, Text, TextInput } from "@mantine/core";
import { useState } from "react";
import type { Range } from "../records";
import { number } from "../shared/format";
import { type Bounds, boundsText, isOpen, readBounds } from "./filters";
import { useDraft } from "./use-draft";

interface Props {
  label: string;
  bounds: Bounds;
  /** What there is. */
  range: Range;
  whole?: boolean;
  apply: (bounds: string | null) => void;
}

const TYPED = { wait: 250, echo: (written: string) => text(parse(written)) };

/** From and to: two numbers and, where it is known what there is, a slider for both. */
export function RangeField({ label, bounds, range, whole = true, apply }: Props) {
  const [low, setLow] = useDraft(text(bounds[0]), (next) => change([parse(next), bounds[1]]), TYPED);
  const [high, setHigh] = useDraft(text(bounds[1]), (next) => change([bounds[0], parse(next)]), TYPED);
  const change = (next: Bounds) => apply(boundsText(next));
  const slide = ([from, to]: [number, number]) =>
    change([from <= range.low ? null : tidy(from), to >= range.high ? null : tidy(to)]);
  const ends: [number, number] = [within(bounds[0] ?? range.low, range), within(bounds[1] ?? range.high, range)];
  const [dragged, setDragged] = useState<[number, number] | null>(null);
  return (
    <Stack gap={6} miw={220}>
      <Text size="xs" fw={600}>
        {label}
      </Text>
      <Group gap={6} wrap="nowrap" align="center">
        <End label={`${label}: at least`} placeholder={number(range.low)} value={low} change={setLow} />
        <Text size="xs" c="dimmed">
          to
        </Text>
        <End label={`${label}: at most`} placeholder={number(range.high)} value={high} change={setHigh} />
      </Group>
      {range.high > range.low && (
        <RangeSlider
          size="sm"
          mx={6}
          color={isOpen(bounds) ? "gray" : undefined}
          min={range.low}
          max={range.high}
          step={whole ? 1 : (range.high - range.low) / 100}
          minRange={0}
          label={(value) => number(value)}
          thumbFromLabel={`${label}: at least`}
          thumbToLabel={`${label}: at most`}
          value={dragged ?? ends}
          onChange={setDragged}
          onChangeEnd={(chosen) => {
            setDragged(null);
            slide(chosen);
          }}
        />
      )}
    </Stack>
  );
}

function End(props: { label: string; placeholder: string; value: string; change: (text: string) => void }) {
  return (
    <TextInput
      size="xs"
      w={96}
      inputMode="decimal"
      aria-label={props.label}
      placeholder={props.placeholder}
      value={props.value}
      error={props.value.trim() !== "" && parse(props.value) === null}
      onChange={(event) => props.change(event.currentTarget.value)}
    />
  );
}

function text(value: number | null): string {
  return value === null ? "" : String(value);
}

function parse(text: string): number | null {
  return text.includes(",") ? null : readBounds(text)[0];
}

function within(value: number, { low, high }: Range): number {
  return Math.max(low, Math.min(value, high));
}

/** Without what binary fractions add. */
function tidy(value: number): number {
  return Number(value.toPrecision(6));
}

import { Group, NativeSelect, NumberInput, SegmentedControl } from "@mantine/core";
import { setQuery } from "../address";
import { LegendOf } from "./legend";
import { COLOURS, type Colour, type Painting, TITLES } from "./painting";

/** Which colours there are, and what they mean. */
export function Colours({
  colour,
  missing,
  layer,
  layers,
  painting,
}: {
  colour: Colour;
  /** Why a colour cannot be chosen. */
  missing: Partial<Record<Colour, string>>;
  layer: number;
  layers: number;
  painting: Painting;
}) {
  const choices = [...COLOURS, "none" as const].map((value) => ({
    value,
    label: missing[value] ? <span title={missing[value]}>{TITLES[value]}</span> : TITLES[value],
    name: TITLES[value],
    disabled: missing[value] !== undefined,
  }));
  const choose = (value: string) => setQuery({ colour: value });
  return (
    <Group gap="4px 16px" align="center" mih={40}>
      <SegmentedControl
        visibleFrom="sm"
        size="xs"
        data={choices.map(({ value, label, disabled }) => ({ value, label, disabled }))}
        value={colour}
        onChange={choose}
        aria-label="Colour tokens by"
      />
      <NativeSelect
        hiddenFrom="sm"
        size="xs"
        data={choices.map(({ value, name, disabled }) => ({ value, label: name, disabled }))}
        value={colour}
        onChange={(event) => choose(event.currentTarget.value)}
        aria-label="Colour tokens by"
      />
      {colour === "expert" && (
        <NumberInput
          size="xs"
          w={90}
          prefix="layer "
          min={0}
          max={layers - 1}
          value={layer}
          onChange={(value) => typeof value === "number" && setQuery({ layer: value })}
          aria-label="Layer"
        />
      )}
      <LegendOf legend={painting.legend} />
    </Group>
  );
}

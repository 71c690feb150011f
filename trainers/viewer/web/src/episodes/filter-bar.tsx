import { Button, Checkbox, Group, Popover, ScrollArea, Stack, Text, TextInput } from "@mantine/core";
import { IconChevronDown, IconSearch } from "@tabler/icons-react";
import { type KeyboardEvent, type ReactNode, type RefObject, useState } from "react";
import type { Query } from "../address";
import type { Facets, Range } from "../records";
import { number, words } from "../shared/format";
import { Name } from "./columns";
import { boundsWords, type Filters, isOpen, OPEN, type RangeName, toggled } from "./filters";
import { RangeField } from "./range-field";
import { useDraft } from "./use-draft";

export interface Filtering {
  filters: Filters;
  /** What there is to choose from; not here at first. */
  facets: Facets | undefined;
  apply: (changes: Query) => void;
}

export function SearchFields({
  filters,
  apply,
  search,
  leave,
}: Filtering & { search: RefObject<HTMLInputElement | null>; leave: () => void }) {
  const [text, setText] = useDraft(filters.text, (next) => apply({ text: next.trim() }));
  const [task, setTask] = useDraft(filters.task, (next) => apply({ task: next.trim() }));
  const keys = (event: KeyboardEvent<HTMLInputElement>) => {
    if (event.key !== "Escape" && event.key !== "Enter" && event.key !== "ArrowDown") return;
    event.preventDefault();
    event.currentTarget.blur();
    if (event.key !== "Escape") leave();
  };
  return (
    <>
      <TextInput
        ref={search}
        size="xs"
        w={{ base: "auto", sm: 250 }}
        flex={{ base: 1, sm: "none" }}
        type="search"
        aria-label="Words that were said"
        placeholder="Words that were said"
        leftSection={<IconSearch size={14} />}
        value={text}
        onChange={(event) => setText(event.currentTarget.value)}
        onKeyDown={keys}
      />
      <TextInput
        size="xs"
        w={{ base: "100%", sm: 130 }}
        type="search"
        aria-label="Part of the task's name"
        placeholder="Task"
        value={task}
        onChange={(event) => setTask(event.currentTarget.value)}
        onKeyDown={keys}
        visibleFrom="sm"
      />
    </>
  );
}

/** Filters that are chosen in a menu of their own; in a drawer one below the other. */
export function Menus({ filters, facets, apply, spread = false }: Filtering & { spread?: boolean }) {
  if (!facets) return null;
  const ranges: [RangeName, string, Range | null, boolean][] = [
    ["step", "Step", facets.steps, true],
    ["version", "Version", facets.versions, true],
    ["calls", "Calls", facets.calls, true],
    ["tokens", "Tokens", facets.tokens, true],
    ["seconds", "Seconds", UNKNOWN, false],
  ];
  const range = ([name, label, range, whole]: (typeof ranges)[number]) => {
    if (!range || (range !== UNKNOWN && range.low === range.high && isOpen(filters.ranges[name]))) return null;
    const field = (
      <RangeField
        label={label}
        bounds={filters.ranges[name]}
        range={range}
        whole={whole}
        apply={(bounds) => apply({ [name]: bounds })}
      />
    );
    if (spread) return <div key={name}>{field}</div>;
    return (
      <Menu key={name} label={label} active={isOpen(filters.ranges[name]) ? "" : boundsWords(filters.ranges[name])}>
        {field}
      </Menu>
    );
  };
  const rewards = Object.entries(facets.rewards);
  const set = Object.keys(filters.rewards).length;
  return (
    <>
      {range(ranges[0] as (typeof ranges)[number])}
      {rewards.length > 0 && (
        <Section spread={spread} label="Rewards" active={set > 0 ? String(set) : ""}>
          <Stack gap="md">
            {rewards.map(([name, range]) => (
              <RangeField
                key={name}
                label={words(name)}
                bounds={filters.rewards[name] ?? OPEN}
                range={range}
                whole={false}
                apply={(bounds) => apply({ [`reward.${name}`]: bounds })}
              />
            ))}
          </Stack>
        </Section>
      )}
      {Object.keys(facets.agents).length > 0 && (
        <Section spread={spread} label="Agents" active={filters.agent.length > 0 ? String(filters.agent.length) : ""}>
          <Choices
            counts={facets.agents}
            chosen={filters.agent}
            toggle={(agent) => apply({ agent: toggled(filters.agent, agent) })}
          />
        </Section>
      )}
      {ranges.slice(1).map(range)}
    </>
  );
}

/** Nobody says what the shortest and the longest took. */
const UNKNOWN: Range = { low: 0, high: 0 };

function Section(props: { spread: boolean; label: string; active: string; children: ReactNode }) {
  if (props.spread) return <div>{props.children}</div>;
  return (
    <Menu label={props.label} active={props.active}>
      {props.children}
    </Menu>
  );
}

function Menu({ label, active, children }: { label: string; active: string; children: ReactNode }) {
  return (
    <Popover position="bottom-start" shadow="md" trapFocus returnFocus>
      <Popover.Target>
        <Button
          size="compact-sm"
          fz="xs"
          variant={active ? "light" : "default"}
          fw={500}
          rightSection={<IconChevronDown size={12} />}
        >
          {label}
          {active && ` ${active}`}
        </Button>
      </Popover.Target>
      <Popover.Dropdown p="sm">
        <ScrollArea.Autosize mah="60vh" type="auto">
          {children}
        </ScrollArea.Autosize>
      </Popover.Dropdown>
    </Popover>
  );
}

const MANY = 12;

function Choices(props: { counts: Record<string, number>; chosen: string[]; toggle: (name: string) => void }) {
  const [part, setPart] = useState("");
  const all = Object.entries(props.counts).sort(([, one], [, other]) => other - one);
  const shown = all.filter(([name]) => name.toLowerCase().includes(part.toLowerCase()));
  return (
    <Stack gap={6} miw={200}>
      {all.length > MANY && (
        <TextInput
          size="xs"
          placeholder="Part of a name"
          aria-label="Part of a name"
          value={part}
          onChange={(event) => setPart(event.currentTarget.value)}
        />
      )}
      {shown.slice(0, 200).map(([name, count]) => (
        <Checkbox
          key={name}
          size="xs"
          checked={props.chosen.includes(name)}
          onChange={() => props.toggle(name)}
          label={
            <>
              <Name text={name || "(no name)"} />{" "}
              <Text span size="xs" c="dimmed">
                {number(count)}
              </Text>
            </>
          }
        />
      ))}
    </Stack>
  );
}

/** Outcomes and phases with how many there are of each, to switch on and off. */
export function Toggles({ filters, facets, apply }: Filtering) {
  if (!facets) return null;
  return (
    <Group gap={4}>
      {known(facets.outcomes, filters.outcome).map(([name, count]) => (
        <Toggle
          key={name}
          label={words(name)}
          count={count}
          on={filters.outcome.includes(name)}
          flip={() => apply({ outcome: toggled(filters.outcome, name) })}
        />
      ))}
      <Text span c="dimmed" size="xs" px={4} aria-hidden>
        |
      </Text>
      {known(facets.phases, filters.phase).map(([name, count]) => (
        <Toggle
          key={name}
          label={name}
          count={count}
          on={filters.phase.includes(name)}
          flip={() => apply({ phase: toggled(filters.phase, name) })}
        />
      ))}
      <Text span c="dimmed" size="xs" px={4} aria-hidden>
        |
      </Text>
      <Toggle
        label={filters.counted === false ? "not counted" : "counted"}
        on={filters.counted !== null}
        flip={() => apply({ counted: filters.counted === null ? true : filters.counted ? false : null })}
      />
    </Group>
  );
}

/** Those that there are, and those that are chosen although there are none (left). */
function known(counts: Record<string, number>, chosen: string[]): [string, number][] {
  const none = chosen.filter((name) => !(name in counts)).map((name): [string, number] => [name, 0]);
  return [...Object.entries(counts).filter(([name, count]) => count > 0 || chosen.includes(name)), ...none];
}

function Toggle({ label, count, on, flip }: { label: string; count?: number; on: boolean; flip: () => void }) {
  return (
    <Button size="compact-xs" radius="xl" variant={on ? "filled" : "default"} fw={500} aria-pressed={on} onClick={flip}>
      <Name text={label} />
      {count !== undefined && (
        <Text span size="xs" ml={5} c={on ? undefined : "dimmed"} style={{ fontVariantNumeric: "tabular-nums" }}>
          {number(count)}
        </Text>
      )}
    </Button>
  );
}

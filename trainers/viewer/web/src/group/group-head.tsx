import { Anchor, Group, Text as Paragraph, SegmentedControl, Tooltip } from "@mantine/core";
import { href } from "../address";
import { spread } from "../episode/siblings";
import type { GroupView, SampleView } from "../records";
import { CopyJson } from "../shared/copy-json";
import { number, words } from "../shared/format";
import { Neighbour } from "../shared/neighbour";
import { diverging } from "../shared/scales";
import { Visible } from "../shared/written";
import type { Choice, Mode } from "./choice";
import classes from "./group.module.css";

interface Props {
  run: string;
  view: GroupView;
  choice: Choice;
  mode: Mode;
  select: (sample: SampleView) => void;
  change: (mode: Mode) => void;
}

/** What the group is, which of its samples are looked at, and the ways to others. */
export function GroupHead({ run, view, choice, mode, select, change }: Props) {
  const { samples, phase, step } = view;
  const totals = samples.map(({ total }) => total).filter((total) => total !== null);
  const { mean } = spread(totals);
  const group = (name: string | null) => name && href("run", run, "group", name);
  const facts = [
    phase === "train" ? `step ${step}` : `${words(phase)}, step ${step}`,
    `${number(samples.length)} ${samples.length === 1 ? "sample" : "samples"}`,
    ...(totals.length > 0
      ? [`reward ${number(Math.min(...totals))} to ${number(Math.max(...totals))}, mean ${number(mean)}`]
      : []),
  ];
  return (
    <Group justify="space-between" gap="xs" align="flex-start">
      <div style={{ minWidth: 0, flex: "1 1 16rem" }}>
        <Paragraph fw={600} style={{ overflowWrap: "anywhere" }}>
          <Visible text={view.task} />
        </Paragraph>
        <Paragraph size="xs" c="dimmed">
          {facts.join(" · ")}
        </Paragraph>
      </div>
      <Group gap={8}>
        <Chips samples={samples} choice={choice} mean={mean} select={select} />
        {mode !== "one" && samples.length > 2 && (
          <SegmentedControl
            size="xs"
            value={mode}
            onChange={(value) => change(value === "all" ? "all" : "pair")}
            data={[
              { value: "pair", label: "Two" },
              { value: "all", label: "All" },
            ]}
          />
        )}
        {phase === "train" && (
          <Anchor size="xs" href={href("run", run, "credit", view.group)}>
            credit
          </Anchor>
        )}
        <Group gap={4}>
          <Neighbour to={group(view.before)} label="Group before ([)" side="before" />
          <Neighbour to={group(view.after)} label="Group after (])" side="after" />
        </Group>
        <CopyJson data={view} small={mode === "one"} />
      </Group>
    </Group>
  );
}

/** The samples by their totals, the best first; a click puts one beside the first. */
function Chips(props: { samples: SampleView[]; choice: Choice; mean: number; select: (sample: SampleView) => void }) {
  const { samples, choice, mean, select } = props;
  const { most } = spread(samples.map(({ total }) => total));
  return (
    <Group gap={4} role="group" aria-label="Samples, the best first">
      {samples.map((sample) => (
        <Tooltip key={sample.episode} label={`${named(sample)}: ${words(sample.outcome ?? "running")}`}>
          <button
            type="button"
            className={classes.chip}
            aria-pressed={sample === choice.selected}
            aria-label={`${named(sample)}, total ${number(sample.total)}`}
            data-shown={choice.shown.includes(sample)}
            data-counted={sample.counted}
            style={{ background: sample.total === null ? undefined : diverging(sample.total - mean, most) }}
            onClick={() => select(sample)}
          >
            {sample.total === null ? (sample.outcome === null ? "…" : "–") : number(sample.total)}
          </button>
        </Tooltip>
      ))}
    </Group>
  );
}

export function named({ sample, attempt }: SampleView): string {
  return `sample ${sample}${attempt > 0 ? `, attempt ${attempt + 1}` : ""}`;
}

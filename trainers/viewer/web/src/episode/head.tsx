import { Anchor, Group, Text as Paragraph, Tooltip } from "@mantine/core";
import { href, withQuery } from "../address";
import type { EpisodeView } from "../records";
import { CopyJson } from "../shared/copy-json";
import { duration, number, words } from "../shared/format";
import { Neighbour } from "../shared/neighbour";
import { OutcomeBadge } from "../shared/outcome";
import { diverging } from "../shared/scales";
import { Visible } from "../shared/written";
import styles from "./episode.module.css";
import { spread } from "./siblings";
import { calls } from "./tree";

/** What the episode is, how it ended, and the ways from it to others. */
export function Head({ run, view, now }: { run: string; view: EpisodeView; now: number }) {
  const made = calls(view.nodes);
  const tokens = made.reduce((sum, call) => sum + call.sampled_tokens, 0);
  const took = (view.ended_at ?? now) - view.started_at;
  const episode = (id: string | null) => id && href("run", run, "episode", id);
  const facts = [
    view.phase === "train" ? `step ${view.step}` : `${words(view.phase)}, step ${view.step}`,
    `sample ${view.sample}${view.attempt > 0 ? `, attempt ${view.attempt + 1}` : ""}`,
    `${number(made.length)} ${made.length === 1 ? "call" : "calls"}`,
    `${number(tokens)} tokens`,
    duration(took),
  ];
  return (
    <Group justify="space-between" gap="xs" align="flex-start">
      <div style={{ minWidth: 0, flex: "1 1 20rem" }}>
        <Group gap={8}>
          <Paragraph fw={600} style={{ overflowWrap: "anywhere" }}>
            <Visible text={view.task} />
          </Paragraph>
          <OutcomeBadge outcome={view.outcome} counted={view.counted} />
          {view.total !== null && (
            <Paragraph fw={600} style={{ fontVariantNumeric: "tabular-nums" }}>
              R {number(view.total)}
            </Paragraph>
          )}
          <RewardWords view={view} />
        </Group>
        <Paragraph size="xs" c="dimmed">
          {facts.join(" · ")}
        </Paragraph>
      </div>
      <Group gap={6}>
        <Siblings run={run} view={view} />
        {view.group && (
          <>
            <Anchor size="xs" href={href("run", run, "group", view.group)}>
              group
            </Anchor>
            {view.phase === "train" && (
              <Anchor size="xs" href={withQuery(href("run", run, "credit", view.group), { episode: view.id })}>
                credit
              </Anchor>
            )}
          </>
        )}
        <Neighbour to={episode(view.before)} label="Episode before ([)" side="before" />
        <Neighbour to={episode(view.after)} label="Episode after (])" side="after" />
        <CopyJson data={view} />
      </Group>
    </Group>
  );
}

function RewardWords({ view }: { view: EpisodeView }) {
  const sums = new Map<string, { value: number; weight: number }>();
  for (const { name, value, weight } of [...view.rewards, ...view.nodes.flatMap((node) => node.rewards)]) {
    sums.set(name, { value: (sums.get(name)?.value ?? 0) + value, weight });
  }
  if (sums.size === 0) return null;
  return (
    <Paragraph size="xs" c="dimmed">
      {[...sums].map(([name, { value, weight }], at) => (
        <span key={name}>
          {at > 0 && " + "}
          {weight !== 1 && `${number(weight)} · `}
          <Visible text={name} /> {number(value)}
        </span>
      ))}
    </Paragraph>
  );
}

function Siblings({ run, view }: { run: string; view: EpisodeView }) {
  if (view.siblings.length < 2) return null;
  const totals = view.siblings.map((sibling) => (sibling.id === view.id ? view.total : sibling.total));
  const { mean, most } = spread(totals);
  return (
    <Group gap={3} role="navigation" aria-label="Episodes of the same group">
      {view.siblings.map((sibling, at) => {
        const total = totals[at] ?? null;
        const outcome = sibling.outcome === null ? "running" : words(sibling.outcome);
        return (
          <Tooltip
            key={sibling.id}
            label={`sample ${sibling.sample}${sibling.attempt ? `, attempt ${sibling.attempt + 1}` : ""}: ${outcome}${sibling.counted ? "" : ", not counted"}`}
          >
            <a
              href={href("run", run, "episode", sibling.id)}
              className={styles.sibling}
              aria-current={sibling.id === view.id}
              data-counted={sibling.counted}
              style={{ background: total === null ? undefined : diverging(total - mean, most) }}
            >
              {total === null ? (sibling.outcome === null ? "…" : "–") : number(total, 2)}
            </a>
          </Tooltip>
        );
      })}
    </Group>
  );
}

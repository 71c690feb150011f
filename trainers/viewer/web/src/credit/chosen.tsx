import { Anchor, Button, Group, Text as Paragraph, Stack } from "@mantine/core";
import { IconArrowRight } from "@tabler/icons-react";
import { href, withQuery } from "../address";
import { relationSentence, replyWords } from "../episode/words";
import type { CallCredit, EpisodeView, GroupReport, RuleCredit } from "../records";
import { number, signed } from "../shared/format";
import { maskSentence } from "../shared/masks";
import { Visible } from "../shared/written";
import { ofRun, useAnswer } from "../source";
import type { Column } from "./columns";
import styles from "./credit.module.css";
import { fixed } from "./given";
import { type Line, ofRollout, returnsOf, tokensOf } from "./table";

interface Props {
  run: string;
  report: GroupReport;
  others: Column[];
  line: Line | null;
}

/** What the chosen row is, and what each rule says of it in words. */
export function Chosen({ run, report, others, line }: Props) {
  if (line === null) {
    return (
      <Paragraph size="sm" c="dimmed">
        Choose a row to read what it was, and what each rule says of it.
      </Paragraph>
    );
  }
  return line.kind === "rollout" ? (
    <ChosenRollout run={run} report={report} others={others} line={line} />
  ) : (
    <ChosenCall run={run} report={report} others={others} line={line} />
  );
}

function ChosenRollout({ run, report, others, line }: Props & { line: Line & { kind: "rollout" } }) {
  const { rollout } = line;
  const { mean } = returnsOf(report.rollouts);
  const apart = rollout.ret - mean;
  return (
    <Stack gap="sm">
      <Group justify="space-between" wrap="nowrap">
        <Paragraph fw={600}>Sample {rollout.sample}</Paragraph>
        <Open address={href("run", run, "episode", rollout.episode)} label="Episode" />
      </Group>
      <Paragraph size="sm">
        Its return of {number(rollout.ret)} is{" "}
        {apart === 0
          ? "the mean of the group."
          : `${number(Math.abs(apart))} ${apart > 0 ? "above" : "below"} the group's mean.`}
      </Paragraph>
      <Named where="earned at no call" rewards={rollout.outcome_rewards} />
      <Judged report={report} others={others} say={(credit) => rolloutWords(line, credit)} />
    </Stack>
  );
}

/** What each rule says of it, the run's own first. */
function Judged({ report, others, say }: Pick<Props, "report" | "others"> & { say: (credit: RuleCredit) => string }) {
  const own = { rule: report.own.rule, credit: report.own, missing: report.own.unknown };
  return (
    <table className={styles.judged}>
      <tbody>
        {[own, ...others].map(({ rule, credit, missing }) => (
          <tr key={rule}>
            <th scope="row">{rule.slice(0, 60)}</th>
            <td>{missing || (credit ? say(credit) : "being computed")}</td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}

function rolloutWords({ rollout }: Line, credit: RuleCredit): string {
  const { advantage, trained } = ofRollout(rollout, credit);
  if (advantage === null) return "none of its calls is trained on";
  const tokens = tokensOf(rollout, credit);
  return `${fixed(advantage)} in the mean of ${number(trained)} trained ${trained === 1 ? "call" : "calls"}, ${number(tokens.trained)} of ${number(tokens.sampled)} tokens`;
}

function ChosenCall({ run, report, others, line }: Props & { line: Line & { kind: "call" } }) {
  const { call, rollout } = line;
  const episode = useAnswer<EpisodeView>(ofRun(run, "episode"), { id: rollout.episode });
  const node = episode.data?.nodes.find((each) => each.id === call.id);
  const before = rollout.calls.find((each) => each.id === call.parent_id);
  return (
    <Stack gap="sm">
      <Group justify="space-between" wrap="nowrap">
        <Paragraph fw={600} style={{ overflowWrap: "anywhere" }}>
          #{call.index} <Visible text={call.agent.slice(0, 120)} />
        </Paragraph>
        <Open address={href("run", run, "call", call.id)} label="Tokens" />
      </Group>
      <Paragraph size="xs" c="dimmed">
        {number(call.sampled)} sampled {call.sampled === 1 ? "token" : "tokens"}.{" "}
        {relationSentence(call, before ? `call #${before.index}` : "an earlier call")}{" "}
        <Anchor size="xs" href={withQuery(href("run", run, "episode", rollout.episode), { node: call.id })}>
          In its episode
        </Anchor>
      </Paragraph>
      {node?.type === "call" && (
        <div className={`${styles.reply} written`}>
          <Visible text={replyWords(node.reply, 400) || "nothing"} />
        </div>
      )}
      <Named where="earned here" rewards={call.rewards} />
      <Judged report={report} others={others} say={(credit) => callWords(credit.calls[call.id], call.sampled)} />
    </Stack>
  );
}

function callWords(given: CallCredit | undefined, sampled: number): string {
  if (!given) return "says nothing about this call";
  if (given.masked !== null) return `Not trained on. ${maskSentence(given.masked)}`;
  const cut = given.with_loss < sampled ? `, on ${number(given.with_loss)} of ${number(sampled)} tokens` : "";
  return `${fixed(given.advantage)}, of a return of ${number(given.ret)}${cut}`;
}

function Named({ where, rewards }: { where: string; rewards: Record<string, number> }) {
  const entries = Object.entries(rewards);
  if (entries.length === 0) return null;
  return (
    <Paragraph size="xs">
      {where}:{" "}
      {entries.map(([name, value], at) => (
        <span key={name}>
          {at > 0 && ", "}
          <Visible text={name.slice(0, 120)} /> <strong>{signed(value)}</strong>
        </span>
      ))}
    </Paragraph>
  );
}

function Open({ address, label }: { address: string; label: string }) {
  return (
    <Button
      component="a"
      href={address}
      size="compact-sm"
      variant="light"
      rightSection={<IconArrowRight size={14} />}
      style={{ flex: "none" }}
    >
      {label}
    </Button>
  );
}

import { Alert, Anchor, Button, Drawer, Group, Text as Paragraph, SegmentedControl } from "@mantine/core";
import { useMediaQuery } from "@mantine/hooks";
import { memo, useCallback, useMemo, useState } from "react";
import { go, href, setQuery, useAddress, withQuery } from "../address";
import { useSelection } from "../episode/selection";
import type { GroupReport } from "../records";
import { CopyJson } from "../shared/copy-json";
import { number } from "../shared/format";
import { useKeys } from "../shared/keys";
import { Answered, Nothing } from "../shared/states";
import { Visible } from "../shared/written";
import { ofRun, useAnswer, useAnswers } from "../source";
import { Chosen } from "./chosen";
import { columnsOf, useSame } from "./columns";
import styles from "./credit.module.css";
import { CreditTable } from "./credit-table";
import { RuleChips } from "./rule-chips";
import { chosenRules, ruleSentence, toggled } from "./rules";
import {
  agentsOf,
  type Line,
  largestAdvantage,
  largestDifference,
  linesOf,
  moved,
  type Order,
  returnsOf,
} from "./table";

/** Who got what in a group: by the rule that the run trains with, and by others. */
export function CreditPage({ run, group }: { run: string; group: string }) {
  const answer = useAnswer<GroupReport>(ofRun(run, "credit"), { group });
  if (answer.error && answer.error.status >= 400 && answer.error.status < 500 && answer.data === undefined) {
    return (
      <Nothing
        title={answer.error.message}
        hint={
          <>
            {answer.error.hint}
            {answer.error.hint && " · "}
            <Anchor size="sm" href={withQuery(href("run", run, "episodes"), { group })}>
              its episodes
            </Anchor>
          </>
        }
      />
    );
  }
  return <Answered answer={answer}>{(report) => <Opened run={run} report={report} />}</Answered>;
}

const ORDERS: { value: Order; label: string }[] = [
  { value: "best", label: "Best first" },
  { value: "worst", label: "Worst first" },
  { value: "sample", label: "By sample" },
];

function Opened({ run, report }: { run: string; report: GroupReport }) {
  const { query } = useAddress();
  const narrow = useMediaQuery("(max-width: 75em)", undefined, { getInitialValueInEffect: false }) ?? false;
  const phone = useMediaQuery("(max-width: 40em)", undefined, { getInitialValueInEffect: false }) ?? false;
  const [stated, select] = useSelection();
  const selected = stated ?? query.get("episode");
  const [folded, setFolded] = useState<ReadonlySet<string>>(new Set());
  const [drawer, setDrawer] = useState(false);
  const order = ORDERS.find(({ value }) => value === query.get("order"))?.value ?? "best";
  const apart = query.get("show") === "difference";
  const { own, group } = report;

  const chosen = useSame(chosenRules(query.getAll("rule"), own.rule));
  const answers = useAnswers<GroupReport>(
    ofRun(run, "credit"),
    chosen.map((rule) => ({ group, rule })),
  );
  const came = useSame(answers.map(({ data, error }) => data ?? error ?? null));
  const others = useMemo(() => columnsOf(chosen, came), [chosen, came]);
  const known = useMemo(() => others.map(({ credit }) => credit).filter((credit) => credit !== null), [others]);
  const scale = useMemo(
    () => ({ apart, largest: largestAdvantage([own, ...known]), farthest: largestDifference(own, known) }),
    [apart, own, known],
  );
  const lines = useMemo(() => linesOf(report, order, folded), [report, order, folded]);
  const agents = useMemo(() => agentsOf(report.rollouts), [report]);
  const line = lines.find((each) => each.key === selected) ?? null;

  const fold = useCallback((episode: string) => {
    setFolded((now) => {
      const next = new Set(now);
      if (!next.delete(episode)) next.add(episode);
      return next;
    });
  }, []);
  const toggle = useCallback((rule: string) => setQuery({ rule: toggled(chosen, rule) }), [chosen]);
  const pick = useCallback(
    (key: string) => {
      select(key);
      setDrawer(true);
    },
    [select],
  );
  const move = (step: number) => select(moved(lines, selected, step));
  const close = () => {
    if (line === null) return;
    if (line.kind === "call") select(line.rollout.episode);
    else if (!line.folded) fold(line.key);
  };
  const expand = () => {
    if (line?.kind === "rollout" && line.folded) fold(line.key);
    else move(1);
  };
  const allFolded = report.rollouts.every(({ episode }) => folded.has(episode));
  const foldAll = useCallback(
    () => setFolded(new Set(allFolded ? [] : report.rollouts.map(({ episode }) => episode))),
    [allFolded, report],
  );
  const compare = () => setQuery({ show: apart ? null : "difference" });
  useKeys([
    { key: "j", label: "Next", run: () => move(1) },
    { key: "k", label: "Before", run: () => move(-1) },
    { key: "ArrowDown", label: "Next", run: () => move(1) },
    { key: "ArrowUp", label: "Before", run: () => move(-1) },
    { key: "Home", label: "First", run: () => move(Number.NEGATIVE_INFINITY) },
    { key: "End", label: "Last", run: () => move(Number.POSITIVE_INFINITY) },
    { key: "ArrowLeft", label: "Close the rollout, or go to it", run: close },
    { key: "ArrowRight", label: "Open the rollout", run: expand },
    { key: "Enter", label: "Tokens of the call, or the episode", run: () => line && go(addressOf(run, line)) },
    { key: "f", label: "Close or open all rollouts", run: foldAll },
    { key: "d", label: "Advantages, or differences to the run's rule", run: compare },
    { key: "g", label: "The group", run: () => go(href("run", run, "group", group)) },
  ]);
  const said = <Chosen run={run} report={report} others={others} line={line} />;
  return (
    <div className={styles.page}>
      <Head run={run} report={report} others={known} />
      <RuleChips own={own.rule} chosen={chosen} onToggle={toggle} />
      <Choices apart={apart} order={order} allFolded={allFolded} onFoldAll={foldAll} />
      {[
        ...report.notes,
        ...others.filter(({ missing }) => missing).map(({ rule, missing }) => `${rule}: ${missing}`),
      ].map((note) => (
        <Alert key={note} role="note" variant="light" color="gray" py={4} px="sm" style={{ flex: "none" }}>
          <Paragraph size="xs">{note}</Paragraph>
        </Alert>
      ))}
      <div className={styles.body}>
        <CreditTable
          run={run}
          lines={lines}
          own={own}
          others={others}
          agents={agents}
          scale={scale}
          selected={selected}
          narrow={phone}
          onSelect={pick}
          onFold={fold}
        />
        {!narrow && <div className={styles.beside}>{said}</div>}
      </div>
      {narrow && (
        <Drawer
          opened={drawer && line !== null}
          onClose={() => setDrawer(false)}
          position="bottom"
          size="60%"
          title="Credit"
        >
          {said}
        </Drawer>
      )}
    </div>
  );
}

interface ChoicesProps {
  apart: boolean;
  order: Order;
  allFolded: boolean;
  onFoldAll: () => void;
}

const Choices = memo(function Choices({ apart, order, allFolded, onFoldAll }: ChoicesProps) {
  return (
    <Group gap="xs">
      <SegmentedControl
        size="xs"
        value={apart ? "difference" : "advantage"}
        onChange={(value) => setQuery({ show: value === "difference" ? value : null })}
        data={[
          { value: "advantage", label: "Advantages" },
          { value: "difference", label: "Differences" },
        ]}
      />
      <SegmentedControl
        size="xs"
        value={order}
        onChange={(value) => setQuery({ order: value === "best" ? null : value })}
        data={ORDERS}
      />
      <Button size="compact-xs" variant="subtle" onClick={onFoldAll}>
        {allFolded ? "Open all" : "Close all"}
      </Button>
    </Group>
  );
});

function addressOf(run: string, line: Line): string {
  return line.kind === "call" ? href("run", run, "call", line.key) : href("run", run, "episode", line.key);
}

const Head = memo(function Head({
  run,
  report,
  others,
}: {
  run: string;
  report: GroupReport;
  others: GroupReport["others"];
}) {
  const { mean, std } = returnsOf(report.rollouts);
  const count = report.rollouts.length;
  return (
    <Group justify="space-between" gap="xs" align="flex-start">
      <div style={{ minWidth: 0, flex: "1 1 20rem" }}>
        <Group gap={8}>
          <Paragraph fw={600} style={{ overflowWrap: "anywhere" }}>
            <Visible text={report.task.slice(0, 300)} />
          </Paragraph>
          <Paragraph style={{ fontVariantNumeric: "tabular-nums" }}>
            mean return <strong>{number(mean)}</strong>
            {count > 1 && ` ± ${number(std)}`}
          </Paragraph>
        </Group>
        <Paragraph size="xs" c="dimmed">
          {number(count)} {count === 1 ? "rollout" : "rollouts"} · objective {report.objective} · credit{" "}
          {report.own.rule}: {ruleSentence(report.own.rule)}
        </Paragraph>
      </div>
      <Group gap={8}>
        <Anchor size="xs" href={href("run", run, "group", report.group)}>
          group
        </Anchor>
        <Anchor size="xs" href={withQuery(href("run", run, "episodes"), { group: report.group })}>
          episodes
        </Anchor>
        <CopyJson data={{ ...report, others }} />
      </Group>
    </Group>
  );
});

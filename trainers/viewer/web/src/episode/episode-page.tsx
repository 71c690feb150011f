import { Drawer, SegmentedControl } from "@mantine/core";
import { useMediaQuery } from "@mantine/hooks";
import { useCallback, useEffect, useMemo, useState } from "react";
import { go, href, setQuery, useAddress } from "../address";
import type { EpisodeView, Runs } from "../records";
import { useKeys } from "../shared/keys";
import { Answered, Nothing } from "../shared/states";
import { isFile, ofRun, useAnswer } from "../source";
import { turnsOf } from "./conversation";
import { ConversationView } from "./conversation-view";
import { useCreditAside } from "./credit-aside";
import { Detail } from "./detail";
import styles from "./episode.module.css";
import { Head } from "./head";
import { useSelection } from "./selection";
import { timeAside } from "./time-line";
import { axisOf, barsOf, lastTime } from "./timeline";
import { agentsOf, ancestors, failed, nextWhere, revealing, visibleRows } from "./tree";
import { TreeList } from "./tree-list";

/** How often to look whether an open episode went on: while its run may be writing it, and else. */
const POLL = 2_000;
const POLL_STOPPED = 15_000;

/** One episode: what happened in it, as a tree on a time line or as a talk, and what it was worth. */
export function EpisodePage({ run, id }: { run: string; id: string }) {
  const [open, setOpen] = useState(false);
  const stopped = useStopped(run, open);
  const every = stopped ? POLL_STOPPED : POLL;
  const answer = useAnswer<EpisodeView>(ofRun(run, "episode"), { id }, { every: open ? every : 0 });
  const state = answer.data && answer.data.ended_at === null;
  useEffect(() => setOpen(state ?? false), [state]);
  return (
    <Answered answer={answer}>
      {(view) => <Opened run={run} view={view} now={stopped ? lastTime(view) : answer.dataUpdatedAt / 1000} />}
    </Answered>
  );
}

/** Whether nobody writes the run any more, as far as the list of runs says. */
function useStopped(run: string, wanted: boolean): boolean {
  const { data } = useAnswer<Runs>("runs", {}, { every: POLL_STOPPED, enabled: wanted && !isFile });
  const state = data?.runs.find(({ key }) => key === run)?.state;
  return isFile || state === "stopped" || state === "finished" || state === "recorded";
}

type Tab = "tree" | "credit" | "conversation";
const TABS: { value: Tab; label: string }[] = [
  { value: "tree", label: "Tree" },
  { value: "conversation", label: "Conversation" },
  { value: "credit", label: "Credit" },
];

function Opened({ run, view, now }: { run: string; view: EpisodeView; now: number }) {
  const narrow = useMediaQuery("(max-width: 60em)", undefined, { getInitialValueInEffect: false }) ?? false;
  const tab = asTab(useAddress().query.get("tab"));
  const [selected, select] = useSelection();
  const [folded, setFolded] = useState<ReadonlySet<string>>(new Set());
  const [pointed, setPointed] = useState<string | null>(null);
  const [drawer, setDrawer] = useState(false);
  const { nodes } = view;
  const agents = useMemo(() => agentsOf(nodes), [nodes]);
  const turns = useMemo(() => turnsOf(nodes), [nodes]);
  const time = useMemo(() => {
    const axis = axisOf(nodes, view.started_at, view.ended_at, now);
    return timeAside(axis, barsOf(nodes, axis), narrow);
  }, [nodes, view.started_at, view.ended_at, now, narrow]);
  const credit = useCreditAside(run, view, tab === "credit", narrow);
  const node = nodes.find((each) => each.id === selected) ?? null;

  const reach = useCallback(
    (id: string | null) => {
      if (id === null) return;
      setFolded((now) => revealing(nodes, now, id));
      select(id);
    },
    [nodes, select],
  );
  const fold = useCallback((id: string) => {
    setFolded((now) => {
      const next = new Set(now);
      if (!next.delete(id)) next.add(id);
      return next;
    });
  }, []);
  const open = useCallback(
    (id: string) => {
      reach(id);
      setDrawer(true);
    },
    [reach],
  );

  const order = () =>
    tab === "conversation"
      ? turns.filter((turn) => turn.kind !== "said").map((turn) => turn.key)
      : visibleRows(nodes, folded).map((row) => row.node.id);
  const move = (step: number) => {
    const ids = order();
    const at = selected === null ? (step > 0 ? -1 : ids.length) : ids.indexOf(selected);
    reach(ids[Math.min(Math.max(at + step, 0), ids.length - 1)] ?? null);
  };
  const close = () => {
    if (!node) return;
    const next = nodes[nodes.indexOf(node) + 1];
    if (next && next.depth > node.depth && !folded.has(node.id)) fold(node.id);
    else reach(ancestors(nodes, node.id)[0] ?? null);
  };
  const expand = () => {
    if (node && folded.has(node.id)) fold(node.id);
    else move(1);
  };
  useKeys([
    { key: "j", label: "Next", run: () => move(1) },
    { key: "k", label: "Before", run: () => move(-1) },
    { key: "ArrowDown", label: "Next", run: () => move(1) },
    { key: "ArrowUp", label: "Before", run: () => move(-1) },
    { key: "Home", label: "First", run: () => move(Number.NEGATIVE_INFINITY) },
    { key: "End", label: "Last", run: () => move(Number.POSITIVE_INFINITY) },
    { key: "ArrowLeft", label: "Close, or go to what it lies in", run: close },
    { key: "ArrowRight", label: "Open", run: expand },
    {
      key: "Enter",
      label: "Tokens of the call",
      run: () => node?.type === "call" && go(href("run", run, "call", node.id)),
    },
    { key: "e", label: "Next error", run: () => reach(nextWhere(nodes, selected, failed)) },
    { key: "r", label: "Next reward", run: () => reach(nextWhere(nodes, selected, (each) => each.rewards.length > 0)) },
    { key: "Escape", label: "The episode as a whole", run: () => select(null) },
    { key: "t", label: "Tree, conversation, credit", run: () => setQuery({ tab: following(tab) }) },
    { key: "[", label: "Episode before", run: () => view.before && go(href("run", run, "episode", view.before)) },
    { key: "]", label: "Episode after", run: () => view.after && go(href("run", run, "episode", view.after)) },
  ]);

  const shown = node?.type === "call" && node.relation !== "extension" ? node.continues : null;
  const detail = <Detail key={node?.id ?? ""} run={run} episode={view} node={node} onSelect={reach} />;
  const main =
    nodes.length === 0 ? (
      <div className={styles.pane}>
        <Nothing
          title={view.ended_at === null ? "Nothing has happened yet." : "The agent made no call."}
          hint={view.ended_at === null ? "Calls appear here as they come." : "What is known about it stands beside."}
        />
      </div>
    ) : tab === "conversation" ? (
      <ConversationView run={run} turns={turns} agents={agents} selected={selected} onSelect={select} />
    ) : tab === "credit" && credit.instead ? (
      <div className={styles.pane}>{credit.instead}</div>
    ) : (
      <TreeList
        nodes={nodes}
        agents={agents}
        folded={folded}
        selected={selected}
        pointed={pointed ?? shown}
        narrow={narrow}
        aside={tab === "credit" && credit.aside ? credit.aside : time}
        onSelect={open}
        onFold={fold}
        onPoint={setPointed}
      />
    );
  return (
    <div className={styles.page}>
      <Head run={run} view={view} now={now} />
      <SegmentedControl
        size="xs"
        value={tab}
        onChange={(value) => setQuery({ tab: value === "tree" ? null : value })}
        data={TABS}
        style={{ alignSelf: "flex-start", flex: "none" }}
      />
      <div className={`${styles.body} ${narrow ? styles.alone : ""}`}>
        {main}
        {!narrow && <div className={`${styles.pane} ${styles.detail}`}>{detail}</div>}
      </div>
      {narrow && (
        <Drawer
          opened={drawer && node !== null}
          onClose={() => setDrawer(false)}
          position="bottom"
          size="80%"
          title="Details"
        >
          {detail}
        </Drawer>
      )}
      {narrow && (
        <div className={styles.detail}>{<Detail run={run} episode={view} node={null} onSelect={reach} />}</div>
      )}
    </div>
  );
}

function asTab(value: string | null): Tab {
  return TABS.find((tab) => tab.value === value)?.value ?? "tree";
}

function following(tab: Tab): Tab | null {
  const next = TABS[(TABS.findIndex((each) => each.value === tab) + 1) % TABS.length]?.value ?? "tree";
  return next === "tree" ? null : next;
}

import { useMediaQuery } from "@mantine/hooks";
import { useEffect, useState } from "react";
import { go, href, setQuery, useAddress } from "../address";
import type { GroupView, SampleView } from "../records";
import { useKeys } from "../shared/keys";
import { Answered, Nothing } from "../shared/states";
import { ofRun, useAnswer } from "../source";
import { type Choice, choose, type Mode, stepped } from "./choice";
import classes from "./group.module.css";
import { GroupHead } from "./group-head";
import { Samples } from "./samples";
import { SharedStart } from "./shared-start";

const POLL = 2000;

/** The samples of a group beside each other: how all begin, and where the best and the worst went different ways. */
export function GroupPage({ run, group }: { run: string; group: string }) {
  const [live, setLive] = useState(false);
  const answer = useAnswer<GroupView>(ofRun(run, "group"), { name: group }, { every: live ? POLL : 0 });
  const running = answer.data?.samples.some(({ outcome }) => outcome === null) ?? false;
  useEffect(() => setLive(running), [running]);
  return <Answered answer={answer}>{(view) => <Opened run={run} view={view} />}</Answered>;
}

function Opened({ run, view }: { run: string; view: GroupView }) {
  const { query } = useAddress();
  const narrow = useMediaQuery("(max-width: 48em)", undefined, { getInitialValueInEffect: false }) ?? false;
  const mode: Mode = narrow ? "one" : query.get("show") === "all" ? "all" : "pair";
  const choice = choose(view.samples, query, mode);
  if (!choice) return <Nothing title="This group has no samples." />;
  return <Compared run={run} view={view} choice={choice} mode={mode} />;
}

function Compared({ run, view, choice, mode }: { run: string; view: GroupView; choice: Choice; mode: Mode }) {
  const select = ({ episode }: SampleView) => setQuery({ with: episode });
  const change = (next: Mode) => setQuery({ show: next === "all" ? "all" : null });
  const step = (by: number) => {
    if (document.activeElement instanceof HTMLElement) document.activeElement.blur(); // so that Enter opens the sample
    select(stepped(view.samples, choice, mode, by));
  };
  const other = (name: string | null) => {
    if (name !== null) go(href("run", run, "group", name));
  };
  const episode = href("run", run, "episode", choice.selected.episode);
  useKeys([
    { key: "ArrowRight", label: "next sample", run: () => step(1) },
    { key: "ArrowLeft", label: "sample before", run: () => step(-1) },
    { key: "Enter", label: "open the sample's episode", run: () => go(episode) },
    { key: "a", label: "two samples, or all", run: () => change(mode === "all" ? "pair" : "all") },
    { key: "c", label: "credit", run: () => view.phase === "train" && go(href("run", run, "credit", view.group)) },
    { key: "[", label: "group before", run: () => other(view.before) },
    { key: "]", label: "group after", run: () => other(view.after) },
  ]);
  const [best] = view.samples;
  return (
    <div className={classes.view}>
      <GroupHead run={run} view={view} choice={choice} mode={mode} select={select} change={change} />
      <div className={classes.scroll}>
        <SharedStart run={run} view={view} />
        <Samples key={mode} run={run} choice={choice} mode={mode} best={best ?? choice.base} />
      </div>
    </div>
  );
}

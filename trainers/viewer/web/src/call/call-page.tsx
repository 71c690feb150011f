import { Alert, Box, Group, Stack, Tabs, Text } from "@mantine/core";
import { useMediaQuery } from "@mantine/hooks";
import { useCallback, useMemo, useRef, useState } from "react";
import { go, href, setQuery, useAddress, withQuery } from "../address";
import type { CallView, ExpertColumns, GroupReport } from "../records";
import { useKeys } from "../shared/keys";
import { Answered } from "../shared/states";
import { isFile, ofRun, useAnswer } from "../source";
import type { Look } from "./block";
import { foldAt } from "./blocks";
import { cell } from "./cell";
import { Details, type Known, Sheet } from "./details";
import { Head } from "./head";
import { Messages, Request } from "./messages";
import { along, beside, bySurprise, otherLine } from "./moves";
import { COLOURS, type Colour, paintingOf } from "./painting";
import { usePin } from "./pin";
import { type Seen, Stream, tokenElement } from "./stream";
import { Strip } from "./strip-chart";
import { tokensOf } from "./tokens";
import classes from "./tokens.module.css";
import { Colours } from "./toolbar";
import { type Training, trainedWords, trainingOf } from "./training";

/** One call, token by token: `?colour=…&layer=N&token=PLACE&prompt=1&tab=messages`. A place counts the prompt's tokens, too. */
export function CallPage({ run, id }: { run: string; id: string }) {
  const answer = useAnswer<CallView>(ofRun(run, "call"), { id });
  return <Answered answer={answer}>{(call) => <OneCall run={run} call={call} />}</Answered>;
}

const TABS = ["tokens", "messages", "request"] as const;
type Tab = (typeof TABS)[number];

function OneCall({ run, call }: { run: string; call: CallView }) {
  const { query } = useAddress();
  const tokens = useMemo(() => tokensOf(call), [call]);
  const training = useTraining(run, call);
  const tab = TABS.find((each) => each === query.get("tab")) ?? (tokens.count > 0 ? "tokens" : "messages");
  const kept = { colour: query.get("colour"), layer: query.get("layer"), tab: query.get("tab") };
  const address = (other: string | null) => other && withQuery(href("run", run, "call", other), kept);
  const neighbours = { before: address(call.before), after: address(call.after) };
  const toggle = (wanted: Tab) => setQuery({ tab: tab === wanted ? "tokens" : wanted });
  useKeys([
    { key: "[", label: "the call before", run: () => neighbours.before && go(neighbours.before) },
    { key: "]", label: "the next call", run: () => neighbours.after && go(neighbours.after) },
    {
      key: "e",
      label: "its episode",
      run: () => go(withQuery(href("run", run, "episode", call.episode), { node: call.id })),
    },
    { key: "m", label: "messages or tokens", run: () => toggle("messages") },
  ]);
  return (
    <Stack gap="xs">
      <Head run={run} call={call} tokens={tokens} training={training} neighbours={neighbours} />
      <Tabs value={tab} onChange={(value) => setQuery({ tab: value })}>
        <Tabs.List>
          {TABS.map((each) => (
            <Tabs.Tab key={each} value={each} py={6}>
              {each}
            </Tabs.Tab>
          ))}
        </Tabs.List>
      </Tabs>
      {tab === "messages" && <Messages run={run} call={call} />}
      {tab === "request" && <Request run={run} call={call} />}
      {tab === "tokens" && <InTokens run={run} call={call} training={training} />}
    </Stack>
  );
}

/** The credit is another answer, which may take a moment: the tokens do not wait for it. */
function useTraining(run: string, call: CallView): Training {
  const enabled = call.phase === "train" && call.group !== "";
  const { data, error } = useAnswer<GroupReport>(ofRun(run, "credit"), { group: call.group }, { enabled });
  const failure = enabled ? error?.message : "it belongs to no group.";
  return useMemo(() => trainingOf(call, data, failure), [call, data, failure]);
}

function InTokens({ run, call, training }: { run: string; call: CallView; training: Training }) {
  const { query } = useAddress();
  const tokens = useMemo(() => tokensOf(call), [call]);
  const missing = missingOf(call, training);
  const wanted = [...COLOURS, "none" as const].find((each) => each === query.get("colour")) ?? "logprob";
  const colour = missing[wanted] ? "none" : wanted;
  const layer = Math.min(Math.max(Number.parseInt(query.get("layer") ?? "0", 10) || 0, 0), call.expert_layers - 1);
  const experts = useAnswer<ExpertColumns>(
    ofRun(run, "experts"),
    { id: call.id, layer },
    { enabled: colour === "expert", keep: true },
  );
  const painting = useMemo(
    () => paintingOf(colour, call, tokens, training, experts.data),
    [colour, call, tokens, training, experts.data],
  );
  const decided = training.state === "known" || training.state === "never";
  const untrained = decided ? tokens.prompt + training.trained : null;
  const look = useMemo(
    (): Look => ({ run, tokens, painting, parts: call.prompt_parts, untrained }),
    [run, tokens, painting, call.prompt_parts, untrained],
  );
  const order = useMemo(() => bySurprise(call.logprobs, tokens.prompt), [call, tokens]);
  const known = useMemo(
    (): Known => ({ run, call, tokens, training, experts: colour === "expert" ? experts.data : undefined, order }),
    [run, call, tokens, training, colour, experts.data, order],
  );
  if (tokens.count === 0) return <WithoutTokens call={call} />;
  return (
    <Reading known={known} look={look}>
      <Colours colour={colour} missing={missing} layer={layer} layers={call.expert_layers} painting={painting} />
    </Reading>
  );
}

function Reading({ known, look, children }: { known: Known; look: Look; children: React.ReactNode }) {
  const { call, tokens, training, order } = known;
  const { query } = useAddress();
  const [pinned, pin] = usePin(tokens.count);
  const whole = query.get("prompt") === "1" || (pinned !== null && pinned < foldAt(tokens, false));
  const stream = useRef<HTMLDivElement>(null);
  const [hovered] = useState(() => cell<number | null>(null));
  const [seen] = useState(() => cell<Seen>({ start: 0, end: 0 }));
  const wide = useMediaQuery("(min-width: 62em)", true, { getInitialValueInEffect: false });
  const first = foldAt(tokens, whole);
  const setWhole = useCallback(
    (open: boolean) => {
      if (!open && pinned !== null && pinned < foldAt(tokens, false)) pin(null);
      setQuery({ prompt: open ? 1 : null });
    },
    [pinned, tokens, pin],
  );
  const move = (step: 1 | -1) =>
    pin(beside(pinned, step, first, tokens.count, Math.min(tokens.prompt, tokens.count - 1)));
  const line = (step: 1 | -1) => {
    const box = (place: number) => tokenElement(stream.current, place)?.getClientRects()[0] ?? null;
    if (pinned === null) move(step);
    else pin(otherLine(box, pinned, step) ?? pinned);
  };
  const surprise = useRef<number | null>(null);
  const surprising = (step: 1 | -1) => {
    surprise.current = along(order, pinned === surprise.current ? pinned : null, step); // one that came by other ways begins anew
    pin(surprise.current);
  };
  useKeys([
    { key: "ArrowRight", label: "the next token", run: () => move(1) },
    { key: "ArrowLeft", label: "the token before", run: () => move(-1) },
    { key: "ArrowDown", label: "a line down", run: () => line(1) },
    { key: "ArrowUp", label: "a line up", run: () => line(-1) },
    { key: "Enter", label: "keep the token under the pointer", run: () => pin(hovered.get() ?? pinned) },
    { key: "Escape", label: "let go of the token", run: () => pin(null) },
    { key: "n", label: "the token that surprised most, and the next", run: () => surprising(1) },
    { key: "p", label: "the one that surprised more", run: () => surprising(-1) },
    { key: "f", label: "all of the prompt, or its end", run: () => setWhole(!whole) },
    ...[...COLOURS, "none" as const].map((each: Colour, at) => ({
      key: String((at + 1) % 6),
      label: each === "none" ? "no colours" : `colours by ${each}`,
      run: () => setQuery({ colour: each }),
    })),
  ]);
  return (
    <div className={classes.reading}>
      <Box className={classes.toolbar}>
        {children}
        {call.logprobs.length > 0 && (
          <Strip logprobs={call.logprobs} first={tokens.prompt} pinned={pinned} seen={seen} onPin={pin} />
        )}
      </Box>
      {call.tokenizer && (
        <Alert role="note" color="yellow" title="Ids only: what they stand for is not known." py="xs">
          {call.tokenizer}
        </Alert>
      )}
      <Note training={training} sampled={call.sampled.ids.length} />
      <Group align="flex-start" wrap="nowrap" gap="lg">
        <Box flex={1} miw={0} className={!wide && pinned !== null ? classes.above : undefined}>
          <Stream
            look={look}
            trained={trainedWords(training, call.sampled.ids.length)}
            whole={whole}
            pinned={pinned}
            hovered={hovered}
            seen={seen}
            place={stream}
            onPin={pin}
            onWhole={setWhole}
          />
        </Box>
        {wide && (
          <Box component="aside" aria-label="Token" w={300} className={classes.beside}>
            <Details known={known} pinned={pinned} hovered={hovered} onUnpin={() => pin(null)} />
          </Box>
        )}
      </Group>
      {!wide && pinned !== null && <Sheet known={known} place={pinned} onUnpin={() => pin(null)} onMove={move} />}
    </div>
  );
}

/** Whether it is trained on, if that needs saying. */
function Note({ training, sampled }: { training: Training; sampled: number }) {
  const hatched = training.state === "never" || (training.state === "known" && training.trained < sampled);
  return (
    <Group gap={8} wrap="nowrap">
      {hatched && <span className={classes.untrained} style={{ width: 16, height: 14, flexShrink: 0 }} aria-hidden />}
      <Text size="sm" c={hatched ? undefined : "dimmed"}>
        {training.sentence}
      </Text>
    </Group>
  );
}

function WithoutTokens({ call }: { call: CallView }) {
  return (
    <Alert role="note" color="gray" title="No tokens are known of this call.">
      {call.node.upstream
        ? `${call.node.upstream} answered it in the policy's place, and a provider does not say its tokens. It is never trained on; its messages are in the next tab.`
        : "The store has none of it."}
    </Alert>
  );
}

function missingOf(call: CallView, training: Training): Partial<Record<Colour, string>> {
  const missing: Partial<Record<Colour, string>> = {};
  if (call.logprobs.length === 0) missing.logprob = "There are no log-probs of this call.";
  if (call.entropies.length === 0) missing.entropy = "Entropies were not recorded in this run.";
  if (training.advantage === null && training.state !== "asked") missing.advantage = training.sentence;
  if (call.versions.length === 0) missing.version = "There are no versions of this call.";
  if (isFile && call.expert_layers > 0) missing.expert = "Experts are not in this file.";
  if (call.expert_layers === 0)
    missing.expert = "No experts were recorded: the model has none, or its server does not record them.";
  return missing;
}

import { Anchor, Button, CloseButton, Group, Stack, Text } from "@mantine/core";
import type { ReactNode } from "react";
import { href } from "../address";
import type { Alternative, CallView, ExpertColumns } from "../records";
import { number, signed } from "../shared/format";
import { type Cell, useCell } from "./cell";
import { percent } from "./figures";
import { advantagesOf } from "./painting";
import { TokenText } from "./token-text";
import { aroundBroken, sampledEarlier, type Tokens } from "./tokens";
import classes from "./tokens.module.css";
import type { Training } from "./training";

export interface Known {
  run: string;
  call: CallView;
  tokens: Tokens;
  training: Training;
  experts: ExpertColumns | undefined;
  /** Places of sampled tokens, the least likely first. */
  order: readonly number[];
}

/** The token under the pointer, else the pinned one. */
export function Details({
  known,
  pinned,
  hovered,
  onUnpin,
}: {
  known: Known;
  pinned: number | null;
  hovered: Cell<number | null>;
  onUnpin: () => void;
}) {
  const place = useCell(hovered) ?? pinned;
  if (place === null) {
    return (
      <Text size="sm" c="dimmed" p="xs">
        Point at a token, or move with the arrow keys; a click or Enter keeps it here. <b>n</b> goes to the token that
        surprised most.
      </Text>
    );
  }
  return <OneToken known={known} place={place} onUnpin={place === pinned ? onUnpin : undefined} />;
}

export function OneToken({ known, place, onUnpin }: { known: Known; place: number; onUnpin?: () => void }) {
  const { call, tokens } = known;
  const at = place - tokens.prompt;
  const text = tokens.text(place);
  return (
    <Stack gap={8} aria-live="polite">
      <Group justify="space-between" wrap="nowrap" mih={28}>
        <Text size="xs" c="dimmed">
          {at < 0
            ? `prompt token ${number(place + 1)} of ${number(tokens.prompt)}`
            : `sampled token ${number(at + 1)} of ${number(tokens.count - tokens.prompt)}`}
        </Text>
        {onUnpin && <CloseButton size="sm" onClick={onUnpin} aria-label="Let go of the token" />}
      </Group>
      {tokens.texts && (
        <div className={classes.big}>
          <TokenText text={text} />
        </div>
      )}
      <dl className={classes.facts}>
        {at < 0 ? <OfPrompt known={known} place={place} /> : <OfSampled known={known} at={at} />}
      </dl>
      {at >= 0 && (call.alternatives[at]?.length ?? 0) > 0 && (
        <Alternatives
          alternatives={call.alternatives[at] ?? []}
          chosen={{ id: tokens.id(place), text, logprob: call.logprobs[at] ?? Number.NaN }}
        />
      )}
      {at >= 0 && (call.alternatives[at]?.length ?? 0) === 0 && (
        <Text size="xs" c="dimmed">
          Alternatives were not recorded.
        </Text>
      )}
    </Stack>
  );
}

function Fact({ name, children }: { name: string; children: ReactNode }) {
  return (
    <>
      <dt>{name}</dt>
      <dd>{children}</dd>
    </>
  );
}

function OfAll({ known: { tokens, experts }, place }: { known: Known; place: number }) {
  const chosen = experts?.experts[place - experts.start];
  return (
    <>
      <Fact name="id">{tokens.id(place)}</Fact>
      <Fact name="place">{place}</Fact>
      {tokens.special(place) && <Fact name="special">yes</Fact>}
      {tokens.broken(place) && (
        <Fact name="bytes">
          no text on their own; with its neighbours <span className="written">{aroundBroken(tokens, place)}</span>
        </Fact>
      )}
      {chosen && <Fact name={`experts, layer ${experts?.layer}`}>{chosen.join(", ")}</Fact>}
    </>
  );
}

function OfPrompt({ known, place }: { known: Known; place: number }) {
  const part = sampledEarlier(known.call.prompt_parts, place);
  return (
    <>
      <OfAll known={known} place={place} />
      <Fact name="written by">
        {part ? (
          <Anchor inherit href={href("run", known.run, "call", part.call ?? "")}>
            call {part.index}, which sampled it
          </Anchor>
        ) : (
          "the request"
        )}
      </Fact>
    </>
  );
}

function OfSampled({ known, at }: { known: Known; at: number }) {
  const { call, tokens, training, order } = known;
  const place = at + tokens.prompt;
  const logprob = call.logprobs[at];
  const advantage = advantagesOf(training, call.sampled.ids.length)[at];
  const rank = order.indexOf(place) + 1;
  return (
    <>
      <Fact name="log-prob">{number(logprob, 4)}</Fact>
      <Fact name="probability">{percent(logprob)}</Fact>
      <Fact name="surprise">
        {rank === 0
          ? "–"
          : rank === 1
            ? "the greatest of the call"
            : `number ${number(rank)} of ${number(order.length)}`}
      </Fact>
      {call.entropies.length > 0 && <Fact name="entropy">{number(call.entropies[at], 3)} nats</Fact>}
      <Fact name="version">{number(call.versions[at])}</Fact>
      {advantage !== undefined && <Fact name="advantage">{signed(advantage)}</Fact>}
      <Fact name="trained on">{trainedOn(training, at)}</Fact>
      <OfAll known={known} place={place} />
    </>
  );
}

function trainedOn({ state, trained, sentence }: Training, at: number): string {
  if (state === "known" && at < trained) return "yes";
  if (state === "known" && trained > 0) return "no: beyond train.max_row_tokens";
  return state === "known" || state === "never" ? `no. ${sentence.replace(/^Not trained on[.:] /, "")}` : sentence;
}

/** The likeliest tokens there, the sampled one among them. */
function Alternatives({ alternatives, chosen }: { alternatives: readonly Alternative[]; chosen: Alternative }) {
  const known = alternatives.some((each) => each.id === chosen.id) || Number.isNaN(chosen.logprob);
  const all = known ? alternatives : [...alternatives, chosen];
  return (
    <ul className={classes.alternatives} aria-label="Alternatives">
      {all.map((each) => (
        <li
          key={each.id}
          className={`${classes.alternative} ${each.id === chosen.id ? classes.chosen : ""}`}
          title={`id ${each.id}, log-prob ${number(each.logprob, 4)}`}
        >
          <span className={classes.bar} style={{ width: `${Math.exp(each.logprob) * 100}%` }} />
          <span className={classes.name}>
            <TokenText text={each.text || String(each.id)} />
          </span>
          <span className={classes.share}>
            {each.id === chosen.id && "sampled · "}
            {percent(each.logprob)}
          </span>
        </li>
      ))}
    </ul>
  );
}

/** On a phone: over the lower part of the page, so that one can go on pointing at tokens. */
export function Sheet({
  known,
  place,
  onUnpin,
  onMove,
}: {
  known: Known;
  place: number;
  onUnpin: () => void;
  onMove: (step: 1 | -1) => void;
}) {
  return (
    <section className={classes.sheet} aria-label="Token">
      <Group grow mb={4}>
        <Button variant="default" size="compact-sm" onClick={() => onMove(-1)}>
          before
        </Button>
        <Button variant="default" size="compact-sm" onClick={() => onMove(1)}>
          next
        </Button>
      </Group>
      <OneToken known={known} place={place} onUnpin={onUnpin} />
    </section>
  );
}

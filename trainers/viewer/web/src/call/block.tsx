import { memo, type ReactNode } from "react";
import { href } from "../address";
import type { PromptPart } from "../records";
import { Visible } from "../shared/written";
import type { Block } from "./blocks";
import type { Painting } from "./painting";
import { TokenText } from "./token-text";
import { aroundBroken, sampledEarlier, type Tokens } from "./tokens";
import classes from "./tokens.module.css";

/** What all blocks of a call share. */
export interface Look {
  run: string;
  tokens: Tokens;
  painting: Painting;
  parts: readonly PromptPart[];
  /** Place of the first token that is known to have no loss; null: all have, or nobody knows. */
  untrained: number | null;
}

/** Tokens of a block. It handles no events: `data-at` tells the stream which token something happened to. */
export const TokenBlock = memo(function TokenBlock({
  block,
  look,
  pinned,
}: {
  block: Block;
  look: Look;
  /** Place of the pinned token if it is in this block. */
  pinned: number | null;
}) {
  const { tokens, painting, untrained } = look;
  const content: ReactNode[] = [];
  let earlier: PromptPart | undefined;
  for (let place = block.start; place < block.end; place++) {
    const sampled = place >= tokens.prompt;
    const part = sampled ? undefined : sampledEarlier(look.parts, place);
    if (part && part !== earlier) content.push(<PartLink key={`part ${place}`} run={look.run} part={part} />);
    earlier = part;
    const names = [classes.token];
    if (place === pinned) names.push(classes.pinned);
    if (tokens.special(place)) names.push(classes.special);
    if (tokens.broken(place)) names.push(classes.broken);
    if (!tokens.texts) names.push(classes.id);
    if (part) names.push(classes.earlier);
    if (sampled && untrained !== null && place >= untrained) names.push(classes.untrained);
    const background = painting.background(place);
    if (sampled && painting.legend !== null && background === undefined) names.push(classes.unvalued);
    content.push(
      <span key={place} data-at={place} className={names.join(" ")} style={{ backgroundColor: background }}>
        <TokenText text={tokens.text(place)} />
      </span>,
    );
    if (tokens.broken(place) && !runsOn(tokens, place)) {
      content.push(<Together key={`together ${place}`} text={aroundBroken(tokens, place)} />);
    }
  }
  const side = block.start < tokens.prompt ? classes.prompt : classes.sampled;
  const end = block.whole ? "" : classes["broken-off"];
  const outlined = painting.legend === null ? classes.outlined : "";
  return <div className={`${classes.block} ${side} ${end} ${outlined}`}>{content}</div>;
});

/** Whether the next token is broken, too, and the same wrote it. */
function runsOn(tokens: Tokens, place: number): boolean {
  return place + 1 < tokens.count && place + 1 !== tokens.prompt && tokens.broken(place + 1);
}

/** What a run of broken tokens says: words of many scripts are nothing but such runs. */
function Together({ text }: { text: string }) {
  return (
    <span className={classes.together}>
      = <Visible text={text} />
    </span>
  );
}

function PartLink({ run, part }: { run: string; part: PromptPart }) {
  return (
    <a className={classes.part} href={href("run", run, "call", part.call ?? "")} title="Sampled by an earlier call">
      call {part.index ?? "?"}
    </a>
  );
}

import type { CallView, PromptPart, TokenColumns } from "../records";

/** The tokens of a call in one row: the prompt's, then the sampled ones. A place is a number in that row, from 0. */
export interface Tokens {
  count: number;
  /** How many of them are the prompt's: the place of the first sampled one. */
  prompt: number;
  id: (place: number) => number;
  /** What it stands for; the id where nobody knows. */
  text: (place: number) => string;
  /** Whether texts are known. */
  texts: boolean;
  special: (place: number) => boolean;
  broken: (place: number) => boolean;
}

export function tokensOf({ prompt, sampled }: Pick<CallView, "prompt" | "sampled">): Tokens {
  const before = prompt.ids.length;
  const special = places(prompt, sampled, "special");
  const broken = places(prompt, sampled, "broken");
  const id = (place: number) => (place < before ? prompt.ids[place] : sampled.ids[place - before]) ?? -1;
  const text = (place: number) => (place < before ? prompt.texts[place] : sampled.texts[place - before]);
  return {
    count: before + sampled.ids.length,
    prompt: before,
    id,
    text: (place) => text(place) ?? String(id(place)),
    texts: prompt.texts.length + sampled.texts.length > 0,
    special: (place) => special.has(place),
    broken: (place) => broken.has(place),
  };
}

function places(prompt: TokenColumns, sampled: TokenColumns, which: "special" | "broken"): Set<number> {
  const before = prompt.ids.length;
  return new Set([...prompt[which], ...sampled[which].map((place) => place + before)]);
}

/** The text of tokens [start, end), with characters put together again that were split over tokens. */
export function plainText(tokens: Tokens, start: number, end: number): string {
  const pieces: string[] = [];
  let place = start;
  while (place < end) {
    if (tokens.broken(place)) {
      const from = place;
      while (place < end && tokens.broken(place)) place += 1;
      pieces.push(joined(tokens, from, place));
    } else {
      pieces.push(tokens.text(place));
      place += 1;
    }
  }
  return pieces.join(tokens.texts ? "" : " ");
}

const ESCAPE = /\\x([0-9a-f]{2})/gi;

/** Tokens [start, end) whose bytes are no text on their own, read together. */
function joined(tokens: Tokens, start: number, end: number): string {
  const bytes: number[] = [];
  const encoder = new TextEncoder();
  for (let place = start; place < end; place++) {
    const text = tokens.text(place);
    let at = 0;
    for (const match of text.matchAll(ESCAPE)) {
      bytes.push(...encoder.encode(text.slice(at, match.index)), Number.parseInt(match[1] ?? "0", 16));
      at = match.index + match[0].length;
    }
    bytes.push(...encoder.encode(text.slice(at)));
  }
  return new TextDecoder("utf-8", { ignoreBOM: true }).decode(new Uint8Array(bytes));
}

/** The run of broken tokens that a broken token is in, as text: `😀` of its four bytes. */
export function aroundBroken(tokens: Tokens, place: number): string {
  let start = place;
  let end = place + 1;
  const side = place < tokens.prompt ? [0, tokens.prompt] : [tokens.prompt, tokens.count];
  while (start > (side[0] ?? 0) && tokens.broken(start - 1)) start -= 1;
  while (end < (side[1] ?? 0) && tokens.broken(end)) end += 1;
  return joined(tokens, start, end);
}

/** The part of the prompt that a token is in, if an earlier call sampled it. */
export function sampledEarlier(parts: readonly PromptPart[], place: number): PromptPart | undefined {
  return parts.find((part) => part.call !== null && part.start <= place && place < part.end);
}

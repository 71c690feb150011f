import type { Tokens } from "./tokens";

/** A piece of the page: tokens [start, end) that are shown or left out together. */
export interface Block {
  start: number;
  end: number;
  /** Whether it ends with a line break of the text; if not, the page breaks a line that the text does not. */
  whole: boolean;
}

const WANTED = 200;
const MOST = 600;

/** Tokens [start, end) in blocks that end at line breaks where there are any. */
export function blocksOf(tokens: Tokens, start: number, end: number): Block[] {
  const blocks: Block[] = [];
  let from = start;
  for (let place = start; place < end; place++) {
    const length = place + 1 - from;
    const breaks = length >= WANTED && tokens.text(place).endsWith("\n");
    if (breaks || length >= MOST || place + 1 === end) {
      blocks.push({ start: from, end: place + 1, whole: breaks || place + 1 === end });
      from = place + 1;
    }
  }
  return blocks;
}

/** How many lines a block will take up when a line holds so many characters: a guess until it is on the page. */
export function linesOf(tokens: Tokens, block: Block, columns: number): number {
  let lines = 1;
  let column = 0;
  for (let place = block.start; place < block.end; place++) {
    const text = tokens.text(place);
    for (const [number, line] of text.split("\n").entries()) {
      if (number > 0) {
        lines += 1;
        column = 0;
      }
      column += line.length + (tokens.texts ? 0 : 1);
      if (column > columns) {
        lines += Math.floor(column / columns);
        column %= columns;
      }
    }
  }
  return lines;
}

/** How many tokens of a long prompt are shown before somebody asks for all of it. */
export const LAST_OF_PROMPT = 200;

/** Where the shown part of a prompt begins: at the start of a line if one is near. */
export function foldAt(tokens: Tokens, whole: boolean): number {
  const wanted = tokens.prompt - LAST_OF_PROMPT;
  if (whole || wanted <= 50) return 0;
  for (let place = wanted; place > wanted - 50; place--) {
    if (tokens.text(place - 1).endsWith("\n")) return place;
  }
  return wanted;
}

/** The block that a place is in, or -1. */
export function blockAt(blocks: readonly Block[], place: number): number {
  return blocks.findIndex((block) => block.start <= place && place < block.end);
}

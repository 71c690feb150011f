import type { MessageView, SampleMessage } from "../records";
import { isCut, isHigh, pretty, unitsOf } from "../shared/text";

/**
 * How samples lie beside each other: a message that all of those shown said stands in one row, and between two such rows each
 * goes its own way.
 */
export interface Aligned {
  /** Of each row, the place in each sample's messages; null where it has none. */
  rows: (number | null)[][];
  /** Of each sample, the place in the reference's messages of the same message, as far as there is one. */
  same: ReadonlyMap<number, number>[];
}

/** The first of `samples` is what the others are compared with; it is the same as nobody, unless all are. */
export function aligned(samples: readonly (readonly SampleMessage[])[]): Aligned {
  const names = new Map<string, number>();
  const lists = samples.map((messages) => messages.map((message) => named(names, message)));
  const [reference = [], ...others] = lists;
  const matched = others.map((other) => common(reference, other));
  const inAll = (at: number) => matched.length > 0 && matched.every((pairs) => pairs.has(at));
  const first = new Map(reference.map((_, at) => [at, at] as const).filter(([at]) => inAll(at)));
  const places = [first, ...matched];
  const rows: (number | null)[][] = [];
  const reached = lists.map(() => 0);
  const until = (ends: number[]) => {
    const most = Math.max(...ends.map((end, at) => end - (reached[at] ?? 0)));
    for (let k = 0; k < most; k++) {
      rows.push(ends.map((end, at) => ((reached[at] ?? 0) + k < end ? (reached[at] ?? 0) + k : null)));
    }
    ends.forEach((end, at) => {
      reached[at] = end;
    });
  };
  for (const at of first.keys()) {
    const row = places.map((pairs) => pairs.get(at) ?? 0);
    until(row);
    until(row.map((place) => place + 1));
  }
  until(lists.map((list) => list.length));
  return { rows, same: [first, ...matched.map(turned)] };
}

/** A text that was cut is the same as none: nobody here knows how it goes on. */
function named(names: Map<string, number>, { call, message }: SampleMessage): number {
  const texts = [message.text, ...message.tools.map((tool) => tool.arguments)];
  if (texts.some(isCut)) return -1;
  const tools = message.tools.map((tool) => [tool.name, tool.arguments.text]);
  const name = JSON.stringify([call === null, message.role, message.text.text, tools]);
  const known = names.get(name) ?? names.size;
  names.set(name, known);
  return known;
}

/** Longer lists are matched only so far: what it takes grows with their product. */
const MOST = 1500;

/** The longest common subsequence: places in `one` to places in `other`, in order. */
export function common(one: readonly number[], other: readonly number[]): Map<number, number> {
  const [n, m] = [Math.min(one.length, MOST), Math.min(other.length, MOST)];
  const width = m + 1;
  const longest = new Uint16Array((n + 1) * width);
  const at = (i: number, j: number) => longest[i * width + j] ?? 0;
  const equal = (i: number, j: number) => one[i] === other[j] && one[i] !== -1;
  for (let i = n - 1; i >= 0; i--) {
    for (let j = m - 1; j >= 0; j--) {
      longest[i * width + j] = equal(i, j) ? at(i + 1, j + 1) + 1 : Math.max(at(i + 1, j), at(i, j + 1));
    }
  }
  const pairs = new Map<number, number>();
  for (let i = 0, j = 0; i < n && j < m; ) {
    if (equal(i, j)) pairs.set(i++, j++);
    else if (at(i + 1, j) >= at(i, j + 1)) i++;
    else j++;
  }
  return pairs;
}

function turned(pairs: ReadonlyMap<number, number>): Map<number, number> {
  return new Map([...pairs].map(([one, other]) => [other, one]));
}

/** The first row in which not all say the same: where their ways part. */
export function partingRow({ rows, same }: Aligned): number {
  return rows.findIndex((row) => row.some((place, at) => place === null || !same[at]?.has(place)));
}

/** How far a message goes along with another one: so many characters of its text, and of the arguments of each tool as laid out. */
export interface Along {
  text: number;
  tools: number[];
}

/** The same for several that it is compared with: as far as with each of them. */
export function least(all: readonly Along[]): Along | undefined {
  return all.reduce<Along | undefined>(
    (known, { text, tools }) =>
      known === undefined
        ? { text, tools }
        : {
            text: Math.min(known.text, text),
            tools: known.tools.map((length, at) => Math.min(length, tools[at] ?? 0)),
          },
    undefined,
  );
}

/**
 * How far `message` goes along with `other`. Where a text is cut, that is up to its end, unless the server, who has the whole, has
 * counted more.
 */
export function along(message: MessageView, other: MessageView, counted = 0): Along {
  if (message.role !== other.role) return { text: 0, tools: message.tools.map(() => 0) };
  const { text } = message;
  const start = commonStart(text.text, other.text.text);
  const end = Math.min(text.text.length, other.text.text.length);
  const tools = message.tools.map((tool, at) => {
    const beside = other.tools[at];
    return beside?.name === tool.name ? commonStart(pretty(tool.arguments.text), pretty(beside.arguments.text)) : 0;
  });
  return {
    text: start === end && (isCut(text) || isCut(other.text)) ? Math.max(start, unitsOf(text.text, counted)) : start,
    tools,
  };
}

/** In UTF-16 units, and never through a character. */
function commonStart(one: string, two: string): number {
  let at = 0;
  while (at < one.length && one[at] === two[at]) at++;
  if (at > 0 && at < one.length && isHigh(one.charCodeAt(at - 1))) at--;
  return at;
}

import type { Text } from "../records";

/** Whether only the beginning of it is here. Lengths do not tell: the server counts characters, and JavaScript halves of some. */
export function isCut(text: Text): boolean {
  return text.place !== "";
}

/** JSON with line breaks, if the whole of it is here and it is JSON. */
export function laidOut(text: Text): Text {
  if (isCut(text)) return text;
  const full = pretty(text.text);
  return full === text.text ? text : { ...text, text: full, length: full.length };
}

/** Of a text that is no JSON, or a very long one, as it is. */
export function pretty(text: string): string {
  if (text.length > 200_000 || !/^\s*[[{]/.test(text)) return text;
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

/** The first `end` units, or one less where that would be half a character. */
export function upTo(text: string, end: number): string {
  const at = end > 0 && end < text.length && isHigh(text.charCodeAt(end - 1)) ? end - 1 : end;
  return text.slice(0, at);
}

/** The place in JavaScript's units of a place in characters; behind the text's end, where nobody knows better, one for each. */
export function unitsOf(text: string, characters: number): number {
  let at = 0;
  for (let n = 0; n < characters; n++) at += isHigh(text.charCodeAt(at)) ? 2 : 1;
  return at;
}

export function isHigh(unit: number): boolean {
  return unit >= 0xd800 && unit < 0xdc00;
}

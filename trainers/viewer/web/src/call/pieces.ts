import { visible } from "../shared/visible";

/**
 * A token's text in pieces. Spaces, tabs and line breaks stay what they are, so that lines break where they should and a selection
 * copies the text; the style sheet draws them. Other invisible characters are replaced.
 */
export interface Piece {
  kind: "text" | "space" | "tab" | "newline" | "invisible";
  text: string;
}

const WHITE = / +|\n|\t/g;
const KINDS: Record<string, Piece["kind"]> = { " ": "space", "\t": "tab", "\n": "newline" };

export function piecesOf(text: string): Piece[] {
  return visible(text).flatMap((piece) =>
    piece.invisible ? [{ kind: "invisible", text: piece.text }] : split(piece.text),
  );
}

function split(text: string): Piece[] {
  const pieces: Piece[] = [];
  let at = 0;
  for (const match of text.matchAll(WHITE)) {
    if (match.index > at) pieces.push({ kind: "text", text: text.slice(at, match.index) });
    pieces.push({ kind: KINDS[match[0].charAt(0)] ?? "text", text: match[0] });
    at = match.index + match[0].length;
  }
  if (at < text.length) pieces.push({ kind: "text", text: text.slice(at) });
  return pieces;
}

/** What stands for a character that cannot be seen, or that would move or reorder what is around it. */
const NAMED: Record<string, string> = { "\n": "↵", "\t": "⇥", "\r": "␍", " ": "·", "\u00a0": "⍽" };

/** Control and format characters, lone surrogates, separators, private use: anything that has no picture of its own. */
const INVISIBLE = /[\p{Cc}\p{Cf}\p{Cs}\p{Z}\p{Co}\p{Default_Ignorable_Code_Point}]/u;
/** Says that the character before it is to be a picture. */
const AS_PICTURE = "\ufe0f";

export interface Piece {
  text: string;
  invisible: boolean;
}

/**
 * Text in pieces, those that cannot be seen replaced by something that can. Line breaks and tabs stay as they are unless `all`
 * is set: for single tokens, where a space counts, too.
 */
export function visible(text: string, all = false): Piece[] {
  const pieces: Piece[] = [];
  let before = "";
  for (const letter of text) {
    const shown = letter === AS_PICTURE && /\p{Emoji}/u.test(before) ? null : stand(letter, all);
    before = letter;
    const last = pieces.at(-1);
    const piece = { text: shown ?? letter, invisible: shown !== null };
    if (last && last.invisible === piece.invisible) last.text += piece.text;
    else pieces.push(piece);
  }
  return pieces;
}

function stand(letter: string, all: boolean): string | null {
  if (letter === "\n") return all ? "↵\n" : null;
  if (letter === "\t") return all ? "⇥\t" : null;
  if (letter === " ") return all ? "·" : null;
  const code = letter.codePointAt(0) ?? 0;
  if (NAMED[letter]) return NAMED[letter];
  if (code < 0x20) return String.fromCodePoint(0x2400 + code);
  if (code === 0x7f) return "␡";
  return INVISIBLE.test(letter) ? `\\u{${code.toString(16)}}` : null;
}

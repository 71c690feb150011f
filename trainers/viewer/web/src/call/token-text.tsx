import { piecesOf } from "./pieces";
import classes from "./tokens.module.css";

const CLASSES = {
  text: undefined,
  space: classes.space,
  tab: classes.tab,
  newline: classes.newline,
  invisible: "invisible",
};

/** The text of a token, with everything to be seen that is in it. */
export function TokenText({ text }: { text: string }) {
  return piecesOf(text).map((piece, at) =>
    piece.kind === "text" ? (
      piece.text
    ) : (
      // biome-ignore lint/suspicious/noArrayIndexKey: pieces have no identity but their place
      <span key={at} className={CLASSES[piece.kind]}>
        {piece.text}
      </span>
    ),
  );
}

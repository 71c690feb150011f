import { Button, Text as Paragraph } from "@mantine/core";
import { memo, useState } from "react";
import type { Text } from "../records";
import { fetchJson, isFile, ofRun, type SourceError } from "../source";
import { number } from "./format";
import { isCut, upTo } from "./text";
import { visible } from "./visible";

/** Text that an agent, a model or a tool wrote, as it is; invisible characters are made visible. */
export const Visible = memo(function Visible({ text, all = false }: { text: string; all?: boolean }) {
  return visible(text, all).map((piece, at) =>
    piece.invisible ? (
      // biome-ignore lint/suspicious/noArrayIndexKey: pieces have no identity but their place
      <span key={at} className="invisible">
        {piece.text}
      </span>
    ) : (
      piece.text
    ),
  );
});

interface WrittenProps {
  run: string;
  text: Text;
  /** As much is shown at first. */
  folded?: number;
  /** So much of its beginning is the same as in what stands beside it: shown paler, with a mark where that ends. */
  same?: number;
}

/** Of a text that somebody unfolds, so much more is shown each time: a page of millions of characters would stand still. */
const STEP = 200_000;

/** A text of a record. Of one that was cut the whole is fetched when somebody wants it. */
export function Written({ run, text, folded = 1200, same = 0 }: WrittenProps) {
  const [whole, setWhole] = useState<string | null>(null);
  const [end, setEnd] = useState(folded);
  const [state, setState] = useState<"asking" | SourceError | null>(null);
  const known = whole ?? text.text;
  const shown = upTo(known, end);
  const rest = isCut(text) && whole === null ? Math.max(text.length - known.length, 1) : 0;
  const hidden = known.length - shown.length + rest;
  const more = async () => {
    if (rest > 0 && !isFile) {
      setState("asking");
      try {
        setWhole((await fetchJson<Text>(ofRun(run, "text"), { place: text.place })).text);
      } catch (error) {
        setState(error as SourceError);
        return;
      }
    }
    setState(null);
    setEnd(end < known.length || rest > 0 ? end + STEP : end);
  };
  return (
    <div className="written">
      {same > 0 && (
        <span className="same">
          <Visible text={shown.slice(0, same)} />
        </span>
      )}
      {same > 0 && same < shown.length && <span className="parting" title="the same up to here" />}
      <Visible text={same > 0 ? shown.slice(same) : shown} />
      {hidden > 0 &&
        (isFile && shown.length === known.length ? (
          <Paragraph size="xs" c="dimmed">
            {number(hidden)} more characters are not in this file
          </Paragraph>
        ) : (
          <Button variant="subtle" size="compact-xs" onClick={more} loading={state === "asking"}>
            … {number(hidden)} more characters
          </Button>
        ))}
      {state instanceof Error && (
        <Paragraph size="xs" c="red" role="alert">
          {state.message} {state.hint}
        </Paragraph>
      )}
    </div>
  );
}

import { memo, useMemo } from "react";
import { number } from "../shared/format";
import { bucketsOf, hanging } from "./buckets";
import { type Cell, useCell } from "./cell";
import type { Seen } from "./stream";
import classes from "./tokens.module.css";

const BUCKETS = 600;
/** Log-prob at the bottom: a token of 0.1 %. */
const DEPTH = Math.log(0.001);

/** Log-probs along the call: the line hangs from certainty. A click goes to the least likely token around it. */
export const Strip = memo(function Strip({
  logprobs,
  first,
  pinned,
  seen,
  onPin,
}: {
  logprobs: readonly (number | null)[];
  first: number;
  pinned: number | null;
  seen: Cell<Seen>;
  onPin: (place: number) => void;
}) {
  const buckets = useMemo(() => bucketsOf(logprobs, first, BUCKETS), [logprobs, first]);
  const lowest = useMemo(
    () =>
      hanging(
        buckets.map((bucket) => bucket.lowest),
        DEPTH,
      ),
    [buckets],
  );
  const mean = useMemo(
    () =>
      hanging(
        buckets.map((bucket) => bucket.mean),
        DEPTH,
      ),
    [buckets],
  );
  return (
    <button
      type="button"
      className={classes.strip}
      title={`log-prob along ${number(logprobs.length)} sampled tokens: the least likely of each stretch, and their mean`}
      aria-label="Go to the least likely token around a point of the call"
      onClick={(event) => {
        const { left, width } = event.currentTarget.getBoundingClientRect();
        const share = event.detail === 0 ? 0.5 : (event.clientX - left) / width;
        const bucket = buckets[Math.min(Math.max(Math.floor(share * buckets.length), 0), buckets.length - 1)];
        if (bucket) onPin(bucket.place);
      }}
    >
      <svg viewBox={`0 0 ${buckets.length} 1`} preserveAspectRatio="none" aria-hidden="true">
        <path d={lowest} className={classes.lowest} />
        <path d={mean} className={classes.mean} />
      </svg>
      <Window seen={seen} first={first} count={logprobs.length} />
      {pinned !== null && pinned >= first && (
        <span className={classes.cursor} style={{ left: `${((pinned - first + 0.5) / logprobs.length) * 100}%` }} />
      )}
    </button>
  );
});

/** What is on the screen. */
function Window({ seen, first, count }: { seen: Cell<Seen>; first: number; count: number }) {
  const { start, end } = useCell(seen);
  const from = Math.max(start - first, 0) / count;
  const to = Math.max(end - first, 0) / count;
  if (to - from > 0.98) return null;
  return <span className={classes.window} style={{ left: `${from * 100}%`, width: `${(to - from) * 100}%` }} />;
}

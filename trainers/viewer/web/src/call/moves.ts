/** Which token comes next, by a key. */

/** Places of sampled tokens in the order in which the policy was surprised by them: the least likely first; those of which that is not known are left out. */
export function bySurprise(logprobs: readonly (number | null)[], first: number): number[] {
  return logprobs
    .flatMap((value, at) => (value === null ? [] : [{ value, place: first + at }]))
    .sort((one, other) => one.value - other.value || one.place - other.place)
    .map(({ place }) => place);
}

/** The next of an order after `place`, or the one before; the first if `place` is not in it. */
export function along(order: readonly number[], place: number | null, step: 1 | -1): number | null {
  const at = place === null ? -1 : order.indexOf(place);
  if (at < 0) return order[0] ?? null;
  return order[Math.min(Math.max(at + step, 0), order.length - 1)] ?? null;
}

export function beside(place: number | null, step: 1 | -1, first: number, count: number, start: number): number {
  if (place === null) return start;
  return Math.min(Math.max(place + step, first), count - 1);
}

export interface Box {
  left: number;
  right: number;
  top: number;
  bottom: number;
}

const SAME_LINE = 3;

/**
 * The token above or below, in lines as they are on the screen. `boxOf` gives a token's first box, null if it is not on the
 * page.
 */
export function otherLine(boxOf: (place: number) => Box | null, place: number, step: 1 | -1): number | null {
  const from = boxOf(place);
  if (!from) return null;
  const middle = (from.left + from.right) / 2;
  let line: number | null = null;
  let best: { place: number; distance: number } | null = null;
  for (let at = place + step; ; at += step) {
    const box = boxOf(at);
    if (!box) break;
    if (Math.abs(box.top - from.top) <= SAME_LINE || (box.top - from.top) * step < 0) continue;
    line ??= box.top;
    if (Math.abs(box.top - line) > SAME_LINE) break;
    const distance = Math.max(box.left - middle, middle - box.right, 0);
    if (!best || distance < best.distance) best = { place: at, distance };
  }
  return best?.place ?? null;
}

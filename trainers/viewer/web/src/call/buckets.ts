/** A call's log-probs as one line, however many they are. */

export interface Bucket {
  /** Place of the least likely token of the bucket: where a click goes. */
  place: number;
  lowest: number;
  mean: number;
}

/** At most `wanted` buckets of neighbouring tokens. Values that are not known are left out; where none is, both are 0. */
export function bucketsOf(values: readonly (number | null)[], first: number, wanted: number): Bucket[] {
  const buckets = Math.min(wanted, values.length);
  return Array.from({ length: buckets }, (_, bucket) => {
    const start = Math.floor((bucket * values.length) / buckets);
    const end = Math.floor(((bucket + 1) * values.length) / buckets);
    let [lowest, place, sum, known] = [0, first + start, 0, 0];
    for (let at = start; at < end; at++) {
      const value = values[at] ?? null;
      if (value === null) continue;
      sum += value;
      known += 1;
      if (value < lowest) [lowest, place] = [value, first + at];
    }
    return { place, lowest, mean: sum / Math.max(known, 1) };
  });
}

/** An SVG path, filled from the top down to each value: `depth` is the value at the bottom of a picture of height 1. */
export function hanging(values: readonly number[], depth: number): string {
  const points = values.map((value, at) => {
    const y = Math.min(value / depth, 1).toFixed(3);
    return `L${at} ${y}L${at + 1} ${y}`;
  });
  return `M0 0${points.join("")}L${values.length} 0Z`;
}

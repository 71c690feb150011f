/** Colours for values, as backgrounds behind text: legible in light and dark, and to people who see few colours. */

/** Blue above zero, orange below: `value` of `largest` in size. */
export function diverging(value: number, largest: number): string {
  if (value === 0 || largest <= 0) return "transparent";
  const share = Math.min(Math.abs(value) / largest, 1);
  return `rgb(${value > 0 ? "34 139 230" : "247 103 7"} / ${(0.1 + 0.6 * share).toFixed(3)})`;
}

/** From nothing at 0 to full at 1. */
export function sequential(share: number): string {
  const bounded = Math.min(Math.max(share, 0), 1);
  return bounded === 0 ? "transparent" : `rgb(190 75 219 / ${(0.06 + 0.64 * bounded).toFixed(3)})`;
}

const CATEGORIES = [
  "34 139 230",
  "247 103 7",
  "18 184 134",
  "190 75 219",
  "250 176 5",
  "224 49 49",
  "21 170 191",
  "130 201 30",
];

/**
 * For things that have no order: runs, experts, agents. The first ones are easily told apart; the hues after them are as far from
 * each other as they can be.
 */
export function categorical(index: number, alpha = 1, shade = 0): string {
  const named = CATEGORIES[index];
  return named
    ? `rgb(${shade === 0 ? named : shaded(named, shade)} / ${alpha})`
    : `hsl(${((index * 137.508) % 360).toFixed(1)} 65% 50% / ${alpha})`;
}

/** Towards white and black in turns, so that shades that follow each other differ; black and white themselves never come. */
const SHADES = [0, 0.45, -0.3, 0.25, -0.45, 0.62, -0.15];

function shaded(colour: string, shade: number): string {
  const by = SHADES[shade % SHADES.length] ?? 0;
  const end = by > 0 ? 255 : 0;
  return colour
    .split(" ")
    .map((part) => Math.round(Number(part) + (end - Number(part)) * Math.abs(by)))
    .join(" ");
}

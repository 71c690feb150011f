/** Numbers, times and names as people read them. */

export function number(value: number | null | undefined, digits = 3): string {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en-GB").replaceAll(",", "\u202f");
  return Number(value.toPrecision(digits)).toString();
}

export function signed(value: number | null | undefined, digits = 3): string {
  if (value === null || value === undefined) return "–";
  return value > 0 ? `+${number(value, digits)}` : number(value, digits);
}

export function duration(seconds: number | null | undefined): string {
  if (seconds === null || seconds === undefined || seconds < 0) return "–";
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return both(whole, 60, "min", "s");
  return both(Math.round(seconds / 60), 60, "h", "min");
}

/** Two units, the smaller one left out where there is none of it. */
function both(amount: number, size: number, unit: string, smaller: string): string {
  const rest = amount % size;
  return `${Math.floor(amount / size)} ${unit}${rest > 0 ? ` ${rest} ${smaller}` : ""}`;
}

/** `1 call`, `2 calls`. */
export function several(count: number, name: string): string {
  return `${number(count)} ${name}${count === 1 ? "" : "s"}`;
}

export function time(seconds: number): string {
  const date = new Date(seconds * 1000);
  return Number.isNaN(date.getTime()) ? "–" : date.toISOString().replace("T", " ").slice(0, 19);
}

export function words(name: string): string {
  return name.replaceAll("_", " ");
}

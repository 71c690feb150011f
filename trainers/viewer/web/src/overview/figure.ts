/** What a chart shows, whoever draws it. Values belong to `steps`, one for each, or null. */
export interface Figure {
  id: string;
  title: string;
  /** What it means, in a sentence. */
  meaning: string;
  steps: number[];
  lines: Line[];
  /** Values are parts of a whole: drawn upon each other. */
  stacked?: boolean;
  /** Values differ by orders of magnitude: a logarithmic scale may be chosen. */
  log?: boolean;
  /** Of shares. */
  unit?: "share" | "seconds";
}

export interface Line {
  label: string;
  values: Values;
  /** Ends of an interval around each value. */
  low?: Values;
  high?: Values;
  /** Index of its colour. */
  colour: number;
  /** Which of its shades; 0: the colour itself. */
  shade?: number;
  /** Points with error bars, unconnected: measured now and then. */
  points?: boolean;
  dashed?: boolean;
}

export type Values = (number | null)[];

export function hasValues(values: Values | undefined): values is Values {
  return values?.some((value) => value !== null) ?? false;
}

/** The last value that is known, and its step. */
export function last(figure: Figure, line: Line): { step: number; value: number } | null {
  const at = line.values.findLastIndex((value) => value !== null);
  const step = figure.steps[at];
  const value = line.values[at];
  return step === undefined || value === undefined || value === null ? null : { step, value };
}

/** The figure in words, for those who cannot see it. */
export function description(figure: Figure): string {
  const ends = figure.lines.flatMap((line) => {
    const end = last(figure, line);
    return end ? [`${line.label} ${Number(end.value.toPrecision(3))} at step ${end.step}`] : [];
  });
  return `${figure.title}: ${ends.join(", ") || "no values"}`;
}

/** Lines on the steps of all of them together. */
export function onSteps(figure: Figure, steps: number[]): Figure {
  const place = new Map(figure.steps.map((step, at) => [step, at]));
  const spread = (values: Values | undefined) => values && steps.map((step) => values[place.get(step) ?? -1] ?? null);
  return {
    ...figure,
    steps,
    lines: figure.lines.map((line) => ({
      ...line,
      values: spread(line.values) ?? [],
      low: spread(line.low),
      high: spread(line.high),
    })),
  };
}

export function union(...lists: number[][]): number[] {
  return [...new Set(lists.flat())].sort((one, other) => one - other);
}

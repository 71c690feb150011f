import type uPlot from "uplot";
import { categorical } from "../shared/scales";
import type { Figure, Line, Values } from "./figure";

/** A figure as uPlot takes it: columns, and for each column what it is. */
export interface Plot {
  data: uPlot.AlignedData;
  series: uPlot.Series[];
  bands: uPlot.Band[];
}

export interface Look {
  hidden: ReadonlySet<string>;
  log: boolean;
}

export function plot(figure: Figure, { hidden, log }: Look): Plot {
  const shown = figure.lines.filter((line) => !hidden.has(line.label));
  return figure.stacked ? stack(figure, shown) : draw(figure, shown, log);
}

/** Lines upon each other, the first at the bottom. The area of each reaches down to the one below it. */
function stack(figure: Figure, lines: Line[]): Plot {
  const tops = cumulative(lines.map((line) => line.values));
  return {
    data: [figure.steps, ...tops] as uPlot.AlignedData,
    series: [
      {},
      ...lines.map((line, at) => ({
        label: line.label,
        stroke: categorical(line.colour, 1, line.shade),
        width: 1,
        fill: at === 0 ? categorical(line.colour, 0.45, line.shade) : undefined,
        points: { show: false },
      })),
    ],
    bands: lines
      .slice(1)
      .map((line, at) => ({ series: [at + 2, at + 1], fill: categorical(line.colour, 0.45, line.shade) })),
  };
}

/** Sums of the columns up to each; where a step has no value at all there is none. */
export function cumulative(columns: Values[]): Values[] {
  const known = columns[0]?.map((_, at) => columns.some((column) => column[at] !== null)) ?? [];
  const sums = known.map(() => 0);
  return columns.map((column) =>
    column.map((value, at) => {
      sums[at] = (sums[at] ?? 0) + (value ?? 0);
      return known[at] ? (sums[at] ?? 0) : null;
    }),
  );
}

/** Each line, and behind it the ends of its interval, if it has one. */
function draw(figure: Figure, lines: Line[], log: boolean): Plot {
  const columns: Values[] = [];
  const series: uPlot.Series[] = [{}];
  const bands: uPlot.Band[] = [];
  const scaled = (values: Values) =>
    log ? values.map((value) => (value !== null && value > 0 ? value : null)) : values;
  for (const line of lines) {
    columns.push(scaled(line.values));
    series.push({
      label: line.label,
      stroke: categorical(line.colour),
      width: line.points ? 0 : 1.5,
      dash: line.dashed ? [5, 4] : undefined,
      spanGaps: !line.points,
      points: { show: line.points ? true : undefined, size: line.points ? 7 : 4, fill: categorical(line.colour) },
    });
    if (line.low && line.high) {
      columns.push(scaled(line.high), scaled(line.low));
      const unseen: uPlot.Series = {
        label: "",
        stroke: "transparent",
        width: 0,
        points: { show: false },
        spanGaps: !line.points,
      };
      series.push(unseen, { ...unseen });
      if (!line.points)
        bands.push({ series: [series.length - 2, series.length - 1], fill: categorical(line.colour, 0.15) });
    }
  }
  return { data: [figure.steps, ...columns] as uPlot.AlignedData, series, bands };
}

/** Error bars of lines that are points: where they stand among uPlot's columns. */
export function errorBars(
  figure: Figure,
  hidden: ReadonlySet<string>,
): { high: number; low: number; colour: string }[] {
  const bars = [];
  let column = 1;
  for (const line of figure.lines) {
    if (hidden.has(line.label)) continue;
    const has = line.low && line.high && !figure.stacked;
    if (has && line.points) bars.push({ high: column + 1, low: column + 2, colour: categorical(line.colour) });
    column += has ? 3 : 1;
  }
  return bars;
}

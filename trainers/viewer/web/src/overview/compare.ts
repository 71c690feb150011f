import type { RunDetail } from "../records";
import { type Figure, onSteps, union } from "./figure";
import { figures } from "./figures";

export interface Difference {
  field: string;
  /** As JSON, a value for each run; undefined where its recipe has no such field. */
  values: (string | undefined)[];
}

/** Fields in which the recipes are not all alike. */
export function differences(recipes: Record<string, string>[]): Difference[] {
  const fields = [...new Set(recipes.flatMap((recipe) => Object.keys(recipe)))].sort();
  return fields
    .map((field) => ({ field, values: recipes.map((recipe) => recipe[field]) }))
    .filter(({ values }) => new Set(values).size > 1);
}

/** Figures of several runs over each other: a colour a run. Parts of a whole have no common picture and are left out, and of a figure
 * with several lines there is one figure a line, since colours are runs here. */
export function overlaid(runs: RunDetail[], names: string[]): Figure[] {
  const found = new Map<string, Figure>();
  runs.forEach((run, colour) => {
    for (const figure of figures(run)) {
      if (figure.stacked) continue;
      for (const line of figure.lines) {
        const id = `${figure.id} ${line.label}`;
        const before = found.get(id);
        const own = { ...line, label: names[colour] ?? "", colour };
        if (!before) {
          const title = figure.lines.length > 1 ? `${figure.title}: ${line.label}` : figure.title;
          found.set(id, { ...figure, id, title, lines: [own] });
          continue;
        }
        const steps = union(before.steps, figure.steps);
        found.set(id, {
          ...onSteps(before, steps),
          lines: [...onSteps(before, steps).lines, ...onSteps({ ...figure, lines: [own] }, steps).lines],
        });
      }
    }
  });
  return [...found.values()];
}

/** Names that tell the runs apart: their keys, without the name before the last dot where all share it. */
export function tellApart(keys: string[]): string[] {
  const names = new Set(keys.map((key) => key.slice(0, key.lastIndexOf(".") + 1)));
  const [shared = ""] = names;
  return names.size === 1 ? keys.map((key) => key.slice(shared.length)) : keys;
}

import type { Query } from "../address";
import type { SampleView } from "../records";

/** `pair`: one beside another; `all`: the whole group; `one`: where there is no room for two. */
export type Mode = "pair" | "all" | "one";

export interface Choice {
  /** The columns; the others are compared with the first, or with `base` where there is one column. */
  shown: SampleView[];
  base: SampleView;
  selected: SampleView;
}

/** What the address asks for (`base`, `with`: ids of episodes), the best beside the worst where it asks for nothing. */
export function choose(samples: readonly SampleView[], query: URLSearchParams, mode: Mode): Choice | null {
  const find = (name: string) => samples.find(({ episode }) => episode === query.get(name));
  const base = find("base") ?? samples[0];
  if (!base) return null;
  const asked = find("with");
  if (mode === "one") {
    const selected = asked ?? base;
    return { shown: [selected], base, selected };
  }
  if (mode === "all") {
    return { shown: [base, ...samples.filter((each) => each !== base)], base, selected: asked ?? base };
  }
  const selected = asked && asked !== base ? asked : (worst(samples, base) ?? base);
  return { shown: selected === base ? [base] : [base, selected], base, selected };
}

/** The last that has a total; those without one are not known to be bad. */
function worst(samples: readonly SampleView[], base: SampleView): SampleView | undefined {
  const others = samples.filter((each) => each !== base);
  return others.findLast(({ total }) => total !== null) ?? others.at(-1);
}

/** The sample `step` further; in a pair the other one is passed over. At an end it stays. */
export function stepped(samples: readonly SampleView[], choice: Choice, mode: Mode, step: number): SampleView {
  const open = mode === "pair" ? samples.filter((each) => each !== choice.base) : choice.shown;
  const ways = mode === "one" ? samples : open;
  return ways[ways.indexOf(choice.selected) + step] ?? choice.selected;
}

/** The change to the address that makes a sample the one that the others are compared with. */
export function based(choice: Choice, sample: SampleView): Query {
  return { base: sample.episode, with: sample === choice.selected ? choice.base.episode : choice.selected.episode };
}

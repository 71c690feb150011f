import type { Query } from "../address";

/**
 * What the table is narrowed to and sorted by. The address has the parameters of `/episodes` one to one, so that what one sees can
 * be sent to somebody; what has its usual value is left out of it.
 */
export interface Filters {
  text: string;
  task: string;
  group: string;
  phase: string[];
  outcome: string[];
  agent: string[];
  counted: boolean | null;
  ranges: Record<RangeName, Bounds>;
  rewards: Record<string, Bounds>;
  sort: string;
  descending: boolean;
}

/** Lowest and highest, both included; null where there is no end. */
export type Bounds = readonly [number | null, number | null];
export type RangeName = (typeof RANGES)[number];

export const RANGES = ["step", "version", "calls", "tokens", "seconds"] as const;
export const OPEN: Bounds = [null, null];
const USUAL = { sort: "started_at", descending: true };
const REWARD = "reward.";

export function readFilters(query: URLSearchParams): Filters {
  const rewards: Record<string, Bounds> = {};
  for (const name of new Set(query.keys())) {
    if (!name.startsWith(REWARD) || name === REWARD) continue;
    const bounds = readBounds(query.get(name));
    if (!isOpen(bounds)) rewards[name.slice(REWARD.length)] = bounds;
  }
  const counted = query.get("counted");
  return {
    text: query.get("text") ?? "",
    task: query.get("task") ?? "",
    group: query.get("group") ?? "",
    phase: query.getAll("phase"),
    outcome: query.getAll("outcome"),
    agent: query.getAll("agent"),
    counted: counted === "true" ? true : counted === "false" ? false : null,
    ranges: Object.fromEntries(RANGES.map((name) => [name, readBounds(query.get(name))])) as Record<RangeName, Bounds>,
    rewards,
    sort: query.get("sort") || USUAL.sort,
    descending: query.has("descending") ? query.get("descending") !== "false" : USUAL.descending,
  };
}

/** As `/episodes` and the address take it; `null` for what does not narrow. */
export function queryOf(filters: Filters): Query {
  return {
    text: filters.text || null,
    task: filters.task || null,
    group: filters.group || null,
    phase: filters.phase,
    outcome: filters.outcome,
    agent: filters.agent,
    counted: filters.counted,
    ...Object.fromEntries(RANGES.map((name) => [name, boundsText(filters.ranges[name])])),
    ...Object.fromEntries(Object.entries(filters.rewards).map(([name, bounds]) => [REWARD + name, boundsText(bounds)])),
    ...sortQuery(filters.sort, filters.descending),
  };
}

export function sortQuery(sort: string, descending: boolean): Query {
  return {
    sort: sort === USUAL.sort ? null : sort,
    descending: descending === USUAL.descending ? null : descending,
  };
}

/** `3,5`, `,5`, `3,` or a single number; ends that are no numbers are as good as none. */
export function readBounds(text: string | null): Bounds {
  if (!text) return OPEN;
  const parts = text.split(",");
  const low = readNumber(parts[0]);
  return [low, parts.length < 2 ? low : readNumber(parts[1])];
}

function readNumber(text: string | undefined): number | null {
  const value = text?.trim() ? Number(text) : Number.NaN;
  return Number.isFinite(value) ? value : null;
}

export function boundsText([low, high]: Bounds): string | null {
  return low === null && high === null ? null : `${low ?? ""},${high ?? ""}`;
}

export function isOpen([low, high]: Bounds): boolean {
  return low === null && high === null;
}

/** A filter that is set, in words, and the change to the address that takes it away. */
export interface Active {
  key: string;
  label: string;
  clear: Query;
}

export function activeFilters(filters: Filters): Active[] {
  const active: Active[] = [];
  const add = (key: string, label: string, clear: Query) => active.push({ key, label, clear });
  for (const name of ["text", "task", "group"] as const) {
    if (filters[name]) add(name, `${name}: ${filters[name]}`, { [name]: null });
  }
  for (const name of ["phase", "outcome", "agent"] as const) {
    for (const value of filters[name]) {
      add(`${name}=${value}`, `${name}: ${value.replaceAll("_", " ")}`, { [name]: without(filters[name], value) });
    }
  }
  if (filters.counted !== null) {
    add("counted", filters.counted ? "counted" : "not counted", { counted: null });
  }
  for (const name of RANGES) {
    if (!isOpen(filters.ranges[name])) add(name, `${name} ${boundsWords(filters.ranges[name])}`, { [name]: null });
  }
  for (const [name, bounds] of Object.entries(filters.rewards)) {
    add(REWARD + name, `${name} ${boundsWords(bounds)}`, { [REWARD + name]: null });
  }
  return active;
}

/** The change to the address that takes all filters away and leaves the order. */
export function cleared(active: Active[]): Query {
  const all: Query = {};
  for (const { clear } of active) for (const name of Object.keys(clear)) all[name] = null;
  return all;
}

export function boundsWords([low, high]: Bounds): string {
  if (low === null) return `≤ ${high}`;
  if (high === null) return `≥ ${low}`;
  return low === high ? `= ${low}` : `${low} – ${high}`;
}

export function toggled(values: readonly string[], value: string): string[] {
  return values.includes(value) ? without(values, value) : [...values, value];
}

function without(values: readonly string[], value: string): string[] {
  return values.filter((each) => each !== value);
}

/** The order that a click on a column asks for: numbers from the largest, names from A; again the other way. */
export function nextSort(filters: Pick<Filters, "sort" | "descending">, column: string, numeric: boolean): Query {
  return sortQuery(column, filters.sort === column ? !filters.descending : numeric);
}

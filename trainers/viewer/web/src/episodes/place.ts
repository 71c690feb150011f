/** Where somebody was in a run's table, to be there again when they come back from an episode. */
export interface Place {
  /** The query as text: a place in another one means nothing. */
  query: string;
  index: number;
  id: string;
}

const name = (run: string) => `lrl.episodes.${run}`;

export function recall(run: string, query: string): Place | null {
  try {
    const place = JSON.parse(sessionStorage.getItem(name(run)) ?? "null") as Place | null;
    return place?.query === query && Number.isInteger(place.index) ? place : null;
  } catch {
    return null; // no storage here, or not ours
  }
}

export function remember(run: string, place: Place): void {
  try {
    sessionStorage.setItem(name(run), JSON.stringify(place));
  } catch {
    // a browser that keeps nothing: one starts at the top again
  }
}

import { href } from "../address";

/** How the episodes of a run were filtered and sorted last, for the ways back to them. */
const name = (run: string) => `lrl.query.${run}`;

export function rememberQuery(run: string, query: string): void {
  try {
    sessionStorage.setItem(name(run), query);
  } catch {
    // a browser that keeps nothing: one comes back to all episodes
  }
}

/** The address of a run's episodes, as somebody left them. */
export function episodesAsLeft(run: string): string {
  const address = href("run", run, "episodes");
  try {
    const query = sessionStorage.getItem(name(run));
    return query ? `${address}?${query}` : address;
  } catch {
    return address;
  }
}

import { keepPreviousData, type UseQueryResult, useQueries, useQuery } from "@tanstack/react-query";
import { type Query, queryText } from "./address";
import type { Failure } from "./records";

/** An answer of the server that says what went wrong. */
export class SourceError extends Error {
  constructor(
    message: string,
    readonly hint = "",
    readonly status = 0,
  ) {
    super(message);
  }
}

/** Answers that came with the page, by path and query, if it is a file of its own (`lrl traces html`). */
type Embedded = Record<string, unknown>;

const embedded: Embedded | null = readEmbedded();

/** Whether the page is a file of its own: nothing to filter on a server, nothing that changes. */
export const isFile = embedded !== null;

function readEmbedded(): Embedded | null {
  const element = document.getElementById("lrl-data");
  return element?.textContent ? (JSON.parse(element.textContent) as Embedded) : null;
}

/** `fetchJson("run/KEY/episode", { id })`; arguments in alphabetical order name an answer in a file. */
export async function fetchJson<T>(path: string, query: Query = {}, signal?: AbortSignal): Promise<T> {
  const address = addressOf(path, query);
  if (embedded) {
    const answer = embedded[address] ?? embedded[path];
    if (answer === undefined) {
      throw new SourceError(
        "This file does not hold that.",
        "It holds what it was written with: `lrl traces html --help`.",
      );
    }
    return answer as T;
  }
  const response = await fetch(`api/${address}`, { signal, headers: { accept: "application/json" } }).catch(unreached);
  if (!response.ok) throw await failure(response);
  return (await response.json()) as T;
}

function unreached(error: unknown): never {
  if (error instanceof DOMException && error.name === "AbortError") throw error;
  throw new SourceError(
    "The viewer's server does not answer.",
    "Is `lrl ui` still running? As soon as it does, this page goes on.",
  );
}

async function failure(response: Response): Promise<SourceError> {
  try {
    const { error, hint } = (await response.json()) as Failure;
    return new SourceError(error, hint, response.status);
  } catch {
    return new SourceError(
      `The viewer's server answered ${response.status}.`,
      "Is `lrl ui` still running?",
      response.status,
    );
  }
}

function addressOf(path: string, query: Query): string {
  const sorted = Object.fromEntries(Object.entries(query).sort(([one], [other]) => (one < other ? -1 : 1)));
  const text = queryText(sorted);
  return text ? `${path}?${text}` : path;
}

/** Path of a run's answers. */
export function ofRun(run: string, what = ""): string {
  return `run/${encodeURIComponent(run)}${what && `/${what}`}`;
}

export interface Asking {
  /** Ask again after so many milliseconds while somebody looks; 0: never. */
  every?: number;
  /** Show the last answer until the next is there. */
  keep?: boolean;
  enabled?: boolean;
}

export function useAnswer<T>(
  path: string,
  query: Query = {},
  { every = 0, keep = false, enabled = true }: Asking = {},
) {
  return useQuery<T, SourceError>({
    queryKey: [addressOf(path, query)],
    queryFn: ({ signal }) => fetchJson<T>(path, query, signal),
    refetchInterval: ({ state: { error } }) => (isFile ? false : mayRecover(error) ? RETRY : every || false),
    placeholderData: keep ? keepPreviousData : undefined,
    enabled,
  }) as UseQueryResult<T, SourceError>;
}

/** Milliseconds after which a server that did not answer is asked again. */
export const RETRY = 3_000;

export function mayRecover(error: Error | null): boolean {
  return error instanceof SourceError && (error.status === 0 || error.status >= 500) && !isFile;
}

/** Several answers of one kind, each fetched on its own and there as soon as it comes; in the order of the queries. */
export function useAnswers<T>(path: string, queries: readonly Query[]): UseQueryResult<T, SourceError>[] {
  return useQueries({
    queries: queries.map((query) => ({
      queryKey: [addressOf(path, query)],
      queryFn: ({ signal }: { signal: AbortSignal }) => fetchJson<T>(path, query, signal),
    })),
  }) as UseQueryResult<T, SourceError>[];
}

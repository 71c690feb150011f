import { useSyncExternalStore } from "react";

/**
 * Where the page is: `#/run/KEY/episodes?outcome=timeout`. It stands behind the `#`, so that addresses work in a file, too.
 * Segments are encoded, since ids may be anything.
 */
export interface Address {
  segments: string[];
  query: URLSearchParams;
}

export type Query = Record<string, string | number | boolean | readonly string[] | null | undefined>;

export function parseAddress(hash: string): Address {
  const [path = "", query = ""] = split(hash.replace(/^#\/?/, ""));
  return {
    segments: path.split("/").filter(Boolean).map(decode),
    query: new URLSearchParams(query),
  };
}

function split(text: string): [string, string] {
  const at = text.indexOf("?");
  return at < 0 ? [text, ""] : [text.slice(0, at), text.slice(at + 1)];
}

function decode(segment: string): string {
  try {
    return decodeURIComponent(segment);
  } catch {
    return segment; // a stray % that somebody typed
  }
}

/** An address to link to: `href("run", key, "episode", id)`. Empty, null and undefined arguments are left out. */
export function href(...segments: string[]): string {
  return `#/${segments.map(encodeURIComponent).join("/")}`;
}

export function withQuery(address: string, query: Query): string {
  const text = queryText(query);
  return text ? `${address}?${text}` : address;
}

export function queryText(query: Query): string {
  const parameters = new URLSearchParams();
  for (const [name, value] of Object.entries(query)) {
    for (const each of Array.isArray(value) ? value : [value]) {
      if (each !== null && each !== undefined && each !== "") parameters.append(name, String(each));
    }
  }
  return parameters.toString();
}

export function useAddress(): Address {
  return parseAddress(
    useSyncExternalStore(
      (changed) => {
        window.addEventListener("hashchange", changed);
        return () => window.removeEventListener("hashchange", changed);
      },
      () => window.location.hash,
    ),
  );
}

export function go(address: string): void {
  window.location.hash = address;
}

/** Change the query of the page's address; `null` and "" take an argument out. The step is not kept in the history. */
export function setQuery(changes: Query): void {
  const { segments, query } = parseAddress(window.location.hash);
  const kept: Query = {};
  for (const name of new Set(query.keys())) kept[name] = query.getAll(name);
  const address = withQuery(href(...segments), { ...kept, ...changes });
  window.history.replaceState(null, "", address);
  window.dispatchEvent(new HashChangeEvent("hashchange"));
}

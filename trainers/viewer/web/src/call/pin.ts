import { useCallback, useEffect, useRef, useState } from "react";
import { setQuery, useAddress } from "../address";

const WAIT = 200;

/**
 * The pinned token, which is in the address as `token`. A key held down moves it faster than browsers let a page change its address:
 * that follows when the token has come to rest.
 */
export function usePin(count: number): [number | null, (place: number | null) => void] {
  const said = placeIn(useAddress().query.get("token"), count);
  const [pinned, setPinned] = useState(said);
  const written = useRef(said);
  useEffect(() => {
    if (said !== written.current) {
      written.current = said;
      setPinned(said);
    }
  }, [said]);
  useEffect(() => {
    if (pinned === written.current) return;
    const timer = setTimeout(() => {
      written.current = pinned;
      setQuery({ token: pinned });
    }, WAIT);
    return () => clearTimeout(timer);
  }, [pinned]);
  return [pinned, useCallback((place) => setPinned(place), [])];
}

/** A place out of an address; one behind the last token is the last. */
export function placeIn(text: string | null, count: number): number | null {
  const place = text === null || text === "" ? Number.NaN : Number(text);
  return Number.isInteger(place) && place >= 0 && count > 0 ? Math.min(place, count - 1) : null;
}

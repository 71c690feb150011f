import { useDebouncedCallback } from "@mantine/hooks";
import { useEffect, useRef, useState } from "react";

/**
 * What somebody types, applied `wait` milliseconds after the last key. Another value from outside (a filter that was cleared, an
 * address that was followed) takes its place; the echo of what was applied (`echo` says what comes back of a text) does not, as
 * there may be more typed by then.
 */
export function useDraft(
  value: string,
  apply: (value: string) => void,
  { wait = 150, echo = (text: string) => text.trim() } = {},
): [string, (text: string) => void] {
  const [draft, setDraft] = useState(value);
  const applied = useRef(value);
  const later = useDebouncedCallback((text: string) => {
    applied.current = echo(text);
    apply(text);
  }, wait);
  useEffect(() => {
    if (value === applied.current) return;
    applied.current = value;
    setDraft(value);
  }, [value]);
  return [
    draft,
    (text) => {
      setDraft(text);
      later(text);
    },
  ];
}

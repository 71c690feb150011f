import { useEffect, useRef, useSyncExternalStore } from "react";

/** What a key does in the view that is open. */
export interface Binding {
  /** As `KeyboardEvent.key` has it: `j`, `/`, `ArrowDown`, `Escape`. */
  key: string;
  label: string;
  run: () => void;
}

let active: Binding[][] = [];
const listeners = new Set<() => void>();

function changed(next: Binding[][]): void {
  active = next;
  for (const listener of listeners) listener();
}

/** Bind keys while a component is there; the last one to bind a key has it. Keys typed into a field stay there. */
export function useKeys(bindings: Binding[]): void {
  const latest = useRef(bindings);
  latest.current = bindings;
  useEffect(() => {
    const own: Binding[] = latest.current.map(({ key, label }) => ({
      key,
      label,
      run: () => latest.current.find((binding) => binding.key === key)?.run(),
    }));
    changed([...active, own]);
    return () => changed(active.filter((each) => each !== own));
  }, []);
}

/** All keys that are bound now, for the help. */
export function useBoundKeys(): Binding[] {
  const layers = useSyncExternalStore(
    (listener) => {
      listeners.add(listener);
      return () => listeners.delete(listener);
    },
    () => active,
  );
  return layers.flat();
}

function typing(target: EventTarget | null, key: string): boolean {
  if (target instanceof HTMLInputElement && /^(checkbox|radio)$/.test(target.type)) return /^( |Arrow.*)$/.test(key);
  return (
    target instanceof HTMLElement && (target.isContentEditable || /^(INPUT|TEXTAREA|SELECT)$/.test(target.tagName))
  );
}

/** Enter and the space bar are for what has the focus, if it does something. */
function pressing(target: EventTarget | null, key: string): boolean {
  return (key === "Enter" || key === " ") && target instanceof Element && target.closest("a, button, summary") !== null;
}

window.addEventListener("keydown", (event) => {
  if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target instanceof Element && event.target.closest('[data-keys="own"], [role="menu"], [role="dialog"]'))
    return;
  if (typing(event.target, event.key) && event.key !== "Escape") return;
  if (pressing(event.target, event.key)) return;
  const binding = active.flat().findLast((each) => each.key === event.key);
  if (binding) {
    event.preventDefault();
    binding.run();
  }
});

import { useCallback, useEffect, useRef, useState } from "react";
import { setQuery, useAddress } from "../address";

/**
 * The node that is selected: in the address, so that it can be shared. The address follows a moment later, since browsers do not
 * let it change as often as somebody who holds a key down moves.
 */
export function useSelection(): [string | null, (id: string | null) => void] {
  const stated = useAddress().query.get("node");
  const [selected, setSelected] = useState(stated);
  const written = useRef(stated);
  const timer = useRef(0);
  useEffect(() => {
    if (stated !== written.current) {
      written.current = stated;
      setSelected(stated);
    }
  }, [stated]);
  useEffect(() => () => window.clearTimeout(timer.current), []);
  const select = useCallback((id: string | null) => {
    setSelected(id);
    window.clearTimeout(timer.current);
    timer.current = window.setTimeout(() => {
      written.current = id;
      setQuery({ node: id });
    }, 150);
  }, []);
  return [selected, select];
}

import { useClipboard, useTimeout } from "@mantine/hooks";
import { useState } from "react";

const SAID_MS = 2_000;

/** Puts text into the clipboard. Browsers have none for a page that came by plain HTTP from another machine, but still the old command. */
export function useCopy(): { copied: boolean; copy: (text: string) => void } {
  const clipboard = useClipboard({ timeout: SAID_MS });
  const [selected, setSelected] = useState(false);
  const { start } = useTimeout(() => setSelected(false), SAID_MS);
  return {
    copied: clipboard.copied || selected,
    copy: (text) => {
      if (navigator.clipboard) return clipboard.copy(text);
      setSelected(copySelected(text));
      start();
    },
  };
}

function copySelected(text: string): boolean {
  const area = document.createElement("textarea");
  area.value = text;
  area.style.position = "fixed";
  area.style.opacity = "0";
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done;
}

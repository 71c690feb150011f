import { ActionIcon } from "@mantine/core";
import { IconChevronLeft, IconChevronRight } from "@tabler/icons-react";

/** A step to what stands before or after: an address, or null at the end. */
export function Neighbour({ to, label, side }: { to: string | null; label: string; side: "before" | "after" }) {
  const icon = side === "before" ? <IconChevronLeft size={16} /> : <IconChevronRight size={16} />;
  return to === null ? (
    <ActionIcon variant="default" size="sm" aria-label={label} disabled>
      {icon}
    </ActionIcon>
  ) : (
    <ActionIcon variant="default" size="sm" component="a" href={to} aria-label={label} title={label}>
      {icon}
    </ActionIcon>
  );
}

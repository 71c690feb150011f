import { ActionIcon, Button } from "@mantine/core";
import { IconCheck, IconCopy } from "@tabler/icons-react";
import { useCopy } from "./clipboard";

/** Puts what a view shows into the clipboard, as JSON. The text is made when it is asked for. */
export function CopyJson({ data, small = false }: { data: unknown; small?: boolean }) {
  const { copied, copy } = useCopy();
  const icon = copied ? <IconCheck size={14} /> : <IconCopy size={14} />;
  const put = () => copy(JSON.stringify(data, null, 2));
  return small ? (
    <ActionIcon variant="subtle" color="gray" size="sm" onClick={put} aria-label="Copy as JSON" title="Copy as JSON">
      {icon}
    </ActionIcon>
  ) : (
    <Button variant="default" size="compact-sm" onClick={put} leftSection={icon} title="Copy as JSON">
      {copied ? "Copied" : "JSON"}
    </Button>
  );
}

import { Button, Checkbox, Popover, Stack } from "@mantine/core";
import { IconColumns3 } from "@tabler/icons-react";
import { type Column, Name } from "./columns";
import { toggled } from "./filters";

/** Which columns the table has; the task is always there. */
export function ColumnsMenu(props: { columns: Column[]; hidden: string[]; hide: (keys: string[]) => void }) {
  const { columns, hidden, hide } = props;
  return (
    <Popover position="bottom-end" shadow="md" trapFocus returnFocus>
      <Popover.Target>
        <Button size="compact-sm" fz="xs" variant="default" fw={500} leftSection={<IconColumns3 size={14} />}>
          Columns
        </Button>
      </Popover.Target>
      <Popover.Dropdown p="sm" mah="70vh" style={{ overflow: "auto" }}>
        <Stack gap={6}>
          {columns.slice(1).map(({ key, label }) => (
            <Checkbox
              key={key}
              size="xs"
              checked={!hidden.includes(key)}
              onChange={() => hide(toggled(hidden, key))}
              label={<Name text={label} />}
            />
          ))}
        </Stack>
      </Popover.Dropdown>
    </Popover>
  );
}

import { ActionIcon, Button, Drawer, Group, NativeSelect, Stack, TextInput } from "@mantine/core";
import { useDisclosure } from "@mantine/hooks";
import { IconFilter, IconSortAscending, IconSortDescending } from "@tabler/icons-react";
import type { Column } from "./columns";
import { type Filtering, Menus, Toggles } from "./filter-bar";
import { sortQuery } from "./filters";
import { useDraft } from "./use-draft";

/** All filters and the order, where there is no room for them beside each other. */
export function FilterDrawer({ columns, count, ...filtering }: Filtering & { columns: Column[]; count: number }) {
  const { filters, apply } = filtering;
  const [opened, { open, close }] = useDisclosure(false);
  const [task, setTask] = useDraft(filters.task, (next) => apply({ task: next.trim() }));
  return (
    <>
      <Button size="xs" variant={count > 0 ? "light" : "default"} onClick={open} leftSection={<IconFilter size={14} />}>
        Filters{count > 0 && ` ${count}`}
      </Button>
      <Drawer opened={opened} onClose={close} position="bottom" size="80%" title="Filters and order">
        <Stack gap="md">
          <Group gap="xs" align="end" wrap="nowrap">
            <NativeSelect
              size="sm"
              flex={1}
              label="Sorted by"
              value={filters.sort}
              onChange={(event) => apply(sortQuery(event.currentTarget.value, filters.descending))}
              data={columns.flatMap(({ sort, label }) => (sort ? [{ value: sort, label }] : []))}
            />
            <ActionIcon
              size="lg"
              variant="default"
              aria-label={filters.descending ? "largest first" : "smallest first"}
              onClick={() => apply(sortQuery(filters.sort, !filters.descending))}
            >
              {filters.descending ? <IconSortDescending size={18} /> : <IconSortAscending size={18} />}
            </ActionIcon>
          </Group>
          <Toggles {...filtering} />
          <TextInput
            size="sm"
            label="Part of the task's name"
            value={task}
            onChange={(event) => setTask(event.currentTarget.value)}
          />
          <Menus {...filtering} spread />
        </Stack>
      </Drawer>
    </>
  );
}

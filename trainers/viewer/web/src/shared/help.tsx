import { Group, Kbd, Modal, Table } from "@mantine/core";
import { useBoundKeys } from "./keys";

const SHOWN: Record<string, string> = {
  ArrowDown: "↓",
  ArrowUp: "↑",
  ArrowLeft: "←",
  ArrowRight: "→",
  Escape: "Esc",
  " ": "Space",
};

/** The keys that do something in the view that is open. */
export function Help({ opened, close }: { opened: boolean; close: () => void }) {
  const bound = useBoundKeys();
  const latest = new Map(bound.map(({ key, label }) => [key, label]));
  const rows = new Map<string, string[]>();
  for (const [key, label] of latest) rows.set(label, [...(rows.get(label) ?? []), key]);
  return (
    <Modal opened={opened} onClose={close} title="Keys" size="sm" data-keys="own">
      <Table verticalSpacing={4}>
        <Table.Tbody>
          {[...rows].map(([label, keys]) => (
            <Table.Tr key={label}>
              <Table.Td w={110}>
                <Group gap={4} wrap="nowrap">
                  {keys.map((key) => (
                    <Kbd key={key}>{SHOWN[key] ?? key}</Kbd>
                  ))}
                </Group>
              </Table.Td>
              <Table.Td>{label}</Table.Td>
            </Table.Tr>
          ))}
        </Table.Tbody>
      </Table>
    </Modal>
  );
}

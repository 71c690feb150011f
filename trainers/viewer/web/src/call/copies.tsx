import { Button, Menu } from "@mantine/core";
import { IconCheck, IconCopy } from "@tabler/icons-react";
import type { CallView } from "../records";
import { useCopy } from "../shared/clipboard";
import { plainText, type Tokens } from "./tokens";

/** Parts of a call for the clipboard. */
export function Copies({ call, tokens }: { call: CallView; tokens: Tokens }) {
  const { copied, copy } = useCopy();
  const { prompt, count } = tokens;
  return (
    <Menu position="bottom-end">
      <Menu.Target>
        <Button
          variant="default"
          size="compact-sm"
          leftSection={copied ? <IconCheck size={14} /> : <IconCopy size={14} />}
        >
          {copied ? "Copied" : "Copy"}
        </Button>
      </Menu.Target>
      <Menu.Dropdown>
        {tokens.texts && (
          <>
            <Menu.Item onClick={() => copy(plainText(tokens, prompt, count))}>sampled text</Menu.Item>
            <Menu.Item onClick={() => copy(plainText(tokens, 0, prompt))}>prompt text</Menu.Item>
            <Menu.Item onClick={() => copy(plainText(tokens, 0, count))}>the whole text</Menu.Item>
          </>
        )}
        <Menu.Item onClick={() => copy(JSON.stringify(call.sampled.ids))}>sampled ids</Menu.Item>
        <Menu.Item onClick={() => copy(JSON.stringify(call.prompt.ids))}>prompt ids</Menu.Item>
        <Menu.Item onClick={() => copy(call.id)}>id of the call</Menu.Item>
      </Menu.Dropdown>
    </Menu>
  );
}

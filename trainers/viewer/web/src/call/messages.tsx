import { Badge, Box, Group, Paper, Stack, Text } from "@mantine/core";
import type { CallView, MessageView } from "../records";
import { number } from "../shared/format";
import { laidOut } from "../shared/text";
import { Visible, Written } from "../shared/written";

/** What the request said that was new, and the reply, as messages. */
export function Messages({ run, call }: { run: string; call: CallView }) {
  const { news, messages, reply } = call.node;
  const old = messages - news.length;
  return (
    <Stack gap="xs" maw={900}>
      {old > 0 && (
        <Text size="sm" c="dimmed">
          {number(old)} earlier {old === 1 ? "message" : "messages"} of the conversation came before these.
        </Text>
      )}
      {news.map((message, at) => (
        // biome-ignore lint/suspicious/noArrayIndexKey: messages have no identity but their place
        <OneMessage key={at} run={run} message={message} />
      ))}
      <OneMessage run={run} message={reply} reply />
    </Stack>
  );
}

function OneMessage({ run, message, reply = false }: { run: string; message: MessageView; reply?: boolean }) {
  return (
    <Paper
      withBorder
      p="xs"
      style={reply ? { borderLeft: "3px solid var(--mantine-primary-color-filled)" } : undefined}
    >
      <Group gap={6} mb={4}>
        <Badge variant="light" color={reply ? undefined : "gray"} size="sm" tt="none">
          <Visible text={message.role || "?"} />
        </Badge>
        {reply && (
          <Text size="xs" c="dimmed">
            the reply
          </Text>
        )}
      </Group>
      {message.text.length > 0 && <Written run={run} text={message.text} folded={4000} />}
      {message.text.length === 0 && message.tools.length === 0 && (
        <Text size="xs" c="dimmed">
          no text
        </Text>
      )}
      {message.tools.map((tool, at) => (
        // biome-ignore lint/suspicious/noArrayIndexKey: tool calls have no identity but their place
        <Box key={at} mt={6}>
          <Text size="xs" c="dimmed">
            calls{" "}
            <Text span inherit fw={600} className="written">
              <Visible text={tool.name} />
            </Text>
          </Text>
          <Written run={run} text={laidOut(tool.arguments)} />
        </Box>
      ))}
    </Paper>
  );
}

/** The rest of the request. */
export function Request({ run, call }: { run: string; call: CallView }) {
  return (
    <Stack gap="md" maw={900}>
      <section>
        <Text component="h3" size="sm" fw={600} mb={4}>
          Parameters
        </Text>
        <Written run={run} text={laidOut(call.parameters)} folded={8000} />
      </section>
      <section>
        <Text component="h3" size="sm" fw={600} mb={4}>
          Tools offered
        </Text>
        {call.tools ? (
          <Written run={run} text={laidOut(call.tools)} folded={8000} />
        ) : (
          <Text size="sm" c="dimmed">
            none
          </Text>
        )}
      </section>
    </Stack>
  );
}

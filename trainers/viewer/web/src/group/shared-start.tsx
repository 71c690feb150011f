import { Button, Group, Text as Paragraph, Stack } from "@mantine/core";
import { useState } from "react";
import { Data } from "../episode/message";
import type { GroupView } from "../records";
import { number } from "../shared/format";
import classes from "./group.module.css";
import { OneMessage } from "./sample-message";

/** As many of the last shared messages are there at first. */
const LAST = 2;

/** The task, and how all samples begin: its end, which they answer to, unless somebody wants all. */
export function SharedStart({ run, view }: { run: string; view: GroupView }) {
  const [all, setAll] = useState(false);
  const [task, setTask] = useState(false);
  const { shared, shared_tokens } = view;
  const before = Math.max(0, shared.length - LAST);
  const first = all ? 0 : before;
  return (
    <section className={classes.shared} aria-label="What all samples share">
      <Group gap={8} mb={shared.length > 0 || task ? 4 : 0}>
        <Paragraph size="xs" c="dimmed">
          {shared.length === 0
            ? "They share no message"
            : `All begin with ${number(shared.length)} ${shared.length === 1 ? "message" : "messages"}`}
          {shared_tokens > 0 && `, ${number(shared_tokens)} tokens`}
        </Paragraph>
        {before > 0 && (
          <Button size="compact-xs" variant="subtle" color="gray" aria-expanded={all} onClick={() => setAll(!all)}>
            {all ? "only the last" : `show ${number(before)} before`}
          </Button>
        )}
        <Button size="compact-xs" variant="subtle" color="gray" aria-expanded={task} onClick={() => setTask(!task)}>
          {task ? "hide the task's input" : "the task's input"}
        </Button>
      </Group>
      {task && (
        <div className={classes.tool} style={{ marginBottom: 6 }}>
          <Data run={run} text={view.task_input} />
        </div>
      )}
      <Stack gap={4}>
        {shared.slice(first).map((said, at) => (
          // biome-ignore lint/suspicious/noArrayIndexKey: messages have no identity but their place
          <OneMessage key={first + at} run={run} said={said} />
        ))}
      </Stack>
    </section>
  );
}

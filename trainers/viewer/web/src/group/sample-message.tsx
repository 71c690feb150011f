import { Anchor, Text as Paragraph } from "@mantine/core";
import { memo } from "react";
import { href } from "../address";
import type { SampleMessage } from "../records";
import { laidOut } from "../shared/text";
import { Visible, Written } from "../shared/written";
import type { Along } from "./align";
import classes from "./group.module.css";

interface Props {
  run: string;
  said: SampleMessage;
  /** Whether the sample that it is compared with says the same. */
  equal?: boolean;
  /** How far it goes along with what stands beside it. */
  same?: Along;
}

/** What somebody said, and a way to the tokens of what the policy did. */
export const OneMessage = memo(function OneMessage({ run, said, equal = false, same }: Props) {
  const { call, message } = said;
  return (
    <div className={classes.message} data-by={call === null ? message.role : "policy"} data-same={equal}>
      <div className={classes.who}>
        <b>
          <Visible text={message.role || "no role"} />
        </b>
        {call !== null && (
          <Anchor inherit href={href("run", run, "call", call)}>
            tokens
          </Anchor>
        )}
        {equal && <span>the same</span>}
      </div>
      <div className={classes.body}>
        {message.text.length > 0 && (
          <Written run={run} text={message.text} same={same?.text} folded={(same?.text ?? 0) + 1200} />
        )}
        {message.text.length === 0 && message.tools.length === 0 && (
          <Paragraph size="xs" c="dimmed" fs="italic">
            nothing
          </Paragraph>
        )}
        {message.tools.map((tool, at) => (
          // biome-ignore lint/suspicious/noArrayIndexKey: tool calls have no identity but their place
          <div key={at} className={classes.tool}>
            <Paragraph size="xs" fw={600} style={{ overflowWrap: "anywhere" }}>
              → <Visible text={tool.name} />
            </Paragraph>
            <Written run={run} text={laidOut(tool.arguments)} same={same?.tools[at]} />
          </div>
        ))}
      </div>
    </div>
  );
});

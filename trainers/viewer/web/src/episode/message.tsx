import { Text as Paragraph } from "@mantine/core";
import { memo, useMemo } from "react";
import type { MessageView, Text } from "../records";
import { isCut, laidOut } from "../shared/text";
import { Visible, Written } from "../shared/written";
import styles from "./episode.module.css";
import { lastLine } from "./words";

/** A text that may be JSON, laid out. */
export function Data({ run, text }: { run: string; text: Text }) {
  const laid = useMemo(() => laidOut(text), [text]);
  return <Written run={run} text={laid} />;
}

/** What went wrong first, then how it came to that. */
export function Traceback({ run, text }: { run: string; text: Text }) {
  const cut = isCut(text);
  const said = lastLine(text.text);
  const whole = text.text.trim();
  return (
    <section className={styles.error} aria-label="error">
      {!cut && (
        <div className="written">
          <strong>
            <Visible text={said.slice(0, 2000)} />
          </strong>
        </div>
      )}
      {(cut || whole !== said) && <Written run={run} text={text} folded={4000} />}
    </section>
  );
}

export const Message = memo(function Message({
  run,
  message,
  sampled = false,
  who,
}: {
  run: string;
  message: MessageView;
  sampled?: boolean;
  who?: string;
}) {
  return (
    <div className={sampled ? styles.sampled : styles.said}>
      <Paragraph size="xs" c="dimmed" fw={600}>
        <Visible text={who ?? message.role} />
      </Paragraph>
      {message.text.length > 0 ? (
        <Written run={run} text={message.text} folded={message.role === "system" ? 500 : 1200} />
      ) : (
        message.tools.length === 0 && (
          <Paragraph size="xs" c="dimmed" fs="italic">
            nothing
          </Paragraph>
        )
      )}
      {message.tools.map((tool, at) => (
        // biome-ignore lint/suspicious/noArrayIndexKey: tool calls have no identity but their place
        <div key={at} className={styles.asked}>
          <Paragraph size="xs" fw={600}>
            → <Visible text={tool.name} />
          </Paragraph>
          <Data run={run} text={tool.arguments} />
        </div>
      ))}
    </div>
  );
});

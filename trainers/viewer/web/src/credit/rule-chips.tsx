import { Badge, Chip, Text as Paragraph, Tooltip } from "@mantine/core";
import { memo } from "react";
import styles from "./credit.module.css";
import { RULES, ruleSentence } from "./rules";

/** The run's own rule, and those that may stand beside it. */
export const RuleChips = memo(function RuleChips({
  own,
  chosen,
  onToggle,
}: {
  own: string;
  chosen: readonly string[];
  onToggle: (rule: string) => void;
}) {
  const others = [...new Set([...RULES, ...chosen])].filter((rule) => rule !== own);
  return (
    <div className={styles.rules}>
      <Tooltip label={ruleSentence(own)} multiline maw={320}>
        <Badge variant="light" tt="none" size="lg" radius="xl" fw={600}>
          {own.slice(0, 60)}
        </Badge>
      </Tooltip>
      <Paragraph span size="xs" c="dimmed" mx={4}>
        beside it
      </Paragraph>
      {others.map((rule) => (
        <Tooltip key={rule} label={ruleSentence(rule)} multiline maw={320} openDelay={400}>
          <div>
            <Chip size="xs" variant="outline" checked={chosen.includes(rule)} onChange={() => onToggle(rule)}>
              {rule.slice(0, 60)}
            </Chip>
          </div>
        </Tooltip>
      ))}
    </div>
  );
});

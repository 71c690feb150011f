import { Anchor, Badge, Button, Group, Text as Paragraph, Stack } from "@mantine/core";
import { IconArrowRight } from "@tabler/icons-react";
import type { ReactNode } from "react";
import { href, withQuery } from "../address";
import type { CallNode, EpisodeView, RewardView, SpanNode, Text } from "../records";
import { duration, number, signed, time, words } from "../shared/format";
import { Visible } from "../shared/written";
import styles from "./episode.module.css";
import { Data, Message, Traceback } from "./message";
import type { TreeNode } from "./tree";
import { relationSentence, versionWords } from "./words";

interface Props {
  run: string;
  episode: EpisodeView;
  node: TreeNode | null;
  onSelect: (id: string) => void;
}

/** Everything about the node that is selected; about the episode as a whole if none is. */
export function Detail({ run, episode, node, onSelect }: Props) {
  if (node === null) return <WholeEpisode run={run} episode={episode} />;
  if (node.type === "span") return <SpanDetail run={run} node={node} />;
  return <CallDetail run={run} node={node} episode={episode} onSelect={onSelect} />;
}

function WholeEpisode({ run, episode }: { run: string; episode: EpisodeView }) {
  return (
    <Stack gap="sm">
      {episode.error && (
        <Part title="How it failed">
          <Traceback run={run} text={episode.error} />
        </Part>
      )}
      <Part title="Task">
        <Block run={run} text={episode.task_input} />
      </Part>
      {episode.answer && (
        <Part title="Answer">
          <Block run={run} text={episode.answer} />
        </Part>
      )}
      {episode.rewards.length > 0 && (
        <Part title="Rewards of the episode">
          <RewardTable rewards={episode.rewards} />
        </Part>
      )}
      <Part title="Record">
        <Facts
          facts={[
            ["id", episode.id],
            ["group", episode.group],
            ["began", time(episode.started_at)],
            ["ended", episode.ended_at === null ? "not yet" : time(episode.ended_at)],
          ]}
        />
      </Part>
    </Stack>
  );
}

function SpanDetail({ run, node }: { run: string; node: SpanNode }) {
  return (
    <Stack gap="sm">
      <Title kind={node.kind} name={node.name} />
      {node.error && <Traceback run={run} text={node.error} />}
      {node.arguments && (
        <Part title="Arguments">
          <Block run={run} text={node.arguments} />
        </Part>
      )}
      {node.result && (
        <Part title="Result">
          <Block run={run} text={node.result} />
        </Part>
      )}
      {node.rewards.length > 0 && (
        <Part title="Rewards here">
          <RewardTable rewards={node.rewards} />
        </Part>
      )}
      {node.attributes && (
        <Part title="Attributes">
          <Block run={run} text={node.attributes} />
        </Part>
      )}
      <Facts
        facts={[
          ["began", time(node.started_at)],
          ["took", node.ended_at < node.started_at ? "still running" : duration(node.ended_at - node.started_at)],
        ]}
      />
    </Stack>
  );
}

function CallDetail({ run, node, episode, onSelect }: { run: string; node: CallNode } & Omit<Props, "node">) {
  const origin = episode.nodes.find((each) => each.id === node.continues);
  const originName = origin?.type === "call" ? `call #${origin.index}` : "an earlier call";
  return (
    <Stack gap="sm">
      <Group justify="space-between" wrap="nowrap">
        <Title kind="call" name={`#${node.index} ${node.agent}`} />
        <Button
          component="a"
          href={href("run", run, "call", node.id)}
          size="compact-sm"
          variant="light"
          rightSection={<IconArrowRight size={14} />}
          style={{ flex: "none" }}
        >
          Tokens
        </Button>
      </Group>
      <Paragraph size="xs" c="dimmed">
        {relationSentence(node, originName)}{" "}
        {origin && (
          <Anchor component="button" type="button" size="xs" onClick={() => onSelect(origin.id)}>
            Show {originName}
          </Anchor>
        )}
        {node.relation !== "extension" && node.parted_at !== null && (
          <>
            {" · where they part: "}
            <Anchor size="xs" href={atToken(run, node.id, node.parted_at)}>
              here
            </Anchor>
            {node.continues !== null && (
              <>
                {", "}
                <Anchor size="xs" href={atToken(run, node.continues, node.parted_at)}>
                  in {originName}
                </Anchor>
              </>
            )}
          </>
        )}
      </Paragraph>
      {node.rewards.length > 0 && <RewardTable rewards={node.rewards} />}
      <Stack gap={6}>
        {node.news.length < node.messages && (
          <Paragraph size="xs" c="dimmed">
            … {number(node.messages - node.news.length)} messages that an earlier call had, too
          </Paragraph>
        )}
        {node.news.map((message, at) => (
          // biome-ignore lint/suspicious/noArrayIndexKey: messages have no identity but their place
          <Message key={at} run={run} message={message} />
        ))}
        <Message run={run} message={node.reply} sampled who={node.upstream ? `reply, by ${node.upstream}` : "reply"} />
      </Stack>
      <Facts
        facts={[
          ["prompt", `${number(node.prompt_tokens)} tokens, ${number(node.cached_tokens)} of them from the cache`],
          ["sampled", `${number(node.sampled_tokens)} tokens`],
          ["mean log-prob", node.mean_logprob === null ? "–" : node.mean_logprob.toFixed(4)],
          ["policy version", versionWords(node.versions) || "–"],
          ["ended by", words(node.finish_reason)],
          ["temperature", node.temperature === 0 ? "0: greedy, never trained on" : number(node.temperature)],
          ["model", node.model],
          ["answered by", node.upstream && `${node.upstream}, in the policy's place`],
          ["restricted by", node.restricted.map(words).join(", ")],
          ["redacted", node.redacted ? "tokens were taken out before it was stored" : ""],
          ["began", time(node.started_at)],
          ["took", duration(node.ended_at - node.started_at)],
          ["id", node.id],
        ]}
      />
    </Stack>
  );
}

function atToken(run: string, call: string, token: number): string {
  return withQuery(href("run", run, "call", call), { token });
}

function Title({ kind, name }: { kind: string; name: string }) {
  return (
    <Group gap={8} wrap="nowrap" style={{ minWidth: 0 }}>
      <Badge size="sm" variant="default" tt="none" style={{ flex: "none" }}>
        {kind}
      </Badge>
      <Paragraph fw={600} style={{ overflowWrap: "anywhere" }}>
        <Visible text={name.slice(0, 300)} />
      </Paragraph>
    </Group>
  );
}

function Part({ title, children }: { title: string; children: ReactNode }) {
  return (
    <section>
      <Paragraph size="xs" fw={600} mb={4}>
        {title}
      </Paragraph>
      {children}
    </section>
  );
}

function Block({ run, text }: { run: string; text: Text }) {
  return (
    <div className={styles.block}>
      <Data run={run} text={text} />
    </div>
  );
}

function Facts({ facts }: { facts: [string, string][] }) {
  return (
    <dl className={styles.keys} style={{ margin: 0 }}>
      {facts
        .filter(([, value]) => value !== "")
        .map(([name, value]) => (
          <div key={name} style={{ display: "contents" }}>
            <dt>{name}</dt>
            <dd>
              <Visible text={value} />
            </dd>
          </div>
        ))}
    </dl>
  );
}

const SOURCES: Record<string, string> = {
  "": "the agent emitted it",
  returned: "the agent's answer",
  function: "the recipe's reward function",
  automatic: "the recipe's automatic rules",
  unknown: "",
};

function RewardTable({ rewards }: { rewards: RewardView[] }) {
  return (
    <dl className={styles.keys} style={{ margin: 0 }}>
      {rewards.map((reward, at) => (
        // biome-ignore lint/suspicious/noArrayIndexKey: a name may come twice
        <div key={at} style={{ display: "contents" }}>
          <dt>
            <Visible text={reward.name} />
          </dt>
          <dd>
            <strong>{signed(reward.weight * reward.value)}</strong>
            {reward.weight !== 1 && ` = ${number(reward.value)} × ${number(reward.weight)}`}
            <Paragraph span size="xs" c="dimmed">
              {"  "}
              {SOURCES[reward.source] ?? reward.source}
            </Paragraph>
          </dd>
        </div>
      ))}
    </dl>
  );
}

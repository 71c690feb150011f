import { Anchor, Badge, Group, Stack, Text, Title } from "@mantine/core";
import type { ReactNode } from "react";
import { href, setQuery, withQuery } from "../address";
import type { CallView } from "../records";
import { CopyJson } from "../shared/copy-json";
import { duration, number, signed, time } from "../shared/format";
import { Neighbour } from "../shared/neighbour";
import { Visible } from "../shared/written";
import { Copies } from "./copies";
import { indexOf, relationWords, versionWords } from "./figures";
import type { Tokens } from "./tokens";
import type { Training } from "./training";

export interface Neighbours {
  before: string | null;
  after: string | null;
}

/** What a call is, in a few lines, and the ways on from it. */
export function Head({
  run,
  call,
  tokens,
  training,
  neighbours,
}: {
  run: string;
  call: CallView;
  tokens: Tokens;
  training: Training;
  /** Addresses of the calls before and after it. */
  neighbours: Neighbours;
}) {
  const { node } = call;
  const evaluated = call.phase !== "train";
  return (
    <Stack gap={6}>
      <Group justify="space-between" gap="xs" align="flex-start">
        <Group gap="xs" miw={0}>
          <Title order={1} size="h4" style={{ overflowWrap: "anywhere" }}>
            Call {node.index}
            {node.agent && (
              <>
                {" of "}
                <Visible text={node.agent} />
              </>
            )}
          </Title>
          <Neighbour to={neighbours.before} label="The call before, of the episode ([)" side="before" />
          <Neighbour to={neighbours.after} label="The next call of the episode (])" side="after" />
          <Flags call={call} />
        </Group>
        <Group gap="xs">
          <Anchor size="sm" href={withQuery(href("run", run, "episode", call.episode), { node: call.id })}>
            episode
          </Anchor>
          {call.group && (
            <Anchor size="sm" href={href("run", run, "group", call.group)}>
              group
            </Anchor>
          )}
          {call.group && !evaluated && (
            <Anchor size="sm" href={withQuery(href("run", run, "credit", call.group), { episode: call.episode })}>
              credit
            </Anchor>
          )}
          <Copies call={call} tokens={tokens} />
          <CopyJson data={call} />
        </Group>
      </Group>
      <Group gap="2px 18px">
        <Relation run={run} call={call} />
        <Fact name="model">
          <Visible text={node.model || "–"} />
        </Fact>
        {node.upstream === "" && (
          <>
            <Fact name="prompt">
              {number(node.prompt_tokens)}
              {node.cached_tokens > 0 && `, ${number(node.cached_tokens)} cached`}
            </Fact>
            <Fact name="sampled">{number(node.sampled_tokens)}</Fact>
          </>
        )}
        <Fact name="ended by">
          <Visible text={node.finish_reason || "–"} />
        </Fact>
        <Fact name="temperature">{number(node.temperature)}</Fact>
        {node.versions.length > 0 && <Fact name="version">{versionWords(node.versions)}</Fact>}
        {node.mean_logprob !== null && <Fact name="mean log-prob">{number(node.mean_logprob)}</Fact>}
        <Fact name="took" title={`started at ${time(node.started_at)} UTC`}>
          {node.ended_at > 0 ? duration(node.ended_at - node.started_at) : "not over"}
        </Fact>
        <Fact name={evaluated ? "in" : "in step"}>{evaluated ? `${call.phase}, step ${call.step}` : call.step}</Fact>
        {training.advantage !== null && <Fact name="advantage">{signed(training.advantage)}</Fact>}
        {training.ret !== null && <Fact name="return">{number(training.ret)}</Fact>}
        {node.rewards.map((reward) => (
          <Fact
            key={`${reward.name} ${reward.source} ${reward.time}`}
            name="reward"
            title={`weight ${number(reward.weight)}${reward.source && `, from ${reward.source}`}`}
          >
            <Visible text={reward.name} /> {number(reward.value)}
            {reward.weight !== 1 && ` × ${number(reward.weight)}`}
          </Fact>
        ))}
      </Group>
    </Stack>
  );
}

function Fact({ name, title, children }: { name: string; title?: string; children: ReactNode }) {
  return (
    <Text size="sm" title={title} style={{ fontVariantNumeric: "tabular-nums", overflowWrap: "anywhere" }}>
      <Text span inherit c="dimmed">
        {name}{" "}
      </Text>
      {children}
    </Text>
  );
}

/** What it continues, and where the two part. */
function Relation({ run, call }: { run: string; call: CallView }) {
  const { continues, parted_at: at } = call.node;
  if (continues === null) return <Fact name={relationWords(call.node)}>{null}</Fact>;
  const index = indexOf(call.prompt_parts, continues);
  return (
    <Fact name={relationWords(call.node)}>
      <Anchor inherit href={withQuery(href("run", run, "call", continues), { token: at })}>
        {index === null ? "an earlier call" : `call ${index}`}
      </Anchor>
      {at !== null && at < call.node.prompt_tokens && (
        <>
          {" · "}
          <Anchor component="button" type="button" inherit onClick={() => setQuery({ token: at, tab: null })}>
            show here
          </Anchor>
        </>
      )}
    </Fact>
  );
}

function Flags({ call: { node } }: { call: CallView }) {
  return (
    <>
      {node.upstream && (
        <Badge color="grape" variant="light" size="sm" tt="none" title="A provider answered in the policy's place">
          upstream: <Visible text={node.upstream} />
        </Badge>
      )}
      {node.redacted && (
        <Badge color="orange" variant="light" size="sm" tt="none" title="Something was taken out before it was stored">
          redacted
        </Badge>
      )}
      {node.restricted.length > 0 && (
        <Badge
          color="orange"
          variant="light"
          size="sm"
          tt="none"
          title="Sampled from another distribution than softmax(logits / temperature)"
        >
          restricted by {node.restricted.join(", ").replaceAll("_", " ")}
        </Badge>
      )}
    </>
  );
}

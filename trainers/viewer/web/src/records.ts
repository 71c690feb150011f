// Made by `python -m trainers.viewer.typescript` from trainers/viewer/records.py: not to be edited.

export type Outcome = "completed" | "agent_error" | "timeout" | "infrastructure_error" | "cancelled";

/** Any answer with a status of 400 or more. */
export interface Failure {
  error: string;
  hint: string;
}

/** Text that somebody else wrote. Of one that is very long only the beginning is here. */
export interface Text {
  text: string;
  length: number;
  place: string;
}

/** A run in the list. */
export interface RunEntry {
  key: string;
  name: string;
  path: string;
  state: "finished" | "recorded" | "running" | "stopped";
  started_at: number;
  updated_at: number;
  model: string;
  seed: number | null;
  steps: number | null;
  steps_done: number;
  success: Record<string, number>;
  success_ci95: Record<string, number[]>;
  note: string;
}

export interface Runs {
  runs: RunEntry[];
  place: string;
  chosen: string | null;
}

export interface Evaluation {
  step: number;
  label: string;
  success: number;
  ci95: number[];
  n: number;
}

/** A run in figures. `series` has a value, or None, for each of `steps`. */
export interface RunDetail {
  entry: RunEntry;
  steps: number[];
  series: Record<string, (number | null)[]>;
  every: number;
  advantage_edges: number[];
  advantage_counts: (number[] | null)[];
  evaluations: Evaluation[];
  stages: Record<string, number>;
  recipe: Record<string, string>;
  formula: string;
}

export interface EpisodeRow {
  id: string;
  phase: string;
  step: number;
  task: string;
  sample: number;
  attempt: number;
  group: string;
  outcome: Outcome | null;
  counted: boolean;
  rewards: Record<string, number>;
  calls: number;
  tokens: number;
  agents: string[];
  versions: number[];
  started_at: number;
  seconds: number | null;
}

/** Agents, versions and texts of old episodes are read in the background: how many episodes are done. */
export interface Indexing {
  done: number;
  total: number;
}

export interface EpisodePage {
  rows: EpisodeRow[];
  offset: number;
  matched: number;
  total: number;
  revision: number;
  indexing: Indexing;
}

export interface Range {
  low: number;
  high: number;
}

/** What there is to filter by. */
export interface Facets {
  phases: Record<string, number>;
  outcomes: Record<string, number>;
  agents: Record<string, number>;
  rewards: Record<string, Range>;
  steps: Range;
  versions: Range | null;
  calls: Range;
  tokens: Range;
  revision: number;
  indexing: Indexing;
}

/** Filters of `/episodes`; each narrows what the others leave. Ranges include their ends. */
export interface EpisodeQuery {
  phase: string[];
  outcome: string[];
  counted: boolean | null;
  agent: string[];
  task: string;
  group: string;
  text: string;
  step: [number | null, number | null];
  version: [number | null, number | null];
  calls: [number | null, number | null];
  tokens: [number | null, number | null];
  seconds: [number | null, number | null];
  reward: Record<string, [number | null, number | null]>;
  sort: string;
  descending: boolean;
  offset: number;
  limit: number;
}

export interface RewardView {
  name: string;
  value: number;
  weight: number;
  source: string;
  time: number;
}

export interface ToolCallView {
  name: string;
  arguments: Text;
}

export interface MessageView {
  role: string;
  text: Text;
  tools: ToolCallView[];
}

/** An agent, chain, tool or handoff. */
export interface SpanNode {
  type: "span";
  id: string;
  parent: string | null;
  depth: number;
  kind: string;
  name: string;
  started_at: number;
  ended_at: number;
  arguments: Text | null;
  result: Text | null;
  attributes: Text | null;
  error: Text | null;
  rewards: RewardView[];
}

export interface CallNode {
  type: "call";
  id: string;
  parent: string | null;
  depth: number;
  index: number;
  agent: string;
  model: string;
  upstream: string;
  redacted: boolean;
  restricted: string[];
  finish_reason: string;
  temperature: number;
  started_at: number;
  ended_at: number;
  prompt_tokens: number;
  cached_tokens: number;
  sampled_tokens: number;
  versions: number[];
  mean_logprob: number | null;
  relation: string;
  continues: string | null;
  parted_at: number | null;
  news: MessageView[];
  messages: number;
  reply: MessageView;
  rewards: RewardView[];
}

/** An episode of the same group. */
export interface Sibling {
  id: string;
  sample: number;
  attempt: number;
  outcome: Outcome | null;
  counted: boolean;
  rewards: Record<string, number>;
  total: number | null;
}

export interface EpisodeView {
  id: string;
  phase: string;
  step: number;
  task: string;
  task_input: Text;
  sample: number;
  attempt: number;
  group: string;
  outcome: Outcome | null;
  counted: boolean;
  answer: Text | null;
  error: Text | null;
  started_at: number;
  ended_at: number | null;
  rewards: RewardView[];
  total: number | null;
  nodes: (SpanNode | CallNode)[];
  siblings: Sibling[];
  before: string | null;
  after: string | null;
}

export interface Alternative {
  id: number;
  text: string;
  logprob: number;
}

export interface TokenColumns {
  ids: number[];
  texts: string[];
  special: number[];
  broken: number[];
}

/** Who wrote prompt tokens [start, end): an earlier call sampled them, or they came from outside (`call` is None). */
export interface PromptPart {
  start: number;
  end: number;
  call: string | null;
  index: number | null;
}

export interface CallView {
  id: string;
  episode: string;
  group: string;
  phase: string;
  step: number;
  node: CallNode;
  before: string | null;
  after: string | null;
  prompt: TokenColumns;
  prompt_parts: PromptPart[];
  sampled: TokenColumns;
  logprobs: (number | null)[];
  versions: number[];
  entropies: (number | null)[];
  alternatives: Alternative[][];
  expert_layers: number;
  tokenizer: string;
  tools: Text | null;
  parameters: Text;
}

/** Of one layer: [tokens of prompt + sampled that were recorded][top k] expert ids, the first token at `start`. */
export interface ExpertColumns {
  layer: number;
  layers: number;
  start: number;
  experts: number[][];
}

export interface SampleMessage {
  call: string | null;
  message: MessageView;
}

export interface SampleView {
  episode: string;
  sample: number;
  attempt: number;
  outcome: Outcome | null;
  counted: boolean;
  total: number | null;
  rewards: Record<string, number>;
  error: Text | null;
  answer: Text | null;
  messages: SampleMessage[];
  same_characters: number;
  tokens: number;
}

export interface GroupView {
  group: string;
  phase: string;
  step: number;
  task: string;
  task_input: Text;
  shared: SampleMessage[];
  shared_tokens: number;
  samples: SampleView[];
  before: string | null;
  after: string | null;
}

/** What a rule gave to a call. */
export interface CallCredit {
  ret: number;
  advantage: number;
  token_advantages: number[];
  masked: string | null;
  with_loss: number;
}

export interface RuleCredit {
  rule: string;
  calls: Record<string, CallCredit>;
  unknown: string;
}

/** A call, whoever made it, without its texts. */
export interface CallFacts {
  id: string;
  index: number;
  agent: string;
  learns: boolean;
  span_id: string | null;
  parent_id: string | null;
  relation: string;
  parted_at: number | null;
  sampled: number;
  earned: number;
  rewards: Record<string, number>;
}

export interface RolloutFacts {
  episode: string;
  sample: number;
  ret: number;
  outcome: number;
  outcome_rewards: Record<string, number>;
  calls: CallFacts[];
}

/** A group by the run's own rule and objective, and by others beside it. */
export interface GroupReport {
  group: string;
  task: string;
  objective: string;
  rollouts: RolloutFacts[];
  own: RuleCredit;
  others: RuleCredit[];
  notes: string[];
}

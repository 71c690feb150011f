/** The built-in credit rules, and what each gives to a call: docs/credit.md. */
export const RULES = [
  "equal",
  "final",
  "step_rewards",
  "return_to_go",
  "per_agent",
  "mt_grpo",
  "tree",
  "gigpo",
  "turn_gae",
  "token_gae",
] as const;

const SENTENCES: Record<string, string> = {
  equal: "Every call gets the return of the whole rollout.",
  final: "The last call gets the return, the others nothing.",
  step_rewards: "A call gets what it earned itself, and an equal share of what was earned at no call.",
  return_to_go: "A call gets what was earned from it on, discounted; what came before does not count for it.",
  per_agent: "A call gets what the calls of its agent earned, and the outcome, compared with the same agent elsewhere.",
  mt_grpo:
    "A call before the last gets what it earned itself, and a part of the outcome; the last call gets the outcome.",
  tree: "A call gets the mean outcome of what it led to, less that of the state it was made in.",
  gigpo: "The return, and what came after, compared with calls that were made before the same observation.",
  turn_gae: "The critic's advantage, call by call.",
  token_gae: "The critic's advantage, token by token: PPO.",
};

export function ruleSentence(rule: string): string {
  return SENTENCES[rule] ?? "A rule of the recipe's own.";
}

/** Rules that say different things of most runs, and need nothing that is not stored. */
const BESIDE: readonly string[] = ["equal", "step_rewards", "tree"];
const NONE = "none";

/** The rules beside the run's own that `rule=` of the address names; without one, some that are worth a look. */
export function chosenRules(stated: readonly string[], own: string): string[] {
  const wanted = stated.length > 0 ? stated : BESIDE;
  return [...new Set(wanted)].filter((rule) => rule !== own && rule !== NONE);
}

/** What `rule=` is to be once `rule` is put in, or taken out. */
export function toggled(chosen: readonly string[], rule: string): string[] {
  const next = chosen.includes(rule) ? chosen.filter((each) => each !== rule) : [...chosen, rule];
  return next.length > 0 ? next : [NONE];
}

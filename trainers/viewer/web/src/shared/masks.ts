/** Why a call is not trained on: `lightning_rl.transition.Mask`, in words. */
interface Reason {
  label: string;
  sentence: string;
}

const REASONS: Record<string, Reason> = {
  no_signal: {
    label: "no signal",
    sentence:
      "All advantages of the group are zero, so there is nothing to learn from it. Its tokens still count in the means of the loss.",
  },
  zero_advantage: {
    label: "advantage 0",
    sentence:
      "Its return is exactly what it is compared with, so its gradient would be zero. Its tokens still count in the means of the loss.",
  },
  group_of_one: {
    label: "alone",
    sentence: "No other rollout of the task to compare it with: nobody can say whether it was better or worse.",
  },
  no_credit: { label: "no credit", sentence: "The credit rule gives this call nothing to learn from." },
  greedy: {
    label: "greedy",
    sentence: "It was sampled at temperature 0: always the likeliest token, which is no sample of the policy.",
  },
  aborted: { label: "aborted", sentence: "The agent hung up before the call was done, and never saw its end." },
  other_model: { label: "other model", sentence: "An adapter or a provider answered, not the policy." },
  not_learning: { label: "does not learn", sentence: "It was made by an agent that the recipe does not train." },
  redacted: { label: "redacted", sentence: "Tokens were taken out of it before it was stored." },
  restricted: {
    label: "restricted",
    sentence: "It was sampled under restrictions (a grammar, top_p, penalties, …), and the recipe masks such calls.",
  },
  stale: { label: "stale", sentence: "One of its tokens is from a policy that is too many versions old." },
  row_limit: { label: "row limit", sentence: "Its tokens lie beyond train.max_row_tokens and were cut off." },
};

/** All that are known, in an order that stays. */
export const MASKS = Object.keys(REASONS);

/** A word or two, for a cell. */
export function maskLabel(mask: string): string {
  return REASONS[mask]?.label ?? mask.replaceAll("_", " ");
}

/** A plain sentence. */
export function maskSentence(mask: string): string {
  return REASONS[mask]?.sentence ?? `Masked as ${mask.replaceAll("_", " ")}.`;
}

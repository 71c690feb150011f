import type { TokenColumns } from "../records";
import { type Tokens, tokensOf } from "./tokens";

/** Tokens for tests, by their texts. */
export function tokensFrom(prompt: string[], sampled: string[], marks: Partial<TokenColumns> = {}): Tokens {
  return tokensOf({ prompt: columns(prompt), sampled: { ...columns(sampled), ...marks } });
}

function columns(texts: string[]): TokenColumns {
  return { ids: texts.map((_, at) => at), texts, special: [], broken: [] };
}

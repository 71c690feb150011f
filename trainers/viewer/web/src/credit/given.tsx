import { Tooltip } from "@mantine/core";
import type { CallCredit, CallFacts } from "../records";
import { number, signed } from "../shared/format";
import { maskLabel, maskSentence } from "../shared/masks";
import { diverging } from "../shared/scales";
import styles from "./credit.module.css";
import { ruleSentence } from "./rules";

/** Heads of the columns of `GivenCells`, behind that of what they belong to. */
export function GivenHead({ rule, narrow = false }: { rule: string; narrow?: boolean }) {
  return (
    <>
      <span />
      {!narrow && <span className={styles.figure}>earned</span>}
      <span className={styles.figure}>return</span>
      <Tooltip label={`By ${rule}. ${ruleSentence(rule)}`}>
        <span className={styles.figure}>advantage</span>
      </Tooltip>
      {!narrow && <span className={styles.figure}>trained</span>}
    </>
  );
}

/** What a call earned, and what the run's own rule made of it. */
export function GivenCells({
  facts,
  given,
  unknown,
  largest,
  narrow = false,
}: {
  facts: CallFacts | undefined;
  given: CallCredit | undefined;
  unknown: string;
  largest: number;
  narrow?: boolean;
}) {
  return (
    <>
      {!narrow && (
        <span className={styles.figure}>
          {facts && facts.earned !== 0 ? signed(facts.earned) : facts ? <span className={styles.faint}>0</span> : ""}
        </span>
      )}
      <span className={styles.figure}>{facts && given ? number(given.ret) : ""}</span>
      {facts ? <Advantage given={given} unknown={unknown} largest={largest} /> : <span />}
      {!narrow && (
        <span className={styles.figure}>{facts && given ? <Trained facts={facts} given={given} /> : ""}</span>
      )}
    </>
  );
}

/** An advantage on its colour, or why there is none. */
export function Advantage({
  given,
  unknown,
  largest,
}: {
  given: CallCredit | undefined;
  unknown: string;
  largest: number;
}) {
  if (!given) {
    return (
      <span className={`${styles.figure} ${styles.faint}`} title={unknown || "The rule says nothing about this call."}>
        {unknown ? "?" : "–"}
      </span>
    );
  }
  if (given.masked !== null) {
    return (
      <span className={`${styles.figure} ${styles.masked}`} title={maskSentence(given.masked)}>
        {maskLabel(given.masked)}
      </span>
    );
  }
  const ranged = given.token_advantages.length > 0;
  return (
    <span
      className={styles.figure}
      style={{ background: diverging(given.advantage, largest) }}
      title={ranged ? `its tokens have from ${range(given.token_advantages)}` : undefined}
    >
      {ranged && "~"}
      {fixed(given.advantage)}
    </span>
  );
}

export function fixed(value: number): string {
  return `${value > 0 ? "+" : value < 0 ? "−" : ""}${Math.abs(value).toFixed(2)}`;
}

function range(values: readonly number[]): string {
  let [low, high] = [Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY];
  for (const value of values) {
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  return `${fixed(low)} to ${fixed(high)}`;
}

export function Trained({ facts, given }: { facts: CallFacts; given: CallCredit }) {
  if (given.masked !== null) {
    return (
      <span className={styles.faint} title={maskSentence(given.masked)}>
        none of {number(facts.sampled)}
      </span>
    );
  }
  if (given.with_loss < facts.sampled) {
    return (
      <span title={maskSentence("row_limit")}>
        {number(given.with_loss)} of {number(facts.sampled)}
      </span>
    );
  }
  return <>{number(given.with_loss)} tok</>;
}

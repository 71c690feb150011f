import { Loader } from "@mantine/core";
import type { ReactNode } from "react";
import { GivenCells, GivenHead } from "../credit/given";
import { largestAdvantage } from "../credit/table";
import type { EpisodeView, GroupReport } from "../records";
import { Failed, Nothing } from "../shared/states";
import { ofRun, useAnswer } from "../source";
import type { Aside } from "./tree-list";

/** What the run's own rule gave to each call, as cells beside the tree; or what there is to say instead. */
export function useCreditAside(
  run: string,
  view: EpisodeView,
  wanted: boolean,
  narrow: boolean,
): { aside?: Aside; instead?: ReactNode } {
  const trained = view.phase === "train" && view.group !== "";
  const report = useAnswer<GroupReport>(
    ofRun(run, "credit"),
    { group: view.group },
    { enabled: wanted && trained && view.ended_at !== null },
  );
  if (!wanted) return {};
  if (!trained) {
    return {
      instead: (
        <Nothing
          title="No credit is given to this episode."
          hint={
            view.phase === "train"
              ? "It has no group to be compared with."
              : "It measures the policy; nothing is trained on it."
          }
        />
      ),
    };
  }
  if (view.ended_at === null) {
    return {
      instead: <Nothing title="Credit comes when the episode has ended." hint="Its group must have ended, too." />,
    };
  }
  if (report.error) return { instead: <Failed error={report.error} /> };
  if (!report.data) return { instead: <Loader type="dots" m="xl" /> };
  const { own, rollouts } = report.data;
  const rollout = rollouts.find((each) => each.episode === view.id);
  if (!rollout) {
    return {
      instead: (
        <Nothing
          title="No credit is given to this attempt."
          hint="It does not count: another attempt stands for this sample, or its outcome is left out by the recipe."
        />
      ),
    };
  }
  const facts = new Map(rollout.calls.map((call) => [call.id, call]));
  const largest = largestAdvantage([own]);
  return {
    aside: {
      columns: narrow ? "52px 72px" : "62px 66px 88px 100px",
      head: <GivenHead rule={own.rule} narrow={narrow} />,
      cells: (node) => (
        <GivenCells
          facts={node.type === "call" ? facts.get(node.id) : undefined}
          given={own.calls[node.id]}
          unknown={own.unknown}
          largest={largest}
          narrow={narrow}
        />
      ),
    },
  };
}

import { useAddress } from "./address";
import { CallPage } from "./call/call-page";
import { CreditPage } from "./credit/credit-page";
import { EpisodePage } from "./episode/episode-page";
import { EpisodesPage } from "./episodes/episodes-page";
import { GroupPage } from "./group/group-page";
import { ComparePage } from "./overview/compare-page";
import { RunPage } from "./overview/run-page";
import { RunsPage } from "./overview/runs-page";
import { Layout } from "./shared/layout";
import { Nothing } from "./shared/states";

/**
 * `#/` runs · `#/compare?run=KEY&run=KEY` · `#/run/KEY` one run · `#/run/KEY/episodes` · `#/run/KEY/episode/ID` ·
 * `#/run/KEY/call/ID` · `#/run/KEY/group/NAME` · `#/run/KEY/credit/GROUP`. Arguments behind `?` are each view's own.
 */
export function App() {
  const { segments } = useAddress();
  return <Layout segments={segments}>{view(segments)}</Layout>;
}

function view([first, run, what, id]: string[]) {
  if (first === undefined) return <RunsPage />;
  if (first === "compare") return <ComparePage />;
  if (first === "run" && run !== undefined) {
    if (what === undefined) return <RunPage run={run} />;
    if (what === "episodes") return <EpisodesPage run={run} />;
    if (what === "episode" && id !== undefined) return <EpisodePage key={id} run={run} id={id} />;
    if (what === "call" && id !== undefined) return <CallPage key={id} run={run} id={id} />;
    if (what === "group" && id !== undefined) return <GroupPage key={id} run={run} group={id} />;
    if (what === "credit" && id !== undefined) return <CreditPage key={id} run={run} group={id} />;
  }
  return <Nothing title="There is no such page." hint="The address may have been cut." />;
}

import { Group } from "@mantine/core";
import { useLocalStorage, useMediaQuery } from "@mantine/hooks";
import { useCallback, useEffect, useMemo, useRef, useState } from "react";
import { queryText, setQuery, useAddress } from "../address";
import type { Facets, Runs } from "../records";
import { CopyJson } from "../shared/copy-json";
import { rememberQuery } from "../shared/last-query";
import { Failed, Loading } from "../shared/states";
import { isFile, ofRun, useAnswer } from "../source";
import { columnsOf } from "./columns";
import { ColumnsMenu } from "./columns-menu";
import classes from "./episodes.module.css";
import { Menus, SearchFields, Toggles } from "./filter-bar";
import { FilterDrawer } from "./filter-drawer";
import { activeFilters, queryOf, readFilters } from "./filters";
import { recall } from "./place";
import { Results } from "./results";
import { pagesFor, rewardRanges } from "./rows";
import { StatusLine } from "./status-line";
import { useRows } from "./use-rows";

/** All episodes of a run: found, put in order and opened. */
export function EpisodesPage({ run }: { run: string }) {
  const filters = readFilters(useAddress().query);
  const asked = queryOf(filters);
  const name = queryText(asked);
  useEffect(() => rememberQuery(run, name), [run, name]);
  const active = isFile ? [] : activeFilters(filters);
  const phone = useMediaQuery("(max-width: 48em)", false, { getInitialValueInEffect: false }) ?? false;
  const search = useRef<HTMLInputElement>(null);

  const live = useLive(run);
  const [place] = useState(() => recall(run, name));
  const start = place?.index ?? 0;
  const [looked, setLooked] = useState({ name, offsets: pagesFor(start, start, Number.POSITIVE_INFINITY) });
  const look = useCallback((offsets: number[]) => setLooked({ name, offsets }), [name]);
  const rows = useRows(run, asked, looked.name === name ? looked.offsets : [0], live);

  const facets = useFacets(run, rows?.revision);
  const [hidden, hide] = useLocalStorage<string[]>({ key: "lrl.columns.hidden", defaultValue: [] });
  const seen = facets ? undefined : rows?.pages;
  // biome-ignore lint/correctness/useExhaustiveDependencies: pages are another map each time, with the same rows
  const rewards = useMemo(
    () => facets?.rewards ?? rewardRanges([...(seen?.values() ?? [])].flat()),
    [facets?.rewards, rows?.revision, seen?.size],
  );
  const columns = useMemo(() => columnsOf(run, rewards), [run, rewards]);
  const shown = useMemo(() => columns.filter(({ key }) => !hidden.includes(key)), [columns, hidden]);
  const filtering = { filters, facets, apply: setQuery };
  return (
    <div className={classes.view}>
      <Group gap={6} wrap={phone ? "nowrap" : "wrap"}>
        {!isFile && (
          <SearchFields {...filtering} search={search} leave={() => (document.activeElement as HTMLElement)?.blur()} />
        )}
        {!isFile &&
          (phone ? <FilterDrawer {...filtering} columns={columns} count={active.length} /> : <Menus {...filtering} />)}
        {!phone && (
          <Group gap={6} ml="auto">
            <ColumnsMenu columns={columns} hidden={hidden} hide={hide} />
            <CopyJson data={rows && { query: asked, matched: rows.matched, rows: [...rows.pages.values()].flat() }} />
          </Group>
        )}
      </Group>
      {!isFile && !phone && <Toggles {...filtering} />}
      {rows && (
        <StatusLine
          matched={rows.matched}
          total={rows.total}
          indexing={rows.indexing}
          active={active}
          apply={setQuery}
        />
      )}
      {!rows && <Loading />}
      {rows?.error && <Failed error={rows.error} />}
      {rows && (
        <Results
          run={run}
          live={live}
          name={name}
          filters={filters}
          active={active}
          columns={shown}
          rows={rows}
          phone={phone}
          place={place}
          look={look}
          apply={setQuery}
          search={() => search.current?.focus()}
        />
      )}
    </div>
  );
}

/** Whether a process is writing the run. */
function useLive(run: string): boolean {
  const { data } = useAnswer<Runs>("runs", {}, { every: 10_000, enabled: !isFile });
  return data?.runs.some(({ key, state }) => key === run && state === "running") ?? false;
}

/** What there is to filter by, as of the rows that are seen. */
function useFacets(run: string, revision: number | undefined): Facets | undefined {
  const { data, refetch } = useAnswer<Facets>(ofRun(run, "facets"), {}, { enabled: !isFile });
  const known = data?.revision;
  useEffect(() => {
    if (known !== undefined && revision !== undefined && known !== revision) refetch();
  }, [known, revision, refetch]);
  return data;
}

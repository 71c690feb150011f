import { ActionIcon, Anchor, AppShell, Breadcrumbs, Group, Menu, Text, useMantineColorScheme } from "@mantine/core";
import { IconBolt, IconDeviceDesktop, IconKeyboard, IconMoon, IconSun } from "@tabler/icons-react";
import { type ReactNode, useEffect, useRef, useState } from "react";
import { go, href } from "../address";
import { Boundary } from "./boundary";
import { Help } from "./help";
import { useKeys } from "./keys";
import { episodesAsLeft } from "./last-query";
import classes from "./layout.module.css";
import { visible } from "./visible";
import { Visible } from "./written";

/** Header with the way to where one is, and the page below it. */
export function Layout({ segments, children }: { segments: string[]; children: ReactNode }) {
  const [help, setHelp] = useState(false);
  const main = useRef<HTMLDivElement>(null);
  const place = segments.join("/");
  useKeys([
    { key: "?", label: "this help", run: () => setHelp(true) },
    { key: "u", label: "one level up", run: () => go(above(segments)) },
  ]);
  const title = [...[...segments].reverse().slice(0, 3).map(plain), "Lightning RL"].join(" · ");
  useEffect(() => {
    document.title = title;
  }, [title]);
  // biome-ignore lint/correctness/useExhaustiveDependencies: whenever one goes elsewhere, not when a view changes its query
  useEffect(() => {
    main.current?.focus({ preventScroll: true });
    window.scrollTo(0, 0);
  }, [place]);
  return (
    <AppShell header={{ height: 44 }} padding={{ base: "xs", sm: "md" }}>
      <AppShell.Header px={{ base: "xs", sm: "md" }}>
        <Group h="100%" justify="space-between" wrap="nowrap" gap="xs">
          <Trail segments={segments} />
          <Group gap={4} wrap="nowrap">
            <ActionIcon variant="subtle" color="gray" onClick={() => setHelp(true)} aria-label="Keys" visibleFrom="sm">
              <IconKeyboard size={18} />
            </ActionIcon>
            <Scheme />
          </Group>
        </Group>
      </AppShell.Header>
      <AppShell.Main>
        <div ref={main} tabIndex={-1} style={{ outline: "none" }}>
          <Boundary key={place}>{children}</Boundary>
        </div>
      </AppShell.Main>
      <Help opened={help} close={() => setHelp(false)} />
    </AppShell>
  );
}

/** An id as it may stand in the title of a window. */
function plain(text: string): string {
  return visible(text)
    .map((piece) => piece.text)
    .join("");
}

function above([first, run, what, id]: string[]): string {
  if (first !== "run" || run === undefined || what === undefined) return href();
  return id === undefined ? href("run", run) : episodesAsLeft(run);
}

function Trail({ segments: [first, run, what, id] }: { segments: string[] }) {
  const ofRun = first === "run" && run !== undefined;
  return (
    <Breadcrumbs
      component="nav"
      aria-label="Where you are"
      separatorMargin={6}
      classNames={{ root: classes.trail, separator: classes.separator }}
    >
      <Anchor href={href()} aria-label="All runs" className={classes.whole}>
        <Group gap={4} wrap="nowrap">
          <IconBolt size={18} aria-hidden />
          <Text span fw={600} visibleFrom="md">
            Lightning RL
          </Text>
        </Group>
      </Anchor>
      {first === "compare" && <Text size="sm">compare</Text>}
      {ofRun && (
        <Anchor size="sm" href={href("run", run)} className={`${classes.cut} ${classes.run}`} title={run}>
          <Visible text={run} />
        </Anchor>
      )}
      {ofRun && what === "episodes" && (
        <Text size="sm" className={classes.whole} aria-current="page">
          episodes
        </Text>
      )}
      {ofRun && what !== undefined && what !== "episodes" && (
        <Anchor size="sm" href={episodesAsLeft(run)} className={classes.whole}>
          episodes
        </Anchor>
      )}
      {id !== undefined && (
        <Text size="sm" className={classes.cut} title={id} aria-current="page">
          {what} <Visible text={id} />
        </Text>
      )}
    </Breadcrumbs>
  );
}

function Scheme() {
  const { colorScheme, setColorScheme } = useMantineColorScheme();
  const Icon = colorScheme === "dark" ? IconMoon : colorScheme === "light" ? IconSun : IconDeviceDesktop;
  return (
    <Menu>
      <Menu.Target>
        <ActionIcon variant="subtle" color="gray" aria-label="Light or dark">
          <Icon size={18} />
        </ActionIcon>
      </Menu.Target>
      <Menu.Dropdown>
        <Menu.Item leftSection={<IconSun size={14} />} onClick={() => setColorScheme("light")}>
          Light
        </Menu.Item>
        <Menu.Item leftSection={<IconMoon size={14} />} onClick={() => setColorScheme("dark")}>
          Dark
        </Menu.Item>
        <Menu.Item leftSection={<IconDeviceDesktop size={14} />} onClick={() => setColorScheme("auto")}>
          As the system
        </Menu.Item>
      </Menu.Dropdown>
    </Menu>
  );
}

import { describe, expect, it } from "vitest";
import type { SampleView } from "../records";
import { based, choose, type Mode, stepped } from "./choice";

const samples = [1, 0.5, 0, null].map((total, at) => ({ episode: `e${at}`, total }) as SampleView);
const ids = (mode: Mode, query = "", of = samples) =>
  choose(of, new URLSearchParams(query), mode)?.shown.map(({ episode }) => episode);

describe("choose", () => {
  it("shows the best beside the worst of those that have a total", () => {
    expect(ids("pair")).toEqual(["e0", "e2"]);
    expect(ids("pair", "", samples.slice(0, 1))).toEqual(["e0"]);
    expect(ids("pair", "", [])).toBeUndefined();
  });

  it("follows the address, and not to episodes that are not there", () => {
    expect(ids("pair", "base=e1&with=e3")).toEqual(["e1", "e3"]);
    expect(ids("pair", "base=gone&with=e1")).toEqual(["e0", "e1"]);
    expect(ids("pair", "with=e0")).toEqual(["e0", "e2"]);
    expect(ids("all", "base=e2")).toEqual(["e2", "e0", "e1", "e3"]);
    expect(ids("one", "with=e1")).toEqual(["e1"]);
  });
});

it("steps through the others, and stays at the ends", () => {
  const step = (mode: Mode, query: string, by: number) => {
    const choice = choose(samples, new URLSearchParams(query), mode);
    return choice && stepped(samples, choice, mode, by).episode;
  };
  expect(step("pair", "with=e1", 1)).toBe("e2");
  expect(step("pair", "with=e1", -1)).toBe("e1");
  expect(step("pair", "base=e2&with=e1", 1)).toBe("e3");
  expect(step("one", "with=e1", -1)).toBe("e0");
  expect(step("all", "with=e3", 1)).toBe("e3");
});

it("exchanges the two where the compared one is taken for the base", () => {
  const choice = choose(samples, new URLSearchParams(), "pair");
  expect(choice && based(choice, choice.selected)).toEqual({ base: "e2", with: "e0" });
});

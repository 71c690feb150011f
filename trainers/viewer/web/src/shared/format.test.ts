import { expect, test } from "vitest";
import { duration } from "./format";

test("durations are rounded before they are taken apart", () => {
  expect([0.0254, 9.94, 9.97, 59.7, 119.6, 125, 3599.8, 7170].map(duration)).toEqual([
    "25 ms",
    "9.9 s",
    "10 s",
    "1 min",
    "2 min",
    "2 min 5 s",
    "1 h",
    "2 h",
  ]);
});

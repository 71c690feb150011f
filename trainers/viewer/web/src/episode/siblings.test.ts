import { expect, test } from "vitest";
import { spread } from "./siblings";

test("colours are for the distance from the group's mean", () => {
  expect(spread([1, 0, null, 0.5])).toEqual({ mean: 0.5, most: 0.5 });
  expect(spread([null])).toEqual({ mean: 0, most: 0 });
});

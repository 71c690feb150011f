import { expect, test } from "vitest";
import { along, type Box, beside, bySurprise, otherLine } from "./moves";
import { placeIn } from "./pin";

test("the least likely token is the first, and order ends at both ends", () => {
  const order = bySurprise([-0.5, -3, null, -3, -1], 10);
  expect(order).toEqual([11, 13, 14, 10]);
  expect(along(order, null, 1)).toBe(11);
  expect(along(order, 11, 1)).toBe(13);
  expect(along(order, 11, -1)).toBe(11);
  expect(along(order, 10, 1)).toBe(10);
  expect(along(order, 3, 1)).toBe(11);
  expect(along([], null, 1)).toBeNull();
});

test("beside stays within what is shown", () => {
  expect(beside(null, 1, 0, 9, 4)).toBe(4);
  expect(beside(8, 1, 0, 9, 4)).toBe(8);
  expect(beside(3, -1, 3, 9, 4)).toBe(3);
});

test("up and down go to the nearest token of the line on the screen", () => {
  const boxes: Box[] = [0, 20, 40].flatMap((top) =>
    [0, 10, 50].map((left, at) => ({ left, right: [10, 50, 90][at] ?? 0, top, bottom: top + 18 })),
  );
  const box = (place: number) => boxes[place] ?? null;
  expect(otherLine(box, 1, 1)).toBe(4);
  expect(otherLine(box, 8, -1)).toBe(5);
  expect(otherLine(box, 1, -1)).toBeNull();
  expect(otherLine(box, 99, 1)).toBeNull();
});

test("a place out of an address is one that there is", () => {
  expect(placeIn("7", 10)).toBe(7);
  expect(placeIn("70", 10)).toBe(9);
  for (const nonsense of ["-1", "1.5", "x", "", null]) expect(placeIn(nonsense, 10)).toBeNull();
  expect(placeIn("0", 0)).toBeNull();
});

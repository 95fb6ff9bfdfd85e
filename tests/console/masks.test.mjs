// Unit tests of the console's pure modules: node --test tests/console
import assert from "node:assert/strict";
import { test } from "node:test";
import { inflateSync } from "node:zlib";

const js = new URL("../../services/vessa/vessa_server/console/static/js/", import.meta.url);
const masks = await import(new URL("masks.js", js));
const png = await import(new URL("png.js", js));

const blank = (width, height) => ({ width, height, values: new Uint8Array(width * height) });
const count = (map, id) => map.values.filter((v) => v === id).length;

test("a disk of radius r covers about pi r squared and stays inside the map", () => {
  const map = blank(40, 40);
  masks.paintDisk(map, [20, 20], 8, 1);
  assert.ok(Math.abs(count(map, 1) - Math.PI * 64) < 12);
  masks.paintDisk(map, [-3, -3], 8, 2);
  assert.equal(map.values.length, 1600);
});

test("a line has no gaps", () => {
  const map = blank(60, 10);
  masks.paintLine(map, [2, 5], [57, 5], 1.5, 1);
  for (let x = 3; x < 57; x++) assert.equal(map.values[5 * 60 + x], 1);
});

test("the eraser takes one class alone when told so", () => {
  const map = blank(10, 10);
  map.values.fill(1, 0, 50);
  map.values.fill(2, 50);
  masks.paintDisk(map, [5, 5], 4, 0, 1);
  assert.equal(count(map, 2), 50);
  assert.ok(count(map, 1) < 50);
});

test("a polygon fills by pixel centers and the even-odd rule", () => {
  const map = blank(10, 10);
  masks.fillPolygon(map, [[2, 2], [6, 2], [6, 7], [2, 7]], 3);
  assert.equal(count(map, 3), 20);
  masks.fillPolygon(map, [[1, 1], [2, 2]], 4);
  assert.equal(count(map, 4), 0);
});

test("a flood fill stops at other labels and at the border", () => {
  const map = blank(6, 6);
  for (let y = 0; y < 6; y++) map.values[y * 6 + 3] = 1;
  masks.floodFill(map, [0.5, 0.5], 2);
  assert.equal(count(map, 2), 18);
  assert.equal(count(map, 1), 6);
});

test("merging one class leaves the others where the answer is silent", () => {
  const map = { width: 4, height: 1, values: Uint8Array.of(1, 1, 2, 2) };
  masks.mergeClass(map, { width: 4, height: 1, values: Uint8Array.of(0, 1, 1, 0) }, 1);
  assert.deepEqual([...map.values], [0, 1, 1, 2]);
});

test("undo and redo return the very states, and a new change ends redo", () => {
  const stack = new masks.UndoStack(2);
  let now = Uint8Array.of(0);
  for (const next of [1, 2, 3]) {
    stack.remember(now);
    now = Uint8Array.of(next);
  }
  assert.deepEqual([...stack.undo(now)], [2]);
  assert.deepEqual([...stack.redo(Uint8Array.of(2))], [3]);
  assert.deepEqual([...stack.undo(now)], [2]);
  assert.deepEqual([...stack.undo(Uint8Array.of(2))], [1]);
  assert.equal(stack.undo(Uint8Array.of(1)), null); // the oldest of three is gone
  stack.remember(Uint8Array.of(1));
  assert.equal(stack.redo(Uint8Array.of(5)), null);
});

test("points of a stroke are spread from end to end", () => {
  const stroke = Array.from({ length: 101 }, (_, i) => [i, 0]);
  const picked = masks.samplePoints(stroke, 5);
  assert.deepEqual(picked.map((p) => p[0]), [0, 25, 50, 75, 100]);
  assert.equal(masks.samplePoints(stroke.slice(0, 3), 5).length, 3);
});

test("a gray PNG holds the values row by row", async () => {
  const map = { width: 3, height: 2, values: Uint8Array.of(0, 1, 2, 3, 4, 255) };
  const bytes = new Uint8Array(await (await png.grayPng(map)).arrayBuffer());
  assert.deepEqual([...bytes.slice(0, 8)], [137, 80, 78, 71, 13, 10, 26, 10]);
  const at = Buffer.from(bytes).indexOf("IDAT");
  const length = Buffer.from(bytes).readUInt32BE(at - 4);
  assert.deepEqual([...inflateSync(bytes.slice(at + 4, at + 4 + length))], [0, 0, 1, 2, 0, 3, 4, 255]);
  assert.equal(png.crc32(new TextEncoder().encode("IEND")), 0xae426082);
});

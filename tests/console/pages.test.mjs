// Unit tests of the modules that order, sort and read: node --test tests/console
import assert from "node:assert/strict";
import { test } from "node:test";

const js = new URL("../../services/vessa/vessa_server/console/static/js/", import.meta.url);
const { TaskQueue } = await import(new URL("tasks.js", js));
const { groupOf, readDataFolder, seriesUid, sortFiles } = await import(new URL("files.js", js));
const { nextOpen, queueOf } = await import(new URL("queue.js", js));
const { flatten, scoreTable } = await import(new URL("scores.js", js));
const { classLines, readClasses } = await import(new URL("class_names.js", js));
const { send, waitBeforeRetry } = await import(new URL("api.js", js));
const { disagreement, promptBody } = await import(new URL("items.js", js));

const item = (id, decision, doubt) => ({ id, name: id, decision, doubt });
const file = (path, content = "x") => Object.assign(new File([content], path.split("/").at(-1)), { path });

test("the queue has open images first, by doubt or by suggestion", () => {
  const items = [item("a", "accepted", 0.9), item("b", "open", 0.1), item("c", "open", 0.5), item("d", "open", null)];
  assert.deepEqual(queueOf(items, "doubt").map((i) => i.id), ["d", "c", "b", "a"]);
  const places = new Map([["b", 0], ["d", 1]]);
  assert.deepEqual(queueOf(items, "suggestion", places).map((i) => i.id), ["b", "d", "c", "a"]);
  assert.deepEqual(queueOf(items, "name").map((i) => i.id), ["b", "c", "d", "a"]);
});

test("the next open image follows the decided one, then the queue begins again", () => {
  const queue = [item("a", "open"), item("b", "open"), item("c", "accepted"), item("d", "open")];
  assert.equal(nextOpen(queue, "b").id, "d");
  assert.equal(nextOpen(queue, "d").id, "a");
  assert.equal(nextOpen([item("a", "open")], "a"), undefined);
});

test("tasks run a few at once, and failures are named", async () => {
  let most = 0;
  let active = 0;
  const queue = new TaskQueue(2, () => {});
  const task = (name) => ({
    name,
    run: async () => {
      most = Math.max(most, ++active);
      await new Promise((done) => setTimeout(done, 2));
      active--;
      if (name === "bad") throw new Error("broken");
    },
  });
  await queue.add(["one", "bad", "two", "three"].map(task));
  assert.equal(most, 2);
  assert.deepEqual(queue.progress, { done: 4, total: 4, failed: ["bad: broken"], running: false, cancelled: 0 });
});

test("cancel drops what waits, aborts what runs, and the queue can be used again", async () => {
  const queue = new TaskQueue(1, () => {});
  const endless = (signal) => new Promise((_, fail) => signal.addEventListener("abort", () => fail(new Error("aborted"))));
  const running = queue.add([{ name: "a", run: endless }, { name: "b", run: endless }]);
  queue.cancel();
  await running;
  assert.equal(queue.progress.cancelled, 2);
  assert.deepEqual(queue.progress.failed, []);
  await queue.add([{ name: "c", run: async () => {} }]);
  assert.equal(queue.progress.done, 1);
});

test("the patient is read from the name as data folders do", () => {
  assert.equal(groupOf("heart003_02.png"), "heart003");
  assert.equal(groupOf("patient1_frame01_3.png"), "patient1");
  assert.equal(groupOf("scan.nii.gz"), "scan");
});

test("files without a suffix are DICOM when they say so, and series are kept apart", async () => {
  const dicom = (uid) => {
    const bytes = new Uint8Array(400);
    bytes.set(new TextEncoder().encode("DICM"), 128);
    bytes.set([0x20, 0, 0x0e, 0, 0x55, 0x49, uid.length, 0], 200);
    bytes.set(new TextEncoder().encode(uid), 208);
    return bytes;
  };
  assert.equal(seriesUid(dicom("1.2.3")), "1.2.3");
  const files = [file("s/IM1", dicom("1.2.3")), file("s/IM2", dicom("1.2.3")), file("s/IM3", dicom("1.2.4")), file("s/a.png"), file("s/v.nii.gz"), file("s/README")];
  const sorted = await sortFiles(files);
  assert.deepEqual(sorted.volumes.map((v) => [v.name, v.files.length]), [["v.nii.gz", 1], ["s", 2], ["IM3", 1]]);
  assert.deepEqual([sorted.pictures.length, sorted.others.length], [1, 1]);
});

test("a data folder has annotated images, plain ones and its classes", () => {
  const folder = readDataFolder([file("my data/meta.json"), file("my data/images/a_1.png"), file("my data/images/a_2.jpg"), file("my data/masks/a_1.png")]);
  assert.equal(folder.name, "my-data");
  assert.deepEqual(folder.annotated.map(({ image }) => image.name), ["a_1.png"]);
  assert.deepEqual(folder.plain.map((f) => f.name), ["a_2.jpg"]);
  assert.equal(folder.meta.name, "meta.json");
});

test("nested metrics get one name, and scores are listed with the worst class first", () => {
  assert.deepEqual(flatten({ step: 4, val: { mean: { dice: 0.5 } }, notes: ["x"], off: null }), { step: 4, "val mean dice": 0.5 });
  assert.equal(scoreTable(null), null);
  const scores = (dice) => ({ dice, iou: 0.5, hd95: null });
  const { rows } = scoreTable({ test: { mean: scores(0.8), by_class: { good: scores(0.9), bad: scores(0.7) } } });
  assert.deepEqual(rows.map((r) => r[1]), ["mean", "bad", "good"]);
  assert.equal(rows[0][4], "none");
});

test("classes are typed one a line, and wrong lines are named", () => {
  assert.deepEqual(readClasses("1: ventricle\n 2:wall "), { 1: "ventricle", 2: "wall" });
  assert.equal(classLines({ 1: "ventricle", 2: "wall" }), "1: ventricle\n2: wall");
  assert.throws(() => readClasses("0: background"), /from 1 to 255/);
  assert.throws(() => readClasses(" "), /at least one class/);
});

test("a correction asks for one class, its box clipped to the image", () => {
  const size = { width: 50, height: 40 };
  const body = promptBody("wall", [{ at: [3, 4], inside: false }], [[60, 10], [20, -5]], size);
  assert.deepEqual(body, { classes: ["wall"], points: { wall: [[3, 4]] }, point_labels: { wall: [0] }, boxes: { wall: [20, 0, 50, 10] } });
  assert.deepEqual(promptBody("wall", [], null, size), { classes: ["wall"] });
});

test("disagreement is low confidence where labels differ", () => {
  assert.deepEqual([...disagreement(new Uint8Array([1, 2]), new Uint8Array([1, 0]))], [255, 60]);
});

test("a request that a limit refuses is sent again, any other error goes to the person", async () => {
  assert.equal(waitBeforeRetry(429, "limit_reached", "2"), 2);
  assert.equal(waitBeforeRetry(503, "not_ready", "5"), 5);
  assert.equal(waitBeforeRetry(503, "store_unavailable", "5"), 0);
  assert.equal(waitBeforeRetry(429, "limit_reached", null), 0);
  const answers = [
    new Response('{"error": {"code": "limit_reached", "message": "wait"}}', { status: 429, headers: { "Retry-After": "0.01" } }),
    new Response("done"),
    new Response('{"error": {"code": "unknown_class", "message": "no such class"}}', { status: 422 }),
  ];
  const { fetch } = globalThis;
  globalThis.fetch = async () => answers.shift();
  try {
    assert.equal(await (await send("POST", "/x")).text(), "done");
    await assert.rejects(send("POST", "/x"), /no such class/);
  } finally {
    globalThis.fetch = fetch;
  }
});

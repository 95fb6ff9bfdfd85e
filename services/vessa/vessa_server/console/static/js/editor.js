// @ts-check
/** The editor of one worklist item: canvas, tools, classes, undo. The pages Annotate and Review both use it. */

import { html, useEffect, useRef, useState } from "../vendor/preact-htm.js";
import { grayPixels, send } from "./api.js";
import { ImageCanvas } from "./canvas.js";
import { ClassList } from "./classes.js";
import { fetchLayer, itemPath, promptBody } from "./items.js";
import { UndoStack, areas, fillPolygon, floodFill, mergeClass, paintLine, samplePoints } from "./masks.js";
import { ViewControls } from "./view_controls.js";

/** @typedef {import("./masks.js").Point} Point */

const MOST_POINTS = 60; // of one class in a request; the service takes 64, the oldest are dropped
const TOOLS = [
  ["point", "Point", "P", "Click: add to the class. Right click or Shift: take away."],
  ["box", "Box", "X", "Drag a box around the structure."],
  ["scribble", "Scribble", "S", "Draw along the structure; right button or Shift: along what is not."],
  ["lasso", "Lasso", "L", "Outline the structure; it is filled with the class."],
  ["polygon", "Polygon", "G", "Click corners; double click closes it and fills it."],
  ["brush", "Brush", "B", "Paint the class; the slider sets the size."],
  ["eraser", "Eraser", "E", "Erase the class; with Shift, all classes."],
  ["fill", "Fill", "F", "Fill a closed region with the class."],
];

/** @type {Promise<unknown>} the labels that are being stored; a decision waits for them */
let storing = Promise.resolve();

/** @returns {Promise<unknown>} resolves when everything that was drawn is stored */
export function stored() {
  return storing;
}

/**
 * @param {{list: string, item: any, classes: Record<string, string>, onChange: (item: any) => void,
 *   layer: import("./items.js").Layer, slices?: any[], onSlice?: (item: any) => void}} props
 *   slices: the items of the same volume, which the wheel goes through
 */
export function Editor({ list, item, classes, onChange, layer, slices = [], onSlice }) {
  const canvasRef = useRef(null);
  const state = useRef(/** @type {any} */ ({ undo: new UndoStack(), points: {}, box: {}, down: null, polygon: [] })).current;
  const ids = Object.keys(classes).map(Number);
  const [tool, setTool] = useState("point");
  const [active, setActive] = useState(ids[0] ?? 1);
  const [away, setAway] = useState(false);
  const [radius, setRadius] = useState(6);
  const [hidden, setHidden] = useState(/** @type {Set<number>} */ (new Set()));
  const [message, setMessage] = useState("");
  const [busy, setBusy] = useState(false);
  const [view, setView] = useState({ opacity: 0.4, window: 1, level: 0.5 });
  const [, redraw] = useState(0);
  const base = itemPath(list, item.id);
  const place = slices.findIndex((s) => s.id === item.id);

  useEffect(() => {
    const drawing = new ImageCanvas(/** @type {any} */ (canvasRef.current));
    state.canvas = drawing;
    return () => drawing.close();
  }, []);

  useEffect(() => {
    let gone = false;
    state.undo = new UndoStack();
    state.points = {};
    state.box = {};
    state.polygon = [];
    state.labels = null; // nothing can be drawn before the labels of this image are here
    (async () => {
      setMessage("");
      try {
        const [image, labels] = await Promise.all([
          send("GET", `${base}/image.png`).then((r) => r.blob()).then((b) => createImageBitmap(b)),
          send("GET", `${base}/labels.png`).then((r) => r.blob()).then(grayPixels),
        ]);
        if (gone) return;
        state.labels = labels;
        state.canvas.labels = labels;
        state.canvas.doubt = null;
        state.canvas.drawn = { points: [], box: null, stroke: [], closed: false };
        state.canvas.show(image, item.volume !== "" && state.volume === item.volume);
        state.volume = item.volume;
        redraw((n) => n + 1);
      } catch (error) {
        if (!gone) setMessage(String(/** @type {Error} */ (error).message));
      }
    })();
    return () => {
      gone = true;
    };
  }, [item.id, item.labels]);

  useEffect(() => {
    const drawing = state.canvas;
    drawing.opacity = view.opacity;
    drawing.window = view.window;
    drawing.level = view.level;
    drawing.hidden = hidden;
    drawing.draw();
  }, [view, hidden]);

  useEffect(() => {
    let gone = false;
    if (!state.labels) return undefined;
    fetchLayer(list, item.id, layer, state.labels).then(
      (values) => {
        if (gone) return;
        state.canvas.doubt = values;
        state.canvas.draw();
      },
      (error) => {
        if (!gone) setMessage(error.message);
      },
    );
    return () => {
      gone = true;
    };
  }, [layer, item.id, state.labels]);

  useEffect(() => {
    state.canvas.drawn.points = state.points[active] ?? [];
    state.canvas.draw();
  }, [active]);

  const onKey = useRef((/** @type {KeyboardEvent} */ _event) => {});
  onKey.current = (/** @type {KeyboardEvent} */ event) => {
      if (/** @type {HTMLElement} */ (event.target).matches("input, select, textarea")) return;
      if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z") {
        event.preventDefault();
        step(event.shiftKey ? "redo" : "undo");
        return;
      }
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const number = Number(event.key);
      if (number && ids[number - 1]) setActive(ids[number - 1]);
      const chosen = event.shiftKey ? TOOLS.find((t) => t[2] === event.key) : null;
      if (chosen) setTool(chosen[0]);
  };
  useEffect(() => {
    const key = (/** @type {KeyboardEvent} */ event) => onKey.current(event);
    addEventListener("keydown", key);
    return () => removeEventListener("keydown", key);
  }, []);

  /** Store the labels that were drawn. @returns {Promise<void>} */
  function store() {
    const done = write();
    storing = Promise.all([storing, done]);
    return done;
  }

  async function write() {
    const { values } = state.labels;
    try {
      setBusy(true);
      const answer = await send("PUT", `${base}/labels`, { body: values.slice(), accept: "application/json" });
      const changed = await answer.json();
      setMessage("");
      onChange({ ...changed, labels: item.labels, newest: changed.labels });
    } catch (error) {
      setMessage(String(/** @type {Error} */ (error).message));
    } finally {
      setBusy(false);
    }
  }

  /** @param {"undo" | "redo"} way */
  async function step(way) {
    if (!state.labels) return;
    const values = state.undo[way](state.labels.values);
    if (!values) {
      setMessage(way === "undo" ? "Nothing to undo." : "Nothing to redo.");
      return;
    }
    state.labels.values.set(values);
    state.points = {};
    state.canvas.drawn = { points: [], box: null, stroke: [], closed: false };
    state.canvas.draw();
    redraw((n) => n + 1);
    await store();
  }

  /**
   * Ask the annotator to correct the active class by prompts.
   * @param {number} started time of the event that asked, ms @param {[Point, Point] | null} box
   */
  async function correct(started, box) {
    const { labels } = state;
    const json = promptBody(classes[active], state.points[active] ?? [], box, item);
    setBusy(true);
    try {
      const answer = await send("POST", `${base}/segment?keep=false`, { json });
      const mask = await grayPixels(await answer.blob());
      if (state.labels !== labels) return; // another image is shown meanwhile
      state.undo.remember(labels.values);
      mergeClass(labels, mask, active);
      state.canvas.draw();
      await new Promise((done) => requestAnimationFrame(done));
      performance.measure("vessa-click", { start: started, end: performance.now() });
      setMessage("");
      redraw((n) => n + 1);
    } catch (error) {
      setMessage(String(/** @type {Error} */ (error).message));
      return;
    } finally {
      setBusy(false);
    }
    await store();
  }

  /** Change the labels on the canvas and store them. @param {() => void} change */
  async function edit(change) {
    state.undo.remember(state.labels.values);
    change();
    state.canvas.draw();
    redraw((n) => n + 1);
    await store();
  }

  /** @param {PointerEvent} event */
  function down(event) {
    if (!state.labels || busy) return;
    /** @type {HTMLElement} */ (event.target).setPointerCapture(event.pointerId);
    const at = state.canvas.toImage(event);
    const outside = away || event.button === 2 || event.shiftKey;
    if (event.button === 1 || event.ctrlKey) {
      state.down = { kind: "pan", x: event.clientX, y: event.clientY };
      return;
    }
    if (!state.canvas.inside(at)) return;
    state.down = { kind: tool, from: at, last: at, away: outside };
    if (tool === "brush" || tool === "eraser") {
      state.undo.remember(state.labels.values);
      stroke(at);
    }
    if (tool === "scribble" || tool === "lasso") state.canvas.drawn.stroke = [at];
  }

  /** @param {Point} at */
  function stroke(at) {
    const { last, kind } = state.down;
    const id = kind === "eraser" ? 0 : active;
    paintLine(state.labels, last, at, radius, id, kind === "eraser" && !state.down.away ? active : 0);
    state.down.last = at;
    state.canvas.draw();
  }

  /** @param {PointerEvent} event */
  function move(event) {
    const at = state.canvas.toImage(event);
    const drawing = state.canvas;
    drawing.cursor = tool === "brush" || tool === "eraser" ? { at, radius } : null;
    const { down: held } = state;
    if (!held) {
      if (drawing.cursor) drawing.draw();
      return;
    }
    if (held.kind === "pan") {
      drawing.pan(event.clientX - held.x, event.clientY - held.y);
      held.x = event.clientX;
      held.y = event.clientY;
    } else if (held.kind === "brush" || held.kind === "eraser") stroke(at);
    else if (held.kind === "box") drawing.drawn.box = [held.from, at];
    else if (held.kind === "scribble" || held.kind === "lasso") drawing.drawn.stroke.push(at);
    drawing.draw();
  }

  /** @param {PointerEvent} event */
  async function up(event) {
    const held = state.down;
    state.down = null;
    if (!held || held.kind === "pan") return;
    const at = state.canvas.toImage(event);
    const drawn = state.canvas.drawn;
    const inside = !held.away;
    if (held.kind === "point") {
      state.points[active] = [...(state.points[active] ?? []), { at: held.from, inside }].slice(-MOST_POINTS);
      drawn.points = state.points[active];
      state.canvas.draw();
      await correct(event.timeStamp, state.box[active] ?? null);
    } else if (held.kind === "box") {
      drawn.box = null;
      if (Math.hypot(at[0] - held.from[0], at[1] - held.from[1]) < 2) return;
      state.points[active] = [];
      drawn.points = [];
      state.box[active] = [held.from, at];
      await correct(event.timeStamp, [held.from, at]);
    } else if (held.kind === "scribble") {
      const points = (state.points[active] ??= []);
      for (const place of samplePoints(drawn.stroke.filter((/** @type {Point} */ p) => state.canvas.inside(p)), 12)) {
        points.push({ at: place, inside });
      }
      state.points[active] = points.slice(-MOST_POINTS);
      drawn.stroke = [];
      drawn.points = state.points[active];
      await correct(event.timeStamp, state.box[active] ?? null);
    } else if (held.kind === "lasso") {
      const outline = drawn.stroke;
      drawn.stroke = [];
      await edit(() => fillPolygon(state.labels, outline, held.away ? 0 : active));
    } else if (held.kind === "polygon") {
      state.polygon.push(held.from);
      drawn.stroke = state.polygon;
      state.canvas.draw();
    } else if (held.kind === "fill") {
      await edit(() => floodFill(state.labels, held.from, held.away ? 0 : active));
    } else if (held.kind === "brush" || held.kind === "eraser") {
      redraw((n) => n + 1);
      await store();
    }
  }

  /** Close the polygon that is being drawn. */
  async function closePolygon() {
    const corners = state.polygon.slice();
    state.polygon = [];
    state.canvas.drawn.stroke = [];
    if (tool === "polygon" && corners.length >= 3) await edit(() => fillPolygon(state.labels, corners, active));
  }

  const counts = state.labels ? areas(state.labels) : new Map();
  return html`<div class="editor">
    <div class="tools" role="toolbar" aria-label="Tools">
      ${TOOLS.map(([name, label, key, hint]) => html`<button
        type="button" aria-pressed=${tool === name} title="${hint} (Shift+${key})" onClick=${() => setTool(name)}
      >${label}</button>`)}
      <button type="button" aria-pressed=${away} title="Take away instead of add, as the right button does" onClick=${() => setAway(!away)}>Take away</button>
      <label class="slider">Size
        <input type="range" min="1" max="40" value=${radius} onInput=${(/** @type {any} */ e) => setRadius(Number(e.target.value))} />
      </label>
      <button type="button" onClick=${() => step("undo")}>Undo</button>
      <button type="button" onClick=${() => step("redo")}>Redo</button>
    </div>
    <canvas
      ref=${canvasRef} class="stage" tabindex="0" role="img"
      aria-label="Image ${item.name} with its labels"
      onPointerDown=${down} onPointerMove=${move} onPointerUp=${up}
      onDblClick=${closePolygon}
      onContextMenu=${(/** @type {Event} */ e) => e.preventDefault()}
      onWheel=${(/** @type {WheelEvent} */ e) => {
        e.preventDefault();
        const next = slices[place + (e.deltaY < 0 ? -1 : 1)];
        if (place < 0 || e.ctrlKey) state.canvas.zoom(e.deltaY < 0 ? 1.15 : 1 / 1.15, e);
        else if (next) onSlice?.(next);
      }}
    ></canvas>
    <div class="under">
      ${place >= 0 && html`<label class="slider">Slice
        <input type="range" min="0" max=${slices.length - 1} value=${place} onInput=${(/** @type {any} */ e) => onSlice?.(slices[Number(e.target.value)])} />
        ${place + 1} of ${slices.length}</label>`}
      <p class="status" role="status" aria-live="polite">${busy ? "Working." : message}</p>
      <label class="slider">Labels
        <input type="range" min="0" max="1" step="0.05" value=${view.opacity} onInput=${(/** @type {any} */ e) => setView({ ...view, opacity: Number(e.target.value) })} /></label>
      <${ViewControls} view=${view} onView=${setView} canvas=${() => state.canvas} />
    </div>
    <${ClassList} classes=${classes} active=${active} counts=${counts} hidden=${hidden} onActive=${setActive} onHidden=${setHidden} />
  </div>`;
}

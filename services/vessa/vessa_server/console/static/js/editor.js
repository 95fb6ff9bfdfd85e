// @ts-check
/** The editor of one worklist item: canvas, tools, classes, undo. The pages Annotate and Review both use it. */

import { html, useEffect, useRef, useState } from "../vendor/preact-htm.js";
import { get, grayPixels, post, send } from "./api.js";
import { ImageCanvas } from "./canvas.js";
import { UndoStack, areas, classColor, fillPolygon, floodFill, mergeClass, paintLine, samplePoints } from "./masks.js";

/** @typedef {import("./masks.js").Point} Point */

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

/**
 * @param {{list: string, item: any, classes: Record<string, string>, onChange: (item: any) => void,
 *   tools?: boolean, showDoubt?: boolean}} props
 */
export function Editor({ list, item, classes, onChange, tools = true, showDoubt = false }) {
  const canvasRef = useRef(null);
  const state = useRef(/** @type {any} */ ({ undo: new UndoStack(), points: {}, down: null, polygon: [] })).current;
  const ids = Object.keys(classes).map(Number);
  const [tool, setTool] = useState(tools ? "point" : "pan");
  const [active, setActive] = useState(ids[0] ?? 1);
  const [radius, setRadius] = useState(6);
  const [hidden, setHidden] = useState(/** @type {Set<number>} */ (new Set()));
  const [message, setMessage] = useState("");
  const [busy, setBusy] = useState(false);
  const [view, setView] = useState({ opacity: 0.4, window: 1, level: 0.5 });
  const [, redraw] = useState(0);
  const base = `/worklists/${encodeURIComponent(list)}/items/${item.id}`;

  useEffect(() => {
    const drawing = new ImageCanvas(/** @type {any} */ (canvasRef.current));
    state.canvas = drawing;
    return () => drawing.close();
  }, []);

  useEffect(() => {
    let gone = false;
    state.undo = new UndoStack();
    state.points = {};
    state.polygon = [];
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
        state.canvas.show(image);
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
    if (!showDoubt) {
      state.canvas.doubt = null;
      state.canvas.draw();
      return undefined;
    }
    (async () => {
      try {
        const answer = await send("POST", `${base}/segment?keep=false&layer=confidence`, { json: {} });
        const confidence = await grayPixels(await answer.blob());
        if (gone) return;
        state.canvas.doubt = confidence.values;
        state.canvas.draw();
      } catch (error) {
        if (!gone) setMessage(String(/** @type {Error} */ (error).message));
      }
    })();
    return () => {
      gone = true;
    };
  }, [showDoubt, item.id]);

  const onKey = useRef((/** @type {KeyboardEvent} */ _event) => {});
  onKey.current = (/** @type {KeyboardEvent} */ event) => {
      if (/** @type {HTMLElement} */ (event.target).matches("input, select, textarea")) return;
      if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z") {
        event.preventDefault();
        step(event.shiftKey ? "redo" : "undo");
        return;
      }
      if (event.ctrlKey || event.metaKey || event.altKey || !tools) return;
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

  /** Store the labels that were drawn. */
  async function store() {
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
   * @param {{box?: [Point, Point] | null}} extra
   */
  async function correct({ box = null }) {
    const name = classes[active];
    const points = state.points[active] ?? [];
    /** @type {any} */
    const json = { classes: [name] };
    if (points.length) {
      json.points = { [name]: points.map((/** @type {any} */ p) => p.at) };
      json.point_labels = { [name]: points.map((/** @type {any} */ p) => (p.inside ? 1 : 0)) };
    }
    if (box) {
      const [a, b] = box;
      const clip = (/** @type {number} */ v, /** @type {number} */ most) => Math.min(most, Math.max(0, v));
      json.boxes = {
        [name]: [
          clip(Math.min(a[0], b[0]), item.width), clip(Math.min(a[1], b[1]), item.height),
          clip(Math.max(a[0], b[0]), item.width), clip(Math.max(a[1], b[1]), item.height),
        ],
      };
    }
    const started = performance.now();
    setBusy(true);
    try {
      const answer = await send("POST", `${base}/segment?keep=false`, { json });
      const mask = await grayPixels(await answer.blob());
      state.undo.remember(state.labels.values);
      mergeClass(state.labels, mask, active);
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
    const away = event.button === 2 || event.shiftKey;
    if (event.button === 1 || tool === "pan" || event.ctrlKey) {
      state.down = { kind: "pan", x: event.clientX, y: event.clientY };
      return;
    }
    if (!state.canvas.inside(at)) return;
    state.down = { kind: tool, from: at, last: at, away };
    if (tool === "brush" || tool === "eraser") {
      state.undo.remember(state.labels.values);
      stroke(at);
    }
    if (tool === "scribble" || tool === "lasso") state.canvas.drawn.stroke = [at];
  }

  /** @param {Point} at */
  function stroke(at) {
    const { away, last, kind } = state.down;
    const id = kind === "eraser" ? 0 : active;
    paintLine(state.labels, last, at, radius, id, kind === "eraser" && !away ? active : 0);
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
      const points = (state.points[active] ??= []);
      points.push({ at: held.from, inside });
      drawn.points = points;
      state.canvas.draw();
      await correct({ box: state.box?.[active] ?? null });
    } else if (held.kind === "box") {
      drawn.box = null;
      if (Math.hypot(at[0] - held.from[0], at[1] - held.from[1]) < 2) return;
      state.points[active] = [];
      drawn.points = [];
      state.box = { ...state.box, [active]: [held.from, at] };
      await correct({ box: [held.from, at] });
    } else if (held.kind === "scribble") {
      const points = (state.points[active] ??= []);
      for (const place of samplePoints(drawn.stroke.filter((/** @type {Point} */ p) => state.canvas.inside(p)), 12)) {
        points.push({ at: place, inside });
      }
      state.points[active] = points.slice(-60);
      drawn.stroke = [];
      drawn.points = state.points[active];
      await correct({ box: state.box?.[active] ?? null });
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
    ${tools && html`<div class="tools" role="toolbar" aria-label="Tools">
      ${TOOLS.map(([name, label, key, hint]) => html`<button
        type="button" aria-pressed=${tool === name} title="${hint} (Shift+${key})" onClick=${() => setTool(name)}
      >${label}</button>`)}
      <label class="slider">Size
        <input type="range" min="1" max="40" value=${radius} onInput=${(/** @type {any} */ e) => setRadius(Number(e.target.value))} />
      </label>
      <button type="button" onClick=${() => step("undo")}>Undo</button>
      <button type="button" onClick=${() => step("redo")}>Redo</button>
    </div>`}
    <canvas
      ref=${canvasRef} class="stage" tabindex="0" role="img"
      aria-label="Image ${item.name} with its labels"
      onPointerDown=${down} onPointerMove=${move} onPointerUp=${up}
      onDblClick=${closePolygon}
      onContextMenu=${(/** @type {Event} */ e) => e.preventDefault()}
      onWheel=${(/** @type {WheelEvent} */ e) => {
        e.preventDefault();
        state.canvas.zoom(e.deltaY < 0 ? 1.15 : 1 / 1.15, e);
      }}
    ></canvas>
    <div class="under">
      <p class="status" role="status" aria-live="polite">${busy ? "Working." : message}</p>
      <label class="slider">Labels
        <input type="range" min="0" max="1" step="0.05" value=${view.opacity} onInput=${(/** @type {any} */ e) => setView({ ...view, opacity: Number(e.target.value) })} /></label>
      <label class="slider">Window
        <input type="range" min="0.1" max="1.5" step="0.05" value=${view.window} onInput=${(/** @type {any} */ e) => setView({ ...view, window: Number(e.target.value) })} /></label>
      <label class="slider">Level
        <input type="range" min="0.1" max="1" step="0.05" value=${view.level} onInput=${(/** @type {any} */ e) => setView({ ...view, level: Number(e.target.value) })} /></label>
      <button type="button" onClick=${() => state.canvas.fit()}>Fit</button>
    </div>
    <fieldset class="classes">
      <legend>Classes</legend>
      ${ids.map((id) => html`<div class="class-row">
        <label><input type="radio" name="class" checked=${active === id} onChange=${() => setActive(id)} />
          <span class="swatch" style=${{ background: `rgb(${classColor(id).join(" ")})` }}></span>${classes[id]}</label>
        <span class="count">${counts.get(id) ?? 0} px</span>
        <label class="eye"><input type="checkbox" checked=${!hidden.has(id)} aria-label="Show ${classes[id]}" onChange=${() => {
          const next = new Set(hidden);
          if (!next.delete(id)) next.add(id);
          setHidden(next);
        }} />show</label>
      </div>`)}
    </fieldset>
  </div>`;
}

/**
 * Templates that guided an answer, as thumbnails with their similarity.
 * @param {{bank: string, item: any}} props
 */
export function Guides({ bank, item }) {
  const uses = new Map();
  for (const list of Object.values(item.templates ?? {})) {
    for (const use of /** @type {any[]} */ (list)) uses.set(use.id, use);
  }
  if (!uses.size) return null;
  return html`<section class="guides" aria-label="Templates used">
    <h3>Templates used</h3>
    ${[...uses.values()].map((use) => html`<figure>
      <img src="/templates/${use.id}/overlay.png?bank=${encodeURIComponent(bank)}" alt="Template of ${use.group}" loading="lazy" />
      <figcaption>${use.group}<br />similarity ${use.similarity.toFixed(2)}</figcaption>
    </figure>`)}
  </section>`;
}

/** Segment an item and keep the answer. @param {string} list @param {string} id @returns {Promise<any>} the item */
export async function segmentItem(list, id) {
  const path = `/worklists/${encodeURIComponent(list)}/items/${id}`;
  await send("POST", `${path}/segment`, { json: {} });
  const content = await get(`/worklists/${encodeURIComponent(list)}`);
  return content.items.find((/** @type {any} */ i) => i.id === id);
}

/** @param {string} list @param {string} id @param {string} decision @param {boolean} [bank] */
export async function decide(list, id, decision, bank = false) {
  return post(`/worklists/${encodeURIComponent(list)}/items/${id}/decision`, { decision, add_to_bank: bank });
}

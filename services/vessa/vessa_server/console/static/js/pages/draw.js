// @ts-check
/** Draw the mask of a template on an uploaded image, without any service call until it is added. */

import { html, useEffect, useRef, useState } from "../../vendor/preact-htm.js";
import { send } from "../api.js";
import { ImageCanvas } from "../canvas.js";
import { UndoStack, areas, classColor, fillPolygon, floodFill, paintLine } from "../masks.js";
import { readClasses } from "./bank.js";
import { grayPng } from "../png.js";

const TOOLS = [["brush", "Brush"], ["eraser", "Eraser"], ["lasso", "Lasso"], ["polygon", "Polygon"], ["fill", "Fill"]];

/** @param {{bank: any, onDone: (name: string) => void}} props */
export function DrawTemplate({ bank, onDone }) {
  const canvasRef = useRef(null);
  const state = useRef(/** @type {any} */ ({ undo: new UndoStack(), polygon: [] })).current;
  const [file, setFile] = useState(/** @type {File | null} */ (null));
  const [names, setNames] = useState(bank ? Object.entries(bank.classes).map(([id, n]) => `${id}: ${n}`).join("\n") : "1: structure");
  const [tool, setTool] = useState("brush");
  const [active, setActive] = useState(1);
  const [radius, setRadius] = useState(6);
  const [message, setMessage] = useState("");
  const [, redraw] = useState(0);

  useEffect(() => {
    if (bank) setNames(Object.entries(bank.classes).map(([id, n]) => `${id}: ${n}`).join("\n"));
  }, [bank?.name, bank?.version]);

  useEffect(() => {
    const drawing = new ImageCanvas(/** @type {any} */ (canvasRef.current));
    state.canvas = drawing;
    return () => drawing.close();
  }, []);

  /** @type {Record<string, string>} */
  let classes = {};
  let wrong = "";
  try {
    classes = readClasses(names);
  } catch (error) {
    wrong = String(/** @type {Error} */ (error).message);
  }

  /** @param {File} chosen */
  async function open(chosen) {
    try {
      const image = await createImageBitmap(chosen);
      state.labels = { width: image.width, height: image.height, values: new Uint8Array(image.width * image.height) };
      state.undo = new UndoStack();
      state.canvas.labels = state.labels;
      state.canvas.show(image);
      setFile(chosen);
      setMessage("");
    } catch {
      setMessage(`The browser cannot show ${chosen.name}. Use PNG or JPEG here, or upload image and mask.`);
    }
  }

  /** @param {PointerEvent} event */
  function down(event) {
    if (!state.labels) return;
    /** @type {HTMLElement} */ (event.target).setPointerCapture(event.pointerId);
    const at = state.canvas.toImage(event);
    if (event.ctrlKey || event.button === 1) {
      state.down = { kind: "pan", x: event.clientX, y: event.clientY };
      return;
    }
    state.down = { kind: tool, last: at, from: at };
    if (tool === "brush" || tool === "eraser") {
      state.undo.remember(state.labels.values);
      move(event);
    } else if (tool === "lasso") state.canvas.drawn.stroke = [at];
  }

  /** @param {PointerEvent} event */
  function move(event) {
    const at = state.canvas.toImage(event);
    const held = state.down;
    state.canvas.cursor = tool === "brush" || tool === "eraser" ? { at, radius } : null;
    if (held?.kind === "pan") {
      state.canvas.pan(event.clientX - held.x, event.clientY - held.y);
      Object.assign(held, { x: event.clientX, y: event.clientY });
    } else if (held?.kind === "brush" || held?.kind === "eraser") {
      paintLine(state.labels, held.last, at, radius, held.kind === "brush" ? active : 0);
      held.last = at;
    } else if (held?.kind === "lasso") state.canvas.drawn.stroke.push(at);
    state.canvas.draw();
  }

  /** @param {PointerEvent} event */
  function up(event) {
    const held = state.down;
    state.down = null;
    if (!held) return;
    const drawn = state.canvas.drawn;
    if (held.kind === "lasso") {
      state.undo.remember(state.labels.values);
      fillPolygon(state.labels, drawn.stroke, active);
      drawn.stroke = [];
    } else if (held.kind === "polygon") {
      state.polygon.push(state.canvas.toImage(event));
      drawn.stroke = state.polygon;
    } else if (held.kind === "fill") {
      state.undo.remember(state.labels.values);
      floodFill(state.labels, held.from, active);
    }
    state.canvas.draw();
    redraw((n) => n + 1);
  }

  /** Close the polygon. */
  function close() {
    if (state.polygon.length >= 3) {
      state.undo.remember(state.labels.values);
      fillPolygon(state.labels, state.polygon, active);
    }
    state.polygon = [];
    state.canvas.drawn.stroke = [];
    state.canvas.draw();
    redraw((n) => n + 1);
  }

  /** @param {"undo" | "redo"} way */
  function step(way) {
    const values = state.labels && state.undo[way](state.labels.values);
    if (values) state.labels.values.set(values);
    state.canvas.draw();
    redraw((n) => n + 1);
  }

  /** @param {any} event */
  async function add(event) {
    event.preventDefault();
    const { bank: name, group } = event.target.elements;
    if (!file || !state.labels) return setMessage("Choose an image first.");
    if (wrong) return setMessage(wrong);
    const fields = new FormData();
    fields.set("bank", name.value);
    fields.set("group", group.value);
    fields.set("image", file);
    fields.set("mask", await grayPng(state.labels), "mask.png");
    fields.set("classes", JSON.stringify(classes));
    try {
      await send("POST", "/templates", { body: fields });
      setMessage("The template is in the bank.");
      onDone(name.value);
    } catch (error) {
      setMessage(String(/** @type {Error} */ (error).message));
    }
    return undefined;
  }

  const counts = state.labels ? areas(state.labels) : new Map();
  return html`<form class="draw" onSubmit=${add}>
    <label>Image (PNG or JPEG) <input name="file" type="file" accept="image/png,image/jpeg" onChange=${(/** @type {any} */ e) => e.target.files[0] && open(e.target.files[0])} /></label>
    <label>Bank <input name="bank" required defaultValue=${bank?.name ?? "default"} /></label>
    <label>Patient <input name="group" required placeholder="patient001" /></label>
    <label>Classes, one a line <textarea rows="3" value=${names} onInput=${(/** @type {any} */ e) => setNames(e.target.value)}></textarea></label>
    <div class="tools" role="toolbar" aria-label="Drawing tools">
      ${TOOLS.map(([name, label]) => html`<button type="button" aria-pressed=${tool === name} onClick=${() => setTool(name)}>${label}</button>`)}
      <label class="slider">Size <input type="range" min="1" max="40" value=${radius} onInput=${(/** @type {any} */ e) => setRadius(Number(e.target.value))} /></label>
      <button type="button" onClick=${() => step("undo")}>Undo</button>
      <button type="button" onClick=${() => step("redo")}>Redo</button>
    </div>
    <div class="tools" role="group" aria-label="Class to draw">
      ${Object.entries(classes).map(([id, name]) => html`<label><input type="radio" name="drawn-class" checked=${active === Number(id)} onChange=${() => setActive(Number(id))} />
        <span class="swatch" style=${{ background: `rgb(${classColor(Number(id)).join(" ")})` }}></span>${name} <span class="count">${counts.get(Number(id)) ?? 0} px</span></label>`)}
    </div>
    <canvas ref=${canvasRef} class="stage ${file ? "" : "empty"}" tabindex="0" role="img" aria-label=${file ? `Image ${file.name} to draw on` : "No image yet"}
      onPointerDown=${down} onPointerMove=${move} onPointerUp=${up} onDblClick=${close}
      onWheel=${(/** @type {WheelEvent} */ e) => {
        e.preventDefault();
        state.canvas.zoom(e.deltaY < 0 ? 1.15 : 1 / 1.15, e);
      }}></canvas>
    <p role="status" aria-live="polite">${wrong || message}</p>
    <button class="primary" disabled=${!file || !!wrong || !counts.size}>Add template</button>
  </form>`;
}

// @ts-check
/** Draw the mask of a template on a picture or on slices of a volume; nothing is stored until it is added. */

import { html, useEffect, useRef, useState } from "../../vendor/preact-htm.js";
import { send } from "../api.js";
import { ImageCanvas } from "../canvas.js";
import { classLines, readClasses } from "../class_names.js";
import { swatch } from "../classes.js";
import { groupOf, sortFiles } from "../files.js";
import { UndoStack, areas, fillPolygon, floodFill, paintLine } from "../masks.js";
import { grayPng } from "../png.js";
import { decodeSlices, imageData, slicePng } from "../slices.js";
import { ViewControls } from "../view_controls.js";

const TOOLS = [["brush", "Brush"], ["eraser", "Eraser"], ["lasso", "Lasso"], ["polygon", "Polygon"], ["fill", "Fill"]];

/** @param {{bank: any, onDone: (name: string) => void}} props */
export function DrawTemplate({ bank, onDone }) {
  const canvasRef = useRef(null);
  const state = useRef(/** @type {any} */ ({ undo: new UndoStack(), polygon: [], drawn: new Map() })).current;
  const [opened, setOpened] = useState(/** @type {{name: string, slices: import("../slices.js").Slices} | null} */ (null));
  const [index, setIndex] = useState(0);
  const [patient, setPatient] = useState("");
  const [view, setView] = useState({ window: 1, level: 0.5 });
  const [names, setNames] = useState(bank ? classLines(bank.classes) : "1: structure");
  const [tool, setTool] = useState("brush");
  const [active, setActive] = useState(1);
  const [radius, setRadius] = useState(6);
  const [message, setMessage] = useState("");
  const [, redraw] = useState(0);

  useEffect(() => {
    if (bank) setNames(classLines(bank.classes));
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

  useEffect(() => {
    Object.assign(state.canvas, view);
    state.canvas.draw();
  }, [view]);

  /** Show one slice with what was drawn on it. @param {import("../slices.js").Slices} slices @param {number} place */
  async function show(slices, place) {
    const image = await createImageBitmap(imageData(slices, place));
    const { width, height } = slices;
    if (!state.drawn.has(place)) {
      state.drawn.set(place, { undo: new UndoStack(), labels: { width, height, values: new Uint8Array(width * height) } });
    }
    Object.assign(state, state.drawn.get(place), { polygon: [], down: null });
    state.canvas.drawn.stroke = [];
    state.canvas.labels = state.labels;
    state.canvas.show(image, place !== index);
    setIndex(place);
  }

  /** @param {File[]} files */
  async function open(files) {
    setMessage("Opening.");
    try {
      const { pictures, volumes } = await sortFiles(files);
      const found = volumes.length ? volumes[0] : pictures.length ? { name: pictures[0].name, files: [pictures[0]] } : null;
      if (!found) throw new Error("No picture or volume is among these files. Choose PNG, JPEG, TIFF, NIfTI or DICOM.");
      const slices = await decodeSlices(found.files);
      state.drawn = new Map();
      await show(slices, Math.floor(slices.count / 2));
      setOpened({ name: found.name, slices });
      if (!patient) setPatient(groupOf(found.files[0].name));
      const left = pictures.length + volumes.length - 1;
      setMessage(left ? `${left} other images were left out; open one at a time.` : "");
    } catch (error) {
      setMessage(String(/** @type {Error} */ (error).message));
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
    if (!opened || !state.labels) return setMessage("Choose an image first.");
    if (wrong) return setMessage(wrong);
    const fields = new FormData();
    fields.set("bank", name.value);
    fields.set("group", group.value);
    fields.set("image", await slicePng(opened.slices, index), "image.png");
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
  const count = opened?.slices.count ?? 0;
  return html`<form class="draw" onSubmit=${add}>
    <div class="fields">
      <label>Image or volume <input name="file" type="file" multiple onChange=${(/** @type {any} */ e) => e.target.files.length && open([...e.target.files])} /></label>
      <label>Bank <input name="bank" required defaultValue=${bank?.name ?? "default"} /></label>
      <label>Patient <input name="group" required placeholder="patient001" value=${patient} onInput=${(/** @type {any} */ e) => setPatient(e.target.value)} /></label>
      <label>Classes, one a line <textarea rows="3" cols="32" value=${names} onInput=${(/** @type {any} */ e) => setNames(e.target.value)}></textarea></label>
    </div>
    <div class="tools" role="toolbar" aria-label="Drawing tools">
      ${TOOLS.map(([name, label]) => html`<button type="button" aria-pressed=${tool === name} onClick=${() => setTool(name)}>${label}</button>`)}
      <label class="slider">Size <input type="range" min="1" max="40" value=${radius} onInput=${(/** @type {any} */ e) => setRadius(Number(e.target.value))} /></label>
      <button type="button" onClick=${() => step("undo")}>Undo</button>
      <button type="button" onClick=${() => step("redo")}>Redo</button>
    </div>
    <div class="tools" role="group" aria-label="Class to draw">
      ${Object.entries(classes).map(([id, name]) => html`<label><input type="radio" name="drawn-class" checked=${active === Number(id)} onChange=${() => setActive(Number(id))} />
        <span class="swatch" style=${swatch(Number(id))}></span>${name} <span class="count">${counts.get(Number(id)) ?? 0} px</span></label>`)}
    </div>
    <canvas ref=${canvasRef} class="stage ${opened ? "" : "empty"}" tabindex="0" role="img" aria-label=${opened ? `Image ${opened.name} to draw on` : "No image yet"}
      onPointerDown=${down} onPointerMove=${move} onPointerUp=${up} onDblClick=${close}
      onWheel=${(/** @type {WheelEvent} */ e) => {
        e.preventDefault();
        const next = index + (e.deltaY < 0 ? -1 : 1);
        if (count < 2 || e.ctrlKey) state.canvas.zoom(e.deltaY < 0 ? 1.15 : 1 / 1.15, e);
        else if (opened && next >= 0 && next < count) show(opened.slices, next);
      }}></canvas>
    ${opened && html`<div class="under">
      ${count > 1 && html`<label class="slider">Slice
        <input type="range" min="0" max=${count - 1} value=${index} onInput=${(/** @type {any} */ e) => show(opened.slices, Number(e.target.value))} />
        ${index + 1} of ${count}</label>`}
      <${ViewControls} view=${view} onView=${setView} canvas=${() => state.canvas} />
    </div>`}
    <p role="status" aria-live="polite">${wrong || message}</p>
    <button class="primary" disabled=${!opened || !!wrong || !counts.size}>Add template</button>
  </form>`;
}

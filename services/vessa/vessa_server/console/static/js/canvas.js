// @ts-check
/** A canvas of three layers (image, labels, prompts) with zoom, pan, window and level. */

import { classColor } from "./masks.js";

/** @typedef {import("./masks.js").LabelMap} LabelMap */
/** @typedef {import("./masks.js").Point} Point */
/** @typedef {{points: {at: Point, inside: boolean}[], box: [Point, Point] | null, stroke: Point[], closed: boolean}} Drawn */

export class ImageCanvas {
  /** @param {HTMLCanvasElement} canvas */
  constructor(canvas) {
    this.canvas = canvas;
    this.context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
    /** @type {ImageBitmap | null} */
    this.image = null;
    /** @type {LabelMap | null} */
    this.labels = null;
    /** @type {Uint8Array | null} confidence, shown where it is low */
    this.doubt = null;
    /** @type {Set<number>} */
    this.hidden = new Set();
    this.opacity = 0.4;
    this.window = 1; // contrast: 1 shows all values
    this.level = 0.5; // brightness: middle of the shown range
    this.scale = 1;
    /** @type {Point} */
    this.offset = [0, 0];
    /** @type {Drawn} */
    this.drawn = { points: [], box: null, stroke: [], closed: false };
    /** @type {{at: Point, radius: number} | null} */
    this.cursor = null;
    this._overlay = new OffscreenCanvas(1, 1);
    this._frame = 0;
    this._observer = new ResizeObserver(() => this.resize());
    this._observer.observe(canvas);
  }

  /** Stop observing; call it when the canvas leaves the page. */
  close() {
    this._observer.disconnect();
    cancelAnimationFrame(this._frame);
  }

  /** @param {ImageBitmap} image @param {boolean} [keep] keep zoom and place, as between slices of a volume */
  show(image, keep = false) {
    const same = this.image && this.image.width === image.width && this.image.height === image.height;
    this.image = image;
    if (keep && same) this.draw();
    else this.fit();
  }

  /** Show the whole image, centered. */
  fit() {
    if (!this.image) return;
    const { width, height } = this._size();
    this.scale = Math.min(width / this.image.width, height / this.image.height);
    this.offset = [(width - this.image.width * this.scale) / 2, (height - this.image.height * this.scale) / 2];
    this.draw();
  }

  resize() {
    const { width, height } = this._size();
    const ratio = devicePixelRatio || 1;
    this.canvas.width = Math.max(1, Math.round(width * ratio));
    this.canvas.height = Math.max(1, Math.round(height * ratio));
    this.fit();
  }

  /** @param {{clientX: number, clientY: number}} event @returns {Point} px of the image */
  toImage(event) {
    const box = this.canvas.getBoundingClientRect();
    return [
      (event.clientX - box.left - this.offset[0]) / this.scale,
      (event.clientY - box.top - this.offset[1]) / this.scale,
    ];
  }

  /** @param {Point} at @returns {boolean} whether a place lies in the image */
  inside(at) {
    return !!this.image && at[0] >= 0 && at[1] >= 0 && at[0] < this.image.width && at[1] < this.image.height;
  }

  /**
   * Zoom around a place of the screen, by default around the middle.
   * @param {number} factor @param {{clientX: number, clientY: number}} [event]
   */
  zoom(factor, event) {
    const box = this.canvas.getBoundingClientRect();
    const x = event ? event.clientX - box.left : box.width / 2;
    const y = event ? event.clientY - box.top : box.height / 2;
    const scale = Math.min(64, Math.max(0.05, this.scale * factor));
    this.offset = [x - ((x - this.offset[0]) * scale) / this.scale, y - ((y - this.offset[1]) * scale) / this.scale];
    this.scale = scale;
    this.draw();
  }

  /** @param {number} dx @param {number} dy px of the screen */
  pan(dx, dy) {
    this.offset = [this.offset[0] + dx, this.offset[1] + dy];
    this.draw();
  }

  /** Draw at the next frame. */
  draw() {
    cancelAnimationFrame(this._frame);
    this._frame = requestAnimationFrame(() => this._draw());
  }

  _size() {
    const box = this.canvas.getBoundingClientRect();
    return { width: Math.max(1, box.width), height: Math.max(1, box.height) };
  }

  _draw() {
    const { context, image } = this;
    const ratio = devicePixelRatio || 1;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    if (!image) return;
    context.setTransform(
      this.scale * ratio, 0, 0, this.scale * ratio, this.offset[0] * ratio, this.offset[1] * ratio,
    );
    context.imageSmoothingEnabled = this.scale < 3;
    // window and level as CSS filters: brightness first moves the level to the middle, contrast widens it
    const contrast = 1 / Math.max(0.02, this.window);
    context.filter = contrast === 1 && this.level === 0.5 ? "none" : `brightness(${0.5 / Math.max(0.02, this.level)}) contrast(${contrast})`;
    context.drawImage(image, 0, 0);
    context.filter = "none";
    if (this.labels) this._drawLabels(this.labels);
    this._drawPrompts();
  }

  /** @param {LabelMap} labels */
  _drawLabels(labels) {
    const { width, height, values } = labels;
    if (this._overlay.width !== width || this._overlay.height !== height) {
      this._overlay = new OffscreenCanvas(width, height);
    }
    const layer = /** @type {OffscreenCanvasRenderingContext2D} */ (this._overlay.getContext("2d"));
    const pixels = layer.createImageData(width, height);
    for (let y = 0, place = 0; y < height; y++) {
      for (let x = 0; x < width; x++, place++) {
        const id = values[place];
        if (this.doubt && this.doubt[place] < 200) {
          pixels.data.set([255, 0, 255, 200 - this.doubt[place]], 4 * place);
          continue;
        }
        if (!id || this.hidden.has(id)) continue;
        const edge =
          x === 0 || y === 0 || x === width - 1 || y === height - 1 ||
          values[place - 1] !== id || values[place + 1] !== id ||
          values[place - width] !== id || values[place + width] !== id;
        const [r, g, b] = classColor(id);
        pixels.data.set([r, g, b, edge ? 255 : Math.round(255 * this.opacity)], 4 * place);
      }
    }
    layer.putImageData(pixels, 0, 0);
    this.context.imageSmoothingEnabled = false;
    this.context.drawImage(this._overlay, 0, 0);
  }

  _drawPrompts() {
    const { context, drawn } = this;
    const px = 1 / this.scale;
    context.lineWidth = 2 * px;
    for (const { at, inside } of drawn.points) {
      context.beginPath();
      context.arc(at[0], at[1], 5 * px, 0, 2 * Math.PI);
      context.fillStyle = inside ? "#35c759" : "#ff3b30";
      context.fill();
      context.strokeStyle = "#fff";
      context.stroke();
    }
    context.strokeStyle = "#ffd60a";
    if (drawn.box) {
      const [[ax, ay], [bx, by]] = drawn.box;
      context.strokeRect(Math.min(ax, bx), Math.min(ay, by), Math.abs(bx - ax), Math.abs(by - ay));
    }
    if (drawn.stroke.length) {
      context.beginPath();
      drawn.stroke.forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y)));
      if (drawn.closed) context.closePath();
      context.stroke();
    }
    if (this.cursor) {
      context.beginPath();
      context.arc(this.cursor.at[0], this.cursor.at[1], this.cursor.radius, 0, 2 * Math.PI);
      context.strokeStyle = "#fff";
      context.stroke();
    }
  }
}

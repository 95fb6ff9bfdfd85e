// @ts-check
/** Controls under a canvas: window and level of the shown image, and zoom. */

import { html } from "../vendor/preact-htm.js";

/**
 * @template {{window: number, level: number}} View
 * @param {{view: View, onView: (view: View) => void, canvas: () => import("./canvas.js").ImageCanvas}} props
 *   canvas: returns the canvas, which is made after the first drawing of the page
 */
export function ViewControls({ view, onView, canvas }) {
  return html`
    <label class="slider">Window
      <input type="range" min="0.1" max="1.5" step="0.05" value=${view.window} onInput=${(/** @type {any} */ e) => onView({ ...view, window: Number(e.target.value) })} /></label>
    <label class="slider">Level
      <input type="range" min="0.1" max="1" step="0.05" value=${view.level} onInput=${(/** @type {any} */ e) => onView({ ...view, level: Number(e.target.value) })} /></label>
    <button type="button" aria-label="Zoom in" onClick=${() => canvas().zoom(1.3)}>+</button>
    <button type="button" aria-label="Zoom out" onClick=${() => canvas().zoom(1 / 1.3)}>−</button>
    <button type="button" onClick=${() => canvas().fit()}>Fit</button>`;
}

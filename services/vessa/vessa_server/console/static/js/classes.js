// @ts-check
/** The class list of the editor: which class is drawn, its color, pixels and visibility. */

import { html } from "../vendor/preact-htm.js";
import { classColor } from "./masks.js";

/** @param {number} id @returns {{background: string}} */
export function swatch(id) {
  return { background: `rgb(${classColor(id).join(" ")})` };
}

/**
 * @param {{classes: Record<string, string>, active: number, counts: Map<number, number>, hidden: Set<number>,
 *   onActive: (id: number) => void, onHidden: (hidden: Set<number>) => void}} props
 */
export function ClassList({ classes, active, counts, hidden, onActive, onHidden }) {
  return html`<fieldset class="classes">
    <legend>Classes</legend>
    ${Object.keys(classes).map(Number).map((id) => html`<div class="class-row">
      <label><input type="radio" name="class" checked=${active === id} onChange=${() => onActive(id)} />
        <span class="swatch" style=${swatch(id)}></span>${classes[id]}</label>
      <span class="count">${counts.get(id) ?? 0} px</span>
      <label class="eye"><input type="checkbox" checked=${!hidden.has(id)} aria-label="Show ${classes[id]}" onChange=${() => {
        const next = new Set(hidden);
        if (!next.delete(id)) next.add(id);
        onHidden(next);
      }} />show</label>
    </div>`)}
  </fieldset>`;
}

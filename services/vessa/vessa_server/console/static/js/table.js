// @ts-check
/** A table that scrolls inside itself. */

import { html } from "../vendor/preact-htm.js";

/** @param {{head: string[], rows: any[][]}} props */
export function Table({ head, rows }) {
  if (!rows.length) return html`<p>None.</p>`;
  return html`<div class="scroll" tabindex="0" role="region" aria-label=${head.join(", ")}><table>
    <thead><tr>${head.map((h) => html`<th scope="col">${h}</th>`)}</tr></thead>
    <tbody>${rows.map((row) => html`<tr>${row.map((cell) => html`<td>${cell}</td>`)}</tr>`)}</tbody>
  </table></div>`;
}

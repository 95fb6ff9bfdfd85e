// @ts-check
/** Templates that guided an answer, as thumbnails with their similarity. */

import { html } from "../vendor/preact-htm.js";

/** @param {{bank: string, item: any}} props */
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

// @ts-check
/** Admin: keys, limits, device, jobs and the audit log, to read. */

import { html, useEffect, useState } from "../../vendor/preact-htm.js";
import { get } from "../api.js";

export function AdminPage() {
  const [data, setData] = useState(/** @type {any} */ (null));
  const [message, setMessage] = useState("");
  useEffect(() => {
    Promise.all([get("/info"), get("/keys"), get("/jobs"), get("/audit?count=100")]).then(
      ([info, keys, jobs, audit]) => setData({ info, keys, jobs, audit }),
      (error) => setMessage(error.message),
    );
  }, []);
  if (!data) return html`<p role="status">${message || "Loading."}</p>`;
  const { info, keys, jobs, audit } = data;
  return html`<h1>Admin</h1>
    <section class="card"><h2>Service</h2>
      <dl class="facts">
        <dt>Version</dt><dd>${info.version}</dd><dt>Weights</dt><dd>${info.preset}, ${info.model.slice(0, 16)}</dd>
        <dt>Device</dt><dd>${info.device}</dd><dt>Parts</dt><dd>${info.parts.join(", ")}</dd>
      </dl>
      <h3>Limits</h3><dl class="facts">${Object.entries(info.limits).map(([name, value]) => html`<dt>${name}</dt><dd>${value}</dd>`)}</dl>
    </section>
    <section class="card"><h2>Keys</h2>
      <p><code>vessa-server keys create NAME --role curate</code> makes a key, <code>keys revoke NAME</code> ends it.</p>
      <${Table} head=${["Name", "Role", "Created", "Requests at once", "Images per minute"]}
        rows=${keys.map((/** @type {any} */ k) => [k.name, k.role, k.created, k.requests ?? "default", k.images_per_minute ?? "default"])} />
    </section>
    <section class="card"><h2>Jobs</h2>
      <${Table} head=${["Job", "State", "Bank", "Slices"]} rows=${jobs.map((/** @type {any} */ j) => [j.id, j.state, j.bank, `${j.done} of ${j.slices}`])} />
    </section>
    <section class="card"><h2>Audit log</h2>
      <${Table} head=${["Time", "Key", "Action", "State", "About"]}
        rows=${audit.map((/** @type {any} */ a) => {
          const { time, key, action, state, source, request, ...about } = a;
          return [time, key, action, state, JSON.stringify(about)];
        })} />
    </section>`;
}

/** @param {{head: string[], rows: any[][]}} props */
function Table({ head, rows }) {
  if (!rows.length) return html`<p>None.</p>`;
  return html`<div class="scroll" tabindex="0" role="region" aria-label=${head.join(", ")}><table>
    <thead><tr>${head.map((h) => html`<th scope="col">${h}</th>`)}</tr></thead>
    <tbody>${rows.map((row) => html`<tr>${row.map((cell) => html`<td>${cell}</td>`)}</tr>`)}</tbody>
  </table></div>`;
}

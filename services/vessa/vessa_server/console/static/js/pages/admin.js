// @ts-check
/** Admin: keys, limits, device, jobs and the audit log, to read. */

import { html, useEffect, useState } from "../../vendor/preact-htm.js";
import { get } from "../api.js";
import { Table } from "../table.js";

const POLL_MS = 3000;

export function AdminPage() {
  const [data, setData] = useState(/** @type {any} */ (null));
  const [message, setMessage] = useState("");
  useEffect(() => {
    let timer = 0;
    const poll = async () => {
      try {
        const [info, keys, jobs, audit, queue] = await Promise.all(["/info", "/keys", "/jobs", "/audit?count=100", "/queue"].map(get));
        setData({ info, keys, jobs, audit, queue });
        setMessage("");
      } catch (error) {
        setMessage(String(/** @type {Error} */ (error).message));
      }
      timer = setTimeout(poll, POLL_MS);
    };
    poll();
    return () => clearTimeout(timer);
  }, []);
  if (!data) return html`<p role="status">${message || "Loading."}</p>`;
  const { info, keys, jobs, audit, queue } = data;
  return html`<h1>Admin</h1>
    <p class="problem" role="alert">${message}</p>
    <section class="card"><h2>Service</h2>
      <dl class="facts">
        <dt>Version</dt><dd>${info.version}</dd><dt>Weights</dt><dd>${info.preset}, ${info.model.slice(0, 16)}</dd>
        <dt>Device</dt><dd>${info.device}</dd><dt>Parts</dt><dd>${info.parts.join(", ")}</dd>
      </dl>
      <h3>Limits</h3><dl class="facts">${Object.entries(info.limits).map(([name, value]) => html`<dt>${name}</dt><dd>${value}</dd>`)}</dl>
    </section>
    <section class="card"><h2>Queue</h2>
      <dl class="facts">
        <dt>Images waiting</dt><dd>${queue.waiting} of ${queue.queue_items}</dd>
        <dt>Requests in progress</dt><dd>${queue.requests} of ${queue.max_requests}</dd>
        <dt>Worker</dt><dd>${queue.worker}</dd>
      </dl>
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
          const { time, key, action, state, source, request, sequence, previous, digest, ...about } = a;
          const text = Object.entries(about).map(([name, value]) => `${name}: ${Array.isArray(value) ? `${value.length}` : value}`);
          return [String(time).replace("T", " ").slice(0, 19), key, action, state, text.join(", ")];
        })} />
    </section>`;
}

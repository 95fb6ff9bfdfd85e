// @ts-check
/** Review: the queue by doubt, decisions by keyboard, export. */

import { html, useEffect, useRef, useState } from "../../vendor/preact-htm.js";
import { get, send } from "../api.js";
import { Editor, Guides, decide } from "../editor.js";
import { WorklistChooser, useWorklist } from "./worklist.js";

/**
 * Order a queue: open images first, the most doubtful first.
 * @param {any[]} items @returns {any[]}
 */
export function queueOf(items) {
  const rank = { open: 0, rejected: 1, accepted: 2 };
  return items
    .slice()
    .sort((a, b) => rank[/** @type {"open"} */ (a.decision)] - rank[/** @type {"open"} */ (b.decision)] || (b.doubt ?? 2) - (a.doubt ?? 2) || a.name.localeCompare(b.name));
}

/** @param {{session: any}} props */
export function ReviewPage({ session }) {
  const [list, choose] = useWorklist();
  const [loaded, setContent] = useState(/** @type {any} */ (null));
  const [selected, setSelected] = useState("");
  const [message, setMessage] = useState("");
  const [showDoubt, setShowDoubt] = useState(false);
  const [last, setLast] = useState(/** @type {string[]} */ ([]));
  const deciding = useRef(false);
  const mayCurate = session.role !== "annotate";

  useEffect(() => {
    if (!list) return undefined;
    let gone = false; // the answer of a worklist that was left meanwhile says nothing about this one
    get(`/worklists/${encodeURIComponent(list)}`).then(
      (c) => {
        if (gone) return;
        setContent(c);
        setSelected(queueOf(c.items)[0]?.id ?? "");
      },
      (error) => {
        if (gone) return;
        setContent(null);
        if (error.status === 404) choose("");
        else setMessage(error.message);
      },
    );
    return () => {
      gone = true;
    };
  }, [list]);

  const content = loaded?.name === list ? loaded : null;
  const queue = content ? queueOf(content.items) : [];
  const item = queue.find((i) => i.id === selected);

  /** @param {any} changed */
  const put = (changed) => setContent((/** @type {any} */ c) => ({ ...c, items: c.items.map((/** @type {any} */ i) => (i.id === changed.id ? { ...i, ...changed } : i)) }));

  /** @param {string} decision @param {boolean} [bank] */
  async function act(decision, bank = false) {
    if (!item || deciding.current) return;
    deciding.current = true; // a second key before the answer would decide twice about this image
    try {
      const changed = await decide(list, item.id, decision, bank);
      put({ ...changed, labels: item.labels });
      setLast((l) => [...l, item.id]);
      setMessage(bank ? `${item.name} is accepted and in the bank.` : `${item.name} is ${decision}.`);
      const next = queueOf(content.items).find((i) => i.id !== item.id && i.decision === "open");
      if (next) setSelected(next.id);
    } catch (error) {
      setMessage(String(/** @type {Error} */ (error).message));
    } finally {
      deciding.current = false;
    }
  }

  async function undo() {
    const id = last[last.length - 1];
    if (!id) return setMessage("Nothing to undo.");
    try {
      const changed = await (await send("DELETE", `/worklists/${encodeURIComponent(list)}/items/${id}/decision`)).json();
      put({ decision: changed.decision, id });
      setLast(last.slice(0, -1));
      setSelected(id);
      setMessage(`${changed.name} is ${changed.decision} again.`);
    } catch (error) {
      setMessage(String(/** @type {Error} */ (error).message));
    }
    return undefined;
  }

  /** @param {number} by */
  function go(by) {
    const place = queue.findIndex((i) => i.id === selected);
    const next = queue[Math.min(queue.length - 1, Math.max(0, place + by))];
    if (next) setSelected(next.id);
  }

  // The listener reads the newest actions: one of an earlier render would decide about an earlier image.
  const actions = useRef(/** @type {Record<string, () => unknown>} */ ({}));
  actions.current = {
    a: () => act("accepted"), r: () => act("rejected"), b: () => mayCurate && act("accepted", true),
    u: undo, d: () => setShowDoubt((s) => !s), n: () => go(1), p: () => go(-1),
  };
  useEffect(() => {
    /** @param {KeyboardEvent} event */
    const key = (event) => {
      if (/** @type {HTMLElement} */ (event.target).matches("input:not([type=radio]):not([type=checkbox]), select, textarea")) return;
      if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey || event.repeat) return;
      const action = actions.current[event.key.toLowerCase()];
      if (action) {
        event.preventDefault();
        action();
      }
    };
    addEventListener("keydown", key);
    return () => removeEventListener("keydown", key);
  }, []);

  const counts = { open: 0, accepted: 0, rejected: 0 };
  for (const i of queue) counts[/** @type {"open"} */ (i.decision)]++;
  const exportPath = `/worklists/${encodeURIComponent(list)}/export`;
  return html`<div class="columns three">
    <aside>
      <h1>Review</h1>
      <${WorklistChooser} chosen=${list} onChoose=${choose} />
      ${content && html`<p>${counts.open} open, ${counts.accepted} accepted, ${counts.rejected} rejected</p>`}
      <ul class="list items">
        ${queue.map((i) => html`<li><button type="button" class="state-${i.decision}" aria-pressed=${i.id === selected} onClick=${() => setSelected(i.id)}>
          <strong>${i.name}</strong><span>${i.decision}${i.doubt === null ? "" : `, doubt ${i.doubt.toFixed(2)}`}${i.in_bank ? ", in bank" : ""}</span>
        </button></li>`)}
      </ul>
    </aside>
    <section>
      ${item
        ? html`<${Editor} key=${item.id} list=${list} item=${item} classes=${content.classes} onChange=${put} showDoubt=${showDoubt} />
          <div class="decisions" role="toolbar" aria-label="Decisions">
            <button type="button" class="primary" onClick=${() => act("accepted")}>Accept (A)</button>
            <button type="button" class="danger" onClick=${() => act("rejected")}>Reject (R)</button>
            ${mayCurate && html`<button type="button" onClick=${() => act("accepted", true)}>Accept and add to bank (B)</button>`}
            <button type="button" onClick=${undo}>Undo decision (U)</button>
            <button type="button" aria-pressed=${showDoubt} onClick=${() => setShowDoubt(!showDoubt)}>Show doubt (D)</button>
            <button type="button" onClick=${() => go(-1)}>Previous (P)</button>
            <button type="button" onClick=${() => go(1)}>Next (N)</button>
          </div>`
        : content && html`<p>This worklist has no images. Add some on the page <a href="#annotate">Annotate</a>.</p>`}
      <p role="status" aria-live="polite">${message}</p>
    </section>
    <aside>
      ${item && html`<${Guides} bank=${content.bank} item=${item} />`}
      ${content?.items.length > 0 && html`<h3>Export</h3><ul>
        <li><a href="${exportPath}?format=folder" download>Data folder for vessa-trainer</a></li>
        <li><a href="${exportPath}?format=nnunet" download>nnU-Net</a></li>
        <li><a href="${exportPath}?format=coco" download>COCO</a></li>
      </ul>`}
    </aside>
  </div>`;
}

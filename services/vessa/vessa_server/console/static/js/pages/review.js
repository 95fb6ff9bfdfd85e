// @ts-check
/** Review: the queue by doubt or suggestion, decisions by keyboard, export. */

import { html, useEffect, useRef, useState } from "../../vendor/preact-htm.js";
import { get, post, send } from "../api.js";
import { Editor, stored } from "../editor.js";
import { Guides } from "../guides.js";
import { LAYERS, decide } from "../items.js";
import { nextOpen, queueOf } from "../queue.js";
import { LayerChoice } from "./annotate.js";
import { WorklistChooser, useWorklist } from "./worklist.js";

/** @param {{session: any}} props */
export function ReviewPage({ session }) {
  const [list, choose] = useWorklist();
  const [loaded, setContent] = useState(/** @type {any} */ (null));
  const [selected, setSelected] = useState("");
  const [message, setMessage] = useState("");
  const [layer, setLayer] = useState(LAYERS[0]);
  const [order, setOrder] = useState(/** @type {import("../queue.js").Order} */ ("doubt"));
  const [places, setPlaces] = useState(/** @type {Map<string, number>} */ (new Map()));
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
        setOrder("doubt");
        setSelected(queueOf(c.items, "doubt")[0]?.id ?? "");
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
  const queue = content ? queueOf(content.items, order, places) : [];
  const item = queue.find((i) => i.id === selected);

  /** @param {any} changed */
  const put = (changed) => setContent((/** @type {any} */ c) => ({ ...c, items: c.items.map((/** @type {any} */ i) => (i.id === changed.id ? { ...i, ...changed } : i)) }));

  /** @param {string} decision @param {boolean} [bank] */
  async function act(decision, bank = false) {
    if (!item || deciding.current) return;
    deciding.current = true; // a second key before the answer would decide twice about this image
    try {
      await stored(); // what was drawn last belongs to the decision
      const changed = await decide(list, item.id, decision, bank);
      put({ ...changed, labels: item.labels });
      setLast((l) => [...l, item.id]);
      setMessage(bank ? `${item.name} is accepted and in the bank.` : `${item.name} is ${decision}.`);
      const next = nextOpen(queue, item.id);
      if (next) setSelected(next.id);
    } catch (error) {
      setMessage(String(/** @type {Error} */ (error).message));
    } finally {
      deciding.current = false;
    }
  }

  /** @param {import("../queue.js").Order} chosen */
  async function sort(chosen) {
    if (chosen === "suggestion") {
      setMessage("Ranking the images.");
      try {
        const { items } = await post(`/worklists/${encodeURIComponent(list)}/suggest`, {});
        setPlaces(new Map(items.map((/** @type {any} */ one, /** @type {number} */ place) => [one.id, place])));
        setSelected(items[0]?.id ?? selected);
      } catch (error) {
        return setMessage(String(/** @type {Error} */ (error).message));
      }
    } else setSelected(queueOf(content.items, chosen)[0]?.id ?? selected);
    setMessage("");
    return setOrder(chosen);
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
    u: undo, d: () => setLayer((l) => LAYERS[(LAYERS.indexOf(l) + 1) % LAYERS.length]), n: () => go(1), p: () => go(-1),
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
      ${content?.items.length > 0 && html`<label>Order <select value=${order} onChange=${(/** @type {any} */ e) => {
        sort(e.target.value);
        e.target.blur(); // keys are for the page again
      }}>
        <option value="doubt">most doubtful first</option>
        <option value="suggestion">most useful for the bank first</option>
        <option value="name">by name</option>
      </select></label>`}
      ${content && html`<p>${counts.open} open, ${counts.accepted} accepted, ${counts.rejected} rejected</p>`}
      <ul class="list items">
        ${queue.map((i) => html`<li><button type="button" class="state-${i.decision}" aria-pressed=${i.id === selected} onClick=${() => setSelected(i.id)}>
          <strong>${i.name}</strong><span>${i.decision}${i.doubt === null ? "" : `, doubt ${i.doubt.toFixed(2)}`}${i.in_bank ? ", in bank" : ""}</span>
        </button></li>`)}
      </ul>
    </aside>
    <section>
      ${item
        ? html`<${Editor} key=${list} list=${list} item=${item} classes=${content.classes} onChange=${put} layer=${layer}
            slices=${item.volume ? content.items.filter((/** @type {any} */ i) => i.volume === item.volume) : []} onSlice=${(/** @type {any} */ i) => setSelected(i.id)} />
          <div class="decisions" role="toolbar" aria-label="Decisions">
            <button type="button" class="primary" onClick=${() => act("accepted")}>Accept (A)</button>
            <button type="button" class="danger" onClick=${() => act("rejected")}>Reject (R)</button>
            ${mayCurate && html`<button type="button" onClick=${() => act("accepted", true)}>Accept and add to bank (B)</button>`}
            <button type="button" onClick=${undo}>Undo decision (U)</button>
            <button type="button" onClick=${() => go(-1)}>Previous (P)</button>
            <button type="button" onClick=${() => go(1)}>Next (N)</button>
            <${LayerChoice} layer=${layer} onLayer=${setLayer} />
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
        ${content.volumes.length > 0 && html`<li><a href="${exportPath}?format=nifti" download>NIfTI labels</a></li>`}
        ${content.volumes.some((/** @type {any} */ v) => v.dicom) && html`<li><a href="${exportPath}?format=dicom-seg" download>DICOM SEG</a></li>`}
      </ul>`}
    </aside>
  </div>`;
}

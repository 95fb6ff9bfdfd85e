// @ts-check
/** Annotate: drop images or volumes, watch masks appear, correct one class at once. */

import { html, useEffect, useRef, useState } from "../../vendor/preact-htm.js";
import { get, post, send } from "../api.js";
import { Editor } from "../editor.js";
import { filesOf, groupOf, sortFiles } from "../files.js";
import { Guides } from "../guides.js";
import { LAYERS, segmentItem } from "../items.js";
import { TaskQueue } from "../tasks.js";
import { VolumeList } from "./volumes.js";
import { WorklistChooser, useWorklist } from "./worklist.js";

const AT_ONCE = 2;

/**
 * Send one picture to a worklist.
 * @param {string} list @param {File} file @param {AbortSignal} [signal] @returns {Promise<any>} the item
 */
export async function sendPicture(list, file, signal) {
  const body = new FormData();
  body.set("image", file);
  body.set("name", file.name);
  body.set("group", groupOf(file.name));
  const answer = await send("POST", `/worklists/${encodeURIComponent(list)}/items`, { body, accept: "application/json", signal });
  return answer.json();
}

export function AnnotatePage() {
  const [list, choose] = useWorklist();
  const [loaded, setContent] = useState(/** @type {any} */ (null));
  const [selected, setSelected] = useState("");
  const [message, setMessage] = useState("");
  const [layer, setLayer] = useState(LAYERS[0]);
  const [progress, setProgress] = useState(/** @type {import("../tasks.js").Progress | null} */ (null));
  const queue = useRef(/** @type {TaskQueue | null} */ (null));
  queue.current ??= new TaskQueue(AT_ONCE, setProgress);
  const latest = useRef(list);
  latest.current = list;

  /** @param {string} name */
  async function load(name) {
    const content = await get(`/worklists/${encodeURIComponent(name)}`);
    if (latest.current !== name) return; // the answer of a worklist that was left says nothing about this one
    setContent(content);
    setSelected((s) => (content.items.some((/** @type {any} */ i) => i.id === s) ? s : (content.items[0]?.id ?? "")));
  }

  useEffect(() => {
    if (!list) return undefined;
    setSelected("");
    setProgress(null);
    load(list).then(
      () => setMessage(""),
      (error) => {
        if (latest.current !== list) return;
        setContent(null);
        if (error.status === 404) choose("");
        else setMessage(error.message);
      },
    );
    return () => queue.current?.cancel();
  }, [list]);

  /** @param {any} item @param {string} into the worklist that it belongs to */
  function put(item, into) {
    setContent((/** @type {any} */ c) => {
      if (c?.name !== into) return c;
      const items = c.items.some((/** @type {any} */ i) => i.id === item.id)
        ? c.items.map((/** @type {any} */ i) => (i.id === item.id ? item : i))
        : [...c.items, item];
      return { ...c, items };
    });
  }

  /** Segment the pictures that have no labels yet. @param {any[]} items @param {string} into */
  async function segment(items, into) {
    await queue.current?.add(items.map((item) => ({
      name: item.name,
      run: async (signal) => put(await segmentItem(into, item.id, signal), into),
    })));
  }

  /** @param {File[]} files @param {string} into the worklist whose images are shown */
  async function add(files, into) {
    const sorted = await sortFiles(files);
    const left = sorted.others.length;
    setMessage(left ? `${left} of ${files.length} files are neither pictures nor volumes and were left out.` : "");
    const base = `/worklists/${encodeURIComponent(into)}/volumes`;
    await queue.current?.add([
      ...sorted.volumes.map((volume) => ({
        name: volume.name,
        run: async (/** @type {AbortSignal} */ signal) => {
          const body = new FormData();
          for (const file of volume.files) body.append("image", file);
          body.set("name", volume.name);
          body.set("group", groupOf(volume.files[0].name));
          const stored = await (await send("POST", base, { body, signal })).json();
          await post(`${base}/${stored.id}/job`, {});
          await load(into);
        },
      })),
      ...sorted.pictures.map((file) => ({
        name: file.name,
        run: async (/** @type {AbortSignal} */ signal) => {
          const item = await sendPicture(into, file, signal);
          put(item, into);
          setSelected((s) => s || item.id);
          put(await segmentItem(into, item.id, signal), into);
        },
      })),
    ]);
    await load(into);
  }

  const content = loaded?.name === list ? loaded : null; // between two worklists nothing of the old one is shown
  const item = content?.items.find((/** @type {any} */ i) => i.id === selected);
  const slices = item?.volume ? content.items.filter((/** @type {any} */ i) => i.volume === item.volume) : [];
  const waiting = content?.items.filter((/** @type {any} */ i) => !i.labels && !i.newest && !i.volume) ?? [];
  return html`<div class="columns three">
    <aside>
      <h1>Annotate</h1>
      <${WorklistChooser} chosen=${list} onChoose=${choose} />
      ${content && html`<div class="drop" role="group" aria-label="Add images"
        onDragOver=${(/** @type {Event} */ e) => e.preventDefault()}
        onDrop=${async (/** @type {any} */ e) => {
          e.preventDefault();
          add(await filesOf(e.dataTransfer), content.name);
        }}>
        <p>Drop images, volumes or a folder here, or choose files.</p>
        <label class="file">Files <input type="file" multiple
          onChange=${(/** @type {any} */ e) => {
            add([...e.target.files], content.name);
            e.target.value = "";
          }} /></label>
      </div>`}
      ${progress && html`<p role="status">${progress.done} of ${progress.total} files done${progress.cancelled ? `, ${progress.cancelled} cancelled` : ""}
        <progress value=${progress.done} max=${progress.total} aria-label="Progress"></progress></p>
        ${progress.running && html`<button type="button" onClick=${() => queue.current?.cancel()}>Cancel</button>`}
        ${progress.failed.length > 0 && html`<details open><summary>${progress.failed.length} failed</summary>
          <ul>${progress.failed.map((line) => html`<li>${line}</li>`)}</ul></details>`}`}
      ${waiting.length > 0 && !progress?.running && html`<button type="button" class="primary" onClick=${() => segment(waiting, content.name)}>
        Segment ${waiting.length} images</button>`}
      <p class="problem" role="alert">${message}</p>
      ${content && html`<${VolumeList} list=${list} volumes=${content.volumes} selected=${item?.volume ?? ""}
        onChange=${() => load(list)} onShow=${(/** @type {string} */ id) => setSelected(content.items.find((/** @type {any} */ i) => i.volume === id)?.id ?? "")} />`}
      <ul class="list items">
        ${content?.items.map((/** @type {any} */ i) => html`<li><button type="button" aria-pressed=${i.id === selected} onClick=${() => setSelected(i.id)}>
          <strong>${i.name}</strong><span>${i.labels || i.newest ? i.decision : "not segmented"}${i.doubt === null ? "" : `, doubt ${i.doubt.toFixed(2)}`}</span>
        </button></li>`)}
      </ul>
    </aside>
    <section>
      ${item && html`<${Editor} key=${list} list=${list} item=${item} classes=${content.classes} layer=${layer} slices=${slices}
        onSlice=${(/** @type {any} */ i) => setSelected(i.id)} onChange=${(/** @type {any} */ i) => put(i, list)} />
        <div class="decisions"><${LayerChoice} layer=${layer} onLayer=${setLayer} /></div>`}
    </section>
    <aside>${item && html`<${Guides} bank=${content.bank} item=${item} />`}</aside>
  </div>`;
}

/** @param {{layer: string, onLayer: (layer: any) => void}} props */
export function LayerChoice({ layer, onLayer }) {
  return html`<label>Layer (D) <select value=${layer} onChange=${(/** @type {any} */ e) => {
    onLayer(e.target.value);
    e.target.blur(); // keys are for the page again
  }}>
    <option value="none">none</option>
    <option value="doubt">doubt: low confidence</option>
    <option value="disagreement">disagreement with a fresh answer</option>
  </select></label>`;
}

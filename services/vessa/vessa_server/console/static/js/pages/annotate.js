// @ts-check
/** Annotate: drop images or volumes, watch masks appear, correct one class at once. */

import { html, useEffect, useState } from "../../vendor/preact-htm.js";
import { get, send } from "../api.js";
import { Editor, Guides, segmentItem } from "../editor.js";
import { VolumeJobs } from "./volumes.js";
import { WorklistChooser, useWorklist } from "./worklist.js";

const PICTURE = /\.(png|jpe?g|tiff?)$/i;
const VOLUME = /(\.nii(\.gz)?|\.dcm)$/i;
const AT_ONCE = 2;

/**
 * Read the patient from a file name as data folders do: `<patient>_<slice>.png`.
 * @param {string} name @returns {string}
 */
export function groupOf(name) {
  const stem = name.replace(/\.[^.]+$/, "");
  const match = /^(.+?)(?:_frame\w+?)?_\d+$/.exec(stem);
  return match ? match[1] : stem;
}

/** @param {DataTransfer} transfer @returns {Promise<File[]>} all files, of folders too */
async function filesOf(transfer) {
  /** @param {any} entry @returns {Promise<File[]>} */
  const walk = async (entry) => {
    if (entry.isFile) return [await new Promise((done, fail) => entry.file(done, fail))];
    const reader = entry.createReader();
    const all = [];
    for (;;) {
      const part = await new Promise((done, fail) => reader.readEntries(done, fail));
      if (!part.length) return all;
      for (const child of part) all.push(...(await walk(child)));
    }
  };
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
  const found = await Promise.all(entries.map(walk));
  return found.flat();
}

export function AnnotatePage() {
  const [list, choose] = useWorklist();
  const [loaded, setContent] = useState(/** @type {any} */ (null));
  const [selected, setSelected] = useState("");
  const [message, setMessage] = useState("");
  const [progress, setProgress] = useState({ done: 0, total: 0, failed: /** @type {string[]} */ ([]) });
  const [volumes, setVolumes] = useState(/** @type {File[][]} */ ([]));

  useEffect(() => {
    if (!list) return undefined;
    let gone = false; // the answer of a worklist that was left meanwhile says nothing about this one
    setSelected("");
    get(`/worklists/${encodeURIComponent(list)}`).then(
      (c) => {
        if (gone) return;
        setContent(c);
        setSelected(c.items[0]?.id ?? "");
        setMessage("");
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

  /** @param {File[]} files @param {string} into the worklist whose images are shown */
  async function add(files, into) {
    const pictures = files.filter((f) => PICTURE.test(f.name));
    const scans = files.filter((f) => VOLUME.test(f.name));
    const others = files.length - pictures.length - scans.length;
    if (scans.length) {
      const series = scans.filter((f) => /\.dcm$/i.test(f.name));
      setVolumes((v) => [...v, ...scans.filter((f) => !/\.dcm$/i.test(f.name)).map((f) => [f]), ...(series.length ? [series] : [])]);
    }
    setMessage(others ? `${others} of ${files.length} files are neither pictures nor volumes and were left out.` : "");
    setProgress((p) => ({ ...p, total: p.total + pictures.length }));
    const waiting = pictures.slice();
    const work = async () => {
      for (let file = waiting.shift(); file; file = waiting.shift()) {
        const fields = new FormData();
        fields.set("image", file);
        fields.set("name", file.name);
        fields.set("group", groupOf(file.name));
        try {
          const path = `/worklists/${encodeURIComponent(into)}/items`;
          const item = await (await send("POST", path, { body: fields, accept: "application/json" })).json();
          put(item, into);
          setSelected((s) => s || item.id);
          put(await segmentItem(into, item.id), into);
          setProgress((p) => ({ ...p, done: p.done + 1 }));
        } catch (error) {
          const why = `${file.name}: ${/** @type {Error} */ (error).message}`;
          setProgress((p) => ({ ...p, done: p.done + 1, failed: [...p.failed, why] }));
        }
      }
    };
    await Promise.all(Array.from({ length: AT_ONCE }, work));
    const now = await get(`/worklists/${encodeURIComponent(into)}`);
    setContent((/** @type {any} */ c) => (c?.name === into ? now : c));
    setSelected((s) => s || (now.items[0]?.id ?? ""));
  }

  const content = loaded?.name === list ? loaded : null; // between two worklists nothing of the old one is shown
  const item = content?.items.find((/** @type {any} */ i) => i.id === selected);
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
        <label class="file">Files <input type="file" multiple accept=".png,.jpg,.jpeg,.tif,.tiff,.dcm,.nii,.gz"
          onChange=${(/** @type {any} */ e) => {
            add([...e.target.files], content.name);
            e.target.value = "";
          }} /></label>
      </div>`}
      ${progress.total > 0 && html`<p role="status">${progress.done} of ${progress.total} images segmented
        <progress value=${progress.done} max=${progress.total}></progress></p>`}
      ${progress.failed.length > 0 && html`<details open><summary>${progress.failed.length} failed</summary>
        <ul>${progress.failed.map((line) => html`<li>${line}</li>`)}</ul></details>`}
      <p class="problem" role="alert">${message}</p>
      <ul class="list items">
        ${content?.items.map((/** @type {any} */ i) => html`<li><button type="button" aria-pressed=${i.id === selected} onClick=${() => setSelected(i.id)}>
          <strong>${i.name}</strong><span>${i.labels || i.newest ? i.decision : "not segmented"}${i.doubt === null ? "" : `, doubt ${i.doubt.toFixed(2)}`}</span>
        </button></li>`)}
      </ul>
    </aside>
    <section>
      ${item && html`<${Editor} key=${item.id} list=${list} item=${item} classes=${content.classes} onChange=${(/** @type {any} */ i) => put(i, list)} />`}
      ${content && html`<${VolumeJobs} bank=${content.bank} uploads=${volumes} onTaken=${() => setVolumes([])} />`}
    </section>
    <aside>${item && html`<${Guides} bank=${content.bank} item=${item} />`}</aside>
  </div>`;
}

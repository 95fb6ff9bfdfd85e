// @ts-check
/** What an empty service offers: upload an annotated folder, draw the first masks, or load phantoms. */

import { html, useRef, useState } from "../../vendor/preact-htm.js";
import { post, send } from "../api.js";
import { groupOf, readDataFolder } from "../files.js";
import { TaskQueue } from "../tasks.js";
import { sendPicture } from "./annotate.js";

const AT_ONCE = 2;

/** @param {string} list open it on the page Annotate */
export function openWorklist(list) {
  sessionStorage.setItem("worklist", list);
  location.hash = "#annotate";
}

/**
 * Send a folder: annotated images become templates, the others a worklist.
 * @param {File[]} files @param {TaskQueue} queue @returns {Promise<{bank: string, templates: number, images: number}>}
 */
async function sendFolder(files, queue) {
  const folder = readDataFolder(files);
  if (!folder.annotated.length) {
    throw new Error("The folder has no annotated image: masks belong into masks/, with the names of the images in images/. Or draw the first mask.");
  }
  if (!folder.meta) throw new Error('The folder has no meta.json with the classes, such as {"classes": {"0": "background", "1": "ventricle"}}.');
  /** @type {Record<string, string>} */
  const classes = JSON.parse(await folder.meta.text()).classes;
  const named = JSON.stringify(Object.fromEntries(Object.entries(classes).filter(([id]) => id !== "0")));
  await queue.add(folder.annotated.map(({ image, mask }) => ({
    name: image.name,
    run: async (signal) => {
      const body = new FormData();
      body.set("bank", folder.name);
      body.set("group", groupOf(image.name));
      body.set("image", image);
      body.set("mask", mask);
      body.set("classes", named);
      await send("POST", "/templates", { body, signal });
    },
  })));
  if (folder.plain.length && !queue.progress.cancelled) {
    await post("/worklists", { name: folder.name, bank: folder.name });
    await queue.add(folder.plain.map((file) => ({
      name: file.name,
      run: async (signal) => {
        await sendPicture(folder.name, file, signal);
      },
    })));
  }
  return { bank: folder.name, templates: folder.annotated.length, images: folder.plain.length };
}

/** @param {{onDraw: () => void, onDone: (bank: string) => void}} props */
export function Start({ onDraw, onDone }) {
  const [message, setMessage] = useState("");
  const [busy, setBusy] = useState(false);
  const [progress, setProgress] = useState(/** @type {import("../tasks.js").Progress | null} */ (null));
  const queue = useRef(/** @type {TaskQueue | null} */ (null));
  queue.current ??= new TaskQueue(AT_ONCE, setProgress);

  /** @param {() => Promise<void>} work */
  async function attempt(work) {
    setBusy(true);
    setMessage("");
    try {
      await work();
    } catch (error) {
      setMessage(String(/** @type {Error} */ (error).message));
    } finally {
      setBusy(false);
    }
  }

  return html`<section class="start" aria-label="Begin">
    <h1>Begin with one annotated image</h1>
    <p>A bank holds annotated images, the templates. The annotator labels other images by them.</p>
    <div class="choices">
      <div class="card"><h2>Draw the first masks</h2>
        <p>Open a picture, a DICOM series or a NIfTI file and draw on it with brush, lasso and polygon.</p>
        <button type="button" class="primary" onClick=${onDraw}>Draw</button></div>
      <div class="card"><h2>Upload a folder</h2>
        <p>Pictures in <code>images/</code>, PNG masks of the same names in <code>masks/</code>, class names in
          <code>meta.json</code>. Images without a mask become a worklist.</p>
        <label class="file">Folder <input type="file" webkitdirectory multiple disabled=${busy} onChange=${(/** @type {any} */ e) => attempt(async () => {
          const { bank, templates, images } = await sendFolder([...e.target.files], /** @type {TaskQueue} */ (queue.current));
          const failed = queue.current?.progress.failed.length ?? 0;
          if (failed) return setMessage(`${failed} files failed; the others of ${templates} templates and ${images} images are in bank ${bank}.`);
          if (images) openWorklist(bank);
          else onDone(bank);
          return undefined;
        })} /></label>
        ${progress && html`<p role="status">${progress.done} of ${progress.total} files sent
          <progress value=${progress.done} max=${progress.total} aria-label="Progress"></progress>
          ${progress.running && html`<button type="button" class="small" onClick=${() => queue.current?.cancel()}>Cancel</button>`}</p>
          ${progress.failed.length > 0 && html`<ul>${progress.failed.map((line) => html`<li>${line}</li>`)}</ul>`}`}</div>
      <div class="card"><h2>Try it with phantoms</h2>
        <p>Five synthetic hearts: the first becomes the bank, the others a worklist of twelve images.</p>
        <button type="button" disabled=${busy} onClick=${() => attempt(async () => {
          const { name } = await post("/phantoms", {});
          openWorklist(name);
        })}>${busy ? "Working." : "Load phantoms"}</button></div>
    </div>
    <p class="problem" role="alert">${message}</p>
  </section>`;
}

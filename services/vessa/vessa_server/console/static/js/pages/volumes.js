// @ts-check
/** Volumes of a worklist: their jobs with progress and cancel, and a view in three planes and 3D. */

import { html, useEffect, useRef, useState } from "../../vendor/preact-htm.js";
import { ApiError, get, post, send } from "../api.js";
import { COLORS, classColor } from "../masks.js";

const POLL_MS = 1000;

/**
 * @param {{list: string, volumes: any[], selected: string, onChange: () => Promise<unknown>,
 *   onShow: (id: string) => void}} props
 */
export function VolumeList({ list, volumes, selected, onChange, onShow }) {
  const [shown, setShown] = useState("");
  const [removing, setRemoving] = useState("");
  if (!volumes.length) return null;
  const base = `/worklists/${encodeURIComponent(list)}/volumes`;
  return html`<section aria-label="Volumes">
    <h2>Volumes</h2>
    <ul class="list">${volumes.map((volume) => html`<li key=${volume.id}>
      <button type="button" aria-pressed=${volume.id === selected} onClick=${() => onShow(volume.id)}>
        <strong>${volume.name}</strong><span>${volume.slices} slices${volume.notes.length ? `. ${volume.notes.join(" ")}` : ""}</span></button>
      ${volume.id !== removing && html`<${VolumeJob} base=${`${base}/${volume.id}`} volume=${volume} onChange=${onChange} />`}
      <div class="row"><button type="button" class="small" onClick=${() => setShown(shown === volume.id ? "" : volume.id)}>
        ${shown === volume.id ? "Close 3D" : "Planes and 3D"}</button>
        <a href="${base}/${volume.id}/labels.nii" download="labels.nii">Labels</a>
        <button type="button" class="small danger" onClick=${async () => {
          if (!confirm(`Remove ${volume.name} with its ${volume.slices} slices and labels?`)) return;
          setRemoving(volume.id); // its job is not asked for any more
          await send("DELETE", `${base}/${volume.id}`);
          await onChange();
        }}>Remove</button></div>
    </li>`)}</ul>
    ${shown && html`<${VolumeView} key=${shown} base=${`${base}/${shown}`} onClose=${() => setShown("")} />`}
  </section>`;
}

/**
 * The job of one volume; when it is done, its labels go to the slices.
 * @param {{base: string, volume: any, onChange: () => Promise<unknown>}} props
 */
function VolumeJob({ base, volume, onChange }) {
  const [job, setJob] = useState(/** @type {any} */ (null));
  const [message, setMessage] = useState("");
  const cancelled = useRef("");
  useEffect(() => {
    let timer = 0;
    let gone = false;
    const poll = async () => {
      if (cancelled.current === volume.job) return;
      try {
        const info = await get(`/jobs/${volume.job}`);
        if (gone) return;
        setJob(info);
        if (info.state === "failed") setMessage(info.error);
        else if (info.state === "done") {
          const { kept } = await post(`${base}/labels`, {});
          setJob(null);
          setMessage(kept ? `${kept} slices keep the labels that were drawn or decided.` : "");
          await onChange();
        } else timer = setTimeout(poll, POLL_MS);
      } catch (error) {
        if (gone) return;
        setJob(null);
        // An unknown job was cancelled, or its labels were taken by another page.
        if (!(error instanceof ApiError && error.code === "unknown_job")) setMessage(String(/** @type {Error} */ (error).message));
      }
    };
    if (volume.job) poll();
    return () => {
      gone = true;
      clearTimeout(timer);
    };
  }, [volume.job]);

  const running = job && (job.state === "queued" || job.state === "running");
  return html`<div class="row">
    ${running
      ? html`<progress value=${job.done} max=${job.slices} aria-label="Slices done"></progress> ${job.done} of ${job.slices} slices
        <button type="button" class="small" onClick=${async () => {
          cancelled.current = job.id;
          await send("DELETE", `/jobs/${job.id}`).catch(() => undefined); // it may have ended meanwhile
          setJob(null);
          setMessage("Cancelled.");
        }}>Cancel</button>`
      : html`<button type="button" class="small" onClick=${async () => {
          try {
            setJob(await post(`${base}/job`, {}));
            setMessage("");
            await onChange();
          } catch (error) {
            setMessage(String(/** @type {Error} */ (error).message));
          }
        }}>Segment</button>`}
    <span role="status">${message}</span>
  </div>`;
}

/** Tables of our class colors as NiiVue reads them. */
function colorTable() {
  const count = 7 * COLORS.length;
  const colors = Array.from({ length: count }, (_, i) => classColor(i + 1));
  const [R, G, B] = [0, 1, 2].map((c) => [0, ...colors.map((color) => color[c])]);
  return { R, G, B, A: [0, ...colors.map(() => 255)], labels: ["", ...colors.map((_, i) => `class ${i + 1}`)] };
}

/** @param {{base: string, onClose: () => void}} props */
function VolumeView({ base, onClose }) {
  const ref = useRef(null);
  const dialog = useRef(/** @type {any} */ (null));
  const [message, setMessage] = useState("Loading the viewer.");
  useEffect(() => {
    dialog.current.showModal();
    /** @type {string[]} */
    const urls = [];
    (async () => {
      try {
        // @ts-ignore: loaded only when a volume is opened; it is 3 MB
        const { Niivue } = await import("../../vendor/niivue.js");
        const viewer = new Niivue({ isResizeCanvas: true, show3Dcrosshair: true, multiplanarShowRender: 1, isRadiologicalConvention: true });
        await viewer.attachToCanvas(ref.current);
        const files = await Promise.all(["image.nii", "labels.nii"].map(async (name) => (await send("GET", `${base}/${name}`)).blob()));
        urls.push(...files.map((file) => URL.createObjectURL(file)));
        await viewer.loadVolumes([
          { url: urls[0], name: "image.nii" },
          { url: urls[1], name: "labels.nii", opacity: 0.5 },
        ]);
        viewer.volumes[1].setColormapLabel(colorTable());
        viewer.updateGLVolume();
        viewer.setSliceType(viewer.sliceTypeMultiplanar);
        setMessage("");
      } catch (error) {
        setMessage(`The volume cannot be shown here: ${/** @type {Error} */ (error).message} Download the labels instead.`);
      }
    })();
    return () => urls.forEach((url) => URL.revokeObjectURL(url));
  }, []);
  return html`<dialog ref=${dialog} class="volume" aria-label="Volume in three planes and 3D" onClose=${onClose}>
    <div class="row"><p role="status">${message}</p><button type="button" onClick=${() => dialog.current.close()}>Close</button></div>
    <div class="planes"><canvas ref=${ref} aria-label="Volume in three planes and 3D" role="img"></canvas></div>
  </dialog>`;
}

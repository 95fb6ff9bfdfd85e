// @ts-check
/** Volumes: one job each, with progress, cancel, download, and a view in three planes and 3D. */

import { html, useEffect, useRef, useState } from "../../vendor/preact-htm.js";
import { get, send } from "../api.js";

/**
 * @param {{bank: string, uploads: File[][], onTaken: () => void}} props
 */
export function VolumeJobs({ bank, uploads, onTaken }) {
  const [jobs, setJobs] = useState(/** @type {any[]} */ ([]));
  const [shown, setShown] = useState(/** @type {any} */ (null));

  /** @param {any} job @param {any} change */
  const put = (job, change) => setJobs((all) => all.map((j) => (j.key === job.key ? { ...j, ...change } : j)));

  useEffect(() => {
    for (const files of uploads) {
      const job = { key: crypto.randomUUID(), name: files.length > 1 ? `${files.length} DICOM files` : files[0].name, files, state: "sending" };
      setJobs((all) => [...all, job]);
      run(job);
    }
    if (uploads.length) onTaken();
  }, [uploads]);

  /** @param {any} job */
  async function run(job) {
    const fields = new FormData();
    for (const file of job.files) fields.append("image", file);
    fields.set("bank", bank);
    fields.set("result", "nifti");
    try {
      let info = await (await send("POST", "/jobs", { body: fields, accept: "application/json" })).json();
      while (info.state === "queued" || info.state === "running") {
        put(job, { ...info, name: job.name });
        await new Promise((done) => setTimeout(done, 1000));
        info = await get(`/jobs/${info.id}`);
      }
      put(job, { ...info, name: job.name });
    } catch (error) {
      put(job, { state: "failed", error: /** @type {Error} */ (error).message });
    }
  }

  if (!jobs.length) return null;
  return html`<section class="card">
    <h2>Volumes</h2>
    <ul class="list">${jobs.map((job) => html`<li class="row">
      <strong>${job.name}</strong>
      <span>${job.state}${job.error ? `: ${job.error}` : ""}</span>
      ${job.slices && html`<progress value=${job.done} max=${job.slices} aria-label="Slices done"></progress> ${job.done} of ${job.slices} slices`}
      ${job.state === "done" && html`<a href="/jobs/${job.id}/result" download>Download labels</a>
        ${job.files.length === 1 && /\.nii(\.gz)?$/i.test(job.files[0].name) && html`<button type="button" onClick=${() => setShown(job)}>View</button>`}`}
      ${(job.state === "queued" || job.state === "running") && html`<button type="button" onClick=${async () => {
        await send("DELETE", `/jobs/${job.id}`).catch(() => undefined); // it may have ended meanwhile
        put(job, { state: "failed", error: "cancelled" });
      }}>Cancel</button>`}
    </li>`)}</ul>
    ${shown && html`<${VolumeView} job=${shown} />`}
  </section>`;
}

/** @param {{job: any}} props */
function VolumeView({ job }) {
  const ref = useRef(null);
  const [message, setMessage] = useState("Loading the viewer.");
  useEffect(() => {
    /** @type {string[]} */
    const urls = [];
    (async () => {
      try {
        // @ts-ignore: loaded only when a volume is opened; it is 3 MB
        const { Niivue } = await import("../../vendor/niivue.js");
        const viewer = new Niivue({ isResizeCanvas: true, show3Dcrosshair: true });
        await viewer.attachToCanvas(ref.current);
        const labels = await (await send("GET", `/jobs/${job.id}/result`)).blob();
        urls.push(URL.createObjectURL(job.files[0]), URL.createObjectURL(labels));
        await viewer.loadVolumes([
          { url: urls[0], name: job.files[0].name },
          { url: urls[1], name: "labels.nii.gz", colormap: "actc", opacity: 0.5 },
        ]);
        viewer.setSliceType(viewer.sliceTypeMultiplanar);
        setMessage("");
      } catch (error) {
        setMessage(`The volume cannot be shown here: ${/** @type {Error} */ (error).message} Download the labels instead.`);
      }
    })();
    return () => urls.forEach((url) => URL.revokeObjectURL(url));
  }, [job.key]);
  return html`<div class="volume"><p role="status">${message}</p><canvas ref=${ref} aria-label="Volume ${job.name} in three planes and 3D" role="img"></canvas></div>`;
}

// @ts-check
/** Bank: templates as thumbnails, adding by upload or by drawing, removing, sharing, adaptation. */

import { html, useEffect, useRef, useState } from "../../vendor/preact-htm.js";
import { get, send } from "../api.js";
import { swatch } from "../classes.js";
import { classLines, readClasses } from "../class_names.js";
import { DrawTemplate } from "./draw.js";
import { Start } from "./start.js";

/** @param {{session: any}} props */
export function BankPage({ session }) {
  const [banks, setBanks] = useState(/** @type {any[] | null} */ (null));
  const [chosen, setChosen] = useState("");
  const [message, setMessage] = useState("");
  const [drawing, setDrawing] = useState(false);
  const mayCurate = session.role !== "annotate";

  /** @param {string} [choose] */
  async function load(choose) {
    try {
      const found = await get("/banks");
      setBanks(found);
      setChosen(choose ?? (found.some((/** @type {any} */ b) => b.name === chosen) ? chosen : (found[0]?.name ?? "")));
      setMessage("");
    } catch (error) {
      setMessage(String(/** @type {Error} */ (error).message));
    }
  }
  useEffect(() => {
    load();
  }, []);

  if (banks === null) return html`<p role="status">${message || "Loading the banks."}</p>`;
  if (!banks.length && !drawing && mayCurate) return html`<${Start} onDraw=${() => setDrawing(true)} onDone=${load} />`;
  const bank = banks.find((b) => b.name === chosen);
  return html`<div class="columns">
    <aside>
      <h1>Template banks</h1>
      <ul class="list">
        ${banks.map((b) => html`<li><button type="button" aria-pressed=${b.name === chosen} onClick=${() => setChosen(b.name)}>
          <strong>${b.name}</strong><span>${b.templates} templates, ${b.groups.length} patients${b.shared ? ", shared" : ""}</span>
        </button></li>`)}
      </ul>
      ${!banks.length && html`<p>No bank yet. ${mayCurate
        ? html`<button type="button" onClick=${() => setDrawing(false)}>Other ways to begin</button>`
        : "A key of the role curate makes one."}</p>`}
      <p class="problem" role="alert">${message}</p>
    </aside>
    <section>
      ${bank && html`<${Templates} key=${bank.name} bank=${bank} mayCurate=${mayCurate} onChange=${load} />`}
      ${mayCurate && html`<${AddTemplate} bank=${bank} onDone=${load} />`}
    </section>
  </div>`;
}

/** @param {{bank: any, mayCurate: boolean, onChange: (name?: string) => void}} props */
function Templates({ bank, mayCurate, onChange }) {
  const [templates, setTemplates] = useState(/** @type {any[]} */ ([]));
  const [adaptation, setAdaptation] = useState(/** @type {any} */ (null));
  const [message, setMessage] = useState("");
  const path = `/banks/${encodeURIComponent(bank.name)}`;
  useEffect(() => {
    get(`/templates?bank=${encodeURIComponent(bank.name)}`).then(setTemplates, (e) => setMessage(e.message));
  }, [bank.name, bank.version]);
  useEffect(() => {
    let timer = 0;
    const poll = async () => {
      try {
        const info = await get(`${path}/adapt`);
        setAdaptation(info);
        if (info.state === "running") timer = setTimeout(poll, 1500);
      } catch (error) {
        setMessage(String(/** @type {Error} */ (error).message));
      }
    };
    poll();
    return () => clearTimeout(timer);
  }, [bank.name, adaptation?.started]);

  /** @param {() => Promise<any>} work */
  async function change(work) {
    try {
      await work();
      onChange(bank.name);
    } catch (error) {
      setMessage(String(/** @type {Error} */ (error).message));
    }
  }
  return html`<section>
    <header class="row">
      <h2>${bank.name}</h2>
      <span>${Object.entries(bank.classes).map(([id, name]) => html`<span class="class-name"><span class="swatch" style=${swatch(Number(id))}></span>${name}</span>`)}</span>
      ${mayCurate && html`<button type="button" onClick=${() => change(() => send(bank.shared ? "DELETE" : "PUT", `${path}/share`))}>
          ${bank.shared ? "Stop sharing" : "Share with all keys"}</button>
        <button type="button" disabled=${adaptation?.state === "running"} onClick=${async () => {
          try {
            const info = await (await send("POST", `${path}/adapt`)).json();
            setAdaptation({ ...info, started: Date.now() });
          } catch (error) {
            setMessage(String(/** @type {Error} */ (error).message));
          }
        }}>Adapt</button>
        <button type="button" class="danger" onClick=${() => {
          if (confirm(`Delete bank ${bank.name} with ${bank.templates} templates?`)) change(() => send("DELETE", path));
        }}>Delete bank</button>`}
    </header>
    ${adaptation?.state === "running" && html`<p role="status">Adapting: <progress value=${adaptation.progress} max="1" aria-label="Adaptation"></progress>
      ${mayCurate && html`<button type="button" class="small" onClick=${async () => {
        await send("DELETE", `${path}/adapt`).catch((e) => setMessage(e.message));
        setAdaptation({ state: "none", started: Date.now() });
      }}>Cancel</button>`}</p>`}
    ${adaptation?.figures && html`<p>Adaptation: held-out Dice ${adaptation.figures.before.toFixed(3)} before,
      ${adaptation.figures.after.toFixed(3)} after; ${adaptation.figures.kept ? "kept" : "not kept"}.</p>`}
    ${adaptation?.error && html`<p class="problem">The last adaptation failed: ${adaptation.error}</p>`}
    <p class="problem" role="alert">${message}</p>
    <div class="thumbs">
      ${templates.map((t) => html`<figure>
        <img src="/templates/${t.id}/overlay.png?bank=${encodeURIComponent(bank.name)}" alt="Template of ${t.group}: ${Object.values(t.classes).join(", ")}" loading="lazy" />
        <figcaption>${t.group}${mayCurate && html` <button type="button" class="small danger" aria-label="Remove template of ${t.group}"
          onClick=${() => change(() => send("DELETE", `/templates/${t.id}?bank=${encodeURIComponent(bank.name)}`))}>Remove</button>`}</figcaption>
      </figure>`)}
    </div>
  </section>`;
}

/** @param {{bank: any, onDone: (name: string) => void}} props */
function AddTemplate({ bank, onDone }) {
  const [mode, setMode] = useState("draw");
  const [message, setMessage] = useState("");
  const form = useRef(/** @type {HTMLFormElement | null} */ (null));
  const classes = bank ? classLines(bank.classes) : "1: structure";
  return html`<section class="card">
    <h2>Add a template</h2>
    <div role="group" aria-label="How to add">
      <button type="button" aria-pressed=${mode === "draw"} onClick=${() => setMode("draw")}>Draw the mask</button>
      <button type="button" aria-pressed=${mode === "upload"} onClick=${() => setMode("upload")}>Upload image and mask</button>
    </div>
    ${mode === "draw"
      ? html`<${DrawTemplate} bank=${bank} onDone=${onDone} />`
      : html`<form ref=${form} onSubmit=${async (/** @type {any} */ event) => {
          event.preventDefault();
          const fields = new FormData(event.target);
          try {
            fields.set("classes", JSON.stringify(readClasses(String(fields.get("classes")))));
            await send("POST", "/templates", { body: fields });
            setMessage("");
            form.current?.reset();
            onDone(String(fields.get("bank")));
          } catch (error) {
            setMessage(String(/** @type {Error} */ (error).message));
          }
        }}>
        <label>Bank <input name="bank" required defaultValue=${bank?.name ?? "default"} pattern="[A-Za-z0-9][A-Za-z0-9._\\-]*" /></label>
        <label>Patient <input name="group" required placeholder="patient001" /></label>
        <label>Image <input name="image" type="file" required accept=".png,.jpg,.jpeg,.tif,.tiff,.dcm" /></label>
        <label>Mask (PNG, values are class ids) <input name="mask" type="file" required accept=".png" /></label>
        <label>Classes, one a line <textarea name="classes" rows="3" required>${classes}</textarea></label>
        <button class="primary">Add template</button>
        <p class="problem" role="alert">${message}</p>
      </form>`}
  </section>`;
}

// @ts-check
/** Training: runs of the folder that the operator allowed, their curves and reports. */

import { html, useEffect, useRef, useState } from "../../vendor/preact-htm.js";
import uPlot from "../../vendor/uPlot.js";
import { get } from "../api.js";
import { flatten, scoreTable } from "../scores.js";
import { Table } from "../table.js";

const HUES = ["#2a6f97", "#c1121f", "#588157", "#9d4edd", "#e07a5f", "#3d405b"];
const POLL_MS = 5000;

export function TrainingPage() {
  const [runs, setRuns] = useState(/** @type {any[] | null} */ (null));
  const [chosen, setChosen] = useState("");
  const [message, setMessage] = useState("");
  useEffect(() => {
    let timer = 0;
    const poll = async () => {
      try {
        const found = await get("/runs");
        setRuns(found);
        setChosen((c) => (found.some((/** @type {any} */ r) => r.name === c) ? c : (found[0]?.name ?? "")));
        if (found.some((/** @type {any} */ r) => r.state === "running")) timer = setTimeout(poll, POLL_MS);
      } catch (error) {
        setMessage(String(/** @type {Error} */ (error).message));
      }
    };
    poll();
    return () => clearTimeout(timer);
  }, []);
  if (runs === null) return html`<p role="status">${message || "Loading the runs."}</p>`;
  const run = runs.find((r) => r.name === chosen);
  return html`<div class="columns">
    <aside>
      <h1>Training</h1>
      <ul class="list">${runs.map((r) => html`<li><button type="button" aria-pressed=${r.name === chosen} onClick=${() => setChosen(r.name)}>
        <strong>${r.name}</strong><span>${r.state}${r.step === null ? "" : `, step ${r.step}`}</span></button></li>`)}</ul>
      ${!runs.length && html`<p>No runs. Set <code>VESSA_RUNS_FOLDER</code> to the folder of your runs and restart the service.
        Training itself is started by <code>vessa-trainer fit</code>.</p>`}
    </aside>
    <section>${run && html`<${Run} key=${run.name} run=${run} />`}</section>
  </div>`;
}

/** @param {{run: any}} props */
function Run({ run }) {
  const [rows, setRows] = useState(/** @type {any[]} */ ([]));
  const [message, setMessage] = useState("");
  const report = `/runs/${encodeURIComponent(run.name)}/report.html`;
  useEffect(() => {
    let timer = 0;
    const poll = async () => {
      try {
        const found = await get(`/runs/${encodeURIComponent(run.name)}/metrics`);
        setRows(found.map((/** @type {any} */ row) => flatten(row)));
        setMessage("");
      } catch (error) {
        setMessage(String(/** @type {Error} */ (error).message));
      }
      if (run.state === "running") timer = setTimeout(poll, POLL_MS);
    };
    poll();
    return () => clearTimeout(timer);
  }, [run.name, run.state]);
  const names = [...new Set(rows.flatMap((r) => Object.keys(r)))].filter((n) => rows.some((r) => typeof r[n] === "number") && n !== "step");
  const dice = names.filter((n) => /^val_\w+ mean dice$|^feed label_dice$/.test(n)).slice(0, 6);
  const losses = names.filter((n) => /^loss/.test(n)).slice(0, 6);
  const table = scoreTable(run.summary);
  return html`<section>
    <h2>${run.name}</h2>
    <p>${run.state}${run.step === null ? "" : `, step ${run.step}`}${run.has_report && html`, <a href=${report} target="_blank" rel="noreferrer">report on a page of its own</a>`}</p>
    <p class="problem" role="alert">${message}</p>
    ${dice.length > 0 && html`<${Curves} title="Dice" names=${dice} rows=${rows} />`}
    ${losses.length > 0 && html`<${Curves} title="Loss" names=${losses} rows=${rows} />`}
    ${table && html`<h3>Scores</h3><${Table} head=${table.head} rows=${table.rows} />`}
    ${run.has_report && html`<h3>Report with the worst cases</h3><iframe class="report" src=${report} title="Report of ${run.name}" sandbox="allow-scripts"></iframe>`}
  </section>`;
}

/** @param {{title: string, names: string[], rows: any[]}} props */
function Curves({ title, names, rows }) {
  const ref = useRef(/** @type {HTMLElement | null} */ (null));
  useEffect(() => {
    if (!ref.current) return undefined;
    const used = rows.filter((r) => typeof r.step === "number" && names.some((n) => typeof r[n] === "number"));
    const data = [used.map((r) => r.step), ...names.map((n) => used.map((r) => (typeof r[n] === "number" ? r[n] : null)))];
    const ink = getComputedStyle(document.documentElement).getPropertyValue("--ink");
    const plot = new uPlot(
      {
        title, width: ref.current.clientWidth || 700, height: 260, scales: { x: { time: false } },
        axes: [{ stroke: ink, label: "step" }, { stroke: ink }],
        series: [{ label: "step" }, ...names.map((label, i) => ({ label, stroke: HUES[i], spanGaps: true, width: 2 }))],
      },
      /** @type {any} */ (data),
      ref.current,
    );
    return () => plot.destroy();
  }, [rows.length, names.join()]);
  return html`<div ref=${ref} class="plot" role="img" aria-label="${title} by step: ${names.join(", ")}"></div>`;
}

// @ts-check
/** Choose or make a worklist; Annotate and Review share it. */

import { html, useEffect, useRef, useState } from "../../vendor/preact-htm.js";
import { get, post } from "../api.js";

/**
 * @param {{chosen: string, onChoose: (name: string) => void}} props
 */
export function WorklistChooser({ chosen, onChoose }) {
  const [lists, setLists] = useState(/** @type {any[]} */ ([]));
  const [banks, setBanks] = useState(/** @type {any[]} */ ([]));
  const [message, setMessage] = useState("");
  const [naming, setNaming] = useState(false);

  const latest = useRef(chosen);
  latest.current = chosen;

  async function load() {
    try {
      const [found, known] = await Promise.all([get("/worklists"), get("/banks")]);
      setLists(found);
      setBanks(known);
      if (!latest.current && found.length) onChoose(found[0].name);
    } catch (error) {
      setMessage(String(/** @type {Error} */ (error).message));
    }
  }
  useEffect(() => {
    load();
  }, [chosen]);

  return html`<div class="chooser">
    ${lists.length > 0 && html`<label>Worklist
      <select value=${chosen} onChange=${(/** @type {any} */ e) => onChoose(e.target.value)}>
        ${lists.map((l) => html`<option value=${l.name}>${l.name}, bank ${l.bank}</option>`)}
      </select></label>`}
    ${(naming || !lists.length) && banks.length > 0
      ? html`<form class="inline" onSubmit=${async (/** @type {any} */ event) => {
          event.preventDefault();
          const { name, bank } = event.target.elements;
          try {
            const made = await post("/worklists", { name: name.value, bank: bank.value });
            setNaming(false);
            setMessage("");
            onChoose(made.name);
          } catch (error) {
            setMessage(String(/** @type {Error} */ (error).message));
          }
        }}>
        <label>New worklist <input name="name" required defaultValue="work-${new Date().toISOString().slice(0, 10)}" pattern="[A-Za-z0-9][A-Za-z0-9._\\-]*" /></label>
        <label>Bank <select name="bank">${banks.map((b) => html`<option value=${b.name}>${b.name}</option>`)}</select></label>
        <button class="primary">Create</button>
      </form>`
      : lists.length > 0 && html`<button type="button" onClick=${() => setNaming(true)}>New worklist</button>`}
    ${!banks.length && !message && html`<p>Add a template on the page <a href="#bank">Bank</a> first: the annotator labels other images by it.</p>`}
    <p class="problem" role="alert">${message}</p>
  </div>`;
}

/** The worklist chosen last, kept for this browser tab. @returns {[string, (name: string) => void]} */
export function useWorklist() {
  const [name, setName] = useState(sessionStorage.getItem("worklist") ?? "");
  return [name, (next) => {
    sessionStorage.setItem("worklist", next);
    setName(next);
  }];
}

// @ts-check
/** Requests about one item of a worklist, and the layers that are shown over it. */

import { get, grayPixels, post, send } from "./api.js";

/** @typedef {import("./masks.js").LabelMap} LabelMap */
/** @typedef {import("./masks.js").Point} Point */
/** @typedef {"none" | "doubt" | "disagreement"} Layer */

/** @type {Layer[]} in the order in which one key goes through them */
export const LAYERS = ["none", "doubt", "disagreement"];
const DIFFERENT = 60; // confidence that a differing pixel is drawn with

/** @param {string} list @param {string} id @returns {string} */
export function itemPath(list, id) {
  return `/worklists/${encodeURIComponent(list)}/items/${id}`;
}

/**
 * Segment an item and keep the answer.
 * @param {string} list @param {string} id @param {AbortSignal} [signal] @returns {Promise<any>} the item
 */
export async function segmentItem(list, id, signal) {
  await send("POST", `${itemPath(list, id)}/segment`, { json: {}, signal });
  return get(itemPath(list, id));
}

/** @param {string} list @param {string} id @param {string} decision @param {boolean} [bank] */
export async function decide(list, id, decision, bank = false) {
  return post(`${itemPath(list, id)}/decision`, { decision, add_to_bank: bank });
}

/**
 * The body that asks to correct one class by points and a box.
 * @param {string} name @param {{at: Point, inside: boolean}[]} points @param {[Point, Point] | null} box
 * @param {{width: number, height: number}} size px of the image
 */
export function promptBody(name, points, box, size) {
  /** @type {any} */
  const body = { classes: [name] };
  if (points.length) {
    body.points = { [name]: points.map((p) => p.at) };
    body.point_labels = { [name]: points.map((p) => (p.inside ? 1 : 0)) };
  }
  if (box) {
    const [a, b] = box;
    const clip = (/** @type {number} */ v, /** @type {number} */ most) => Math.min(most, Math.max(0, v));
    body.boxes = {
      [name]: [
        clip(Math.min(a[0], b[0]), size.width), clip(Math.min(a[1], b[1]), size.height),
        clip(Math.max(a[0], b[0]), size.width), clip(Math.max(a[1], b[1]), size.height),
      ],
    };
  }
  return body;
}

/**
 * Where the fresh answer of the annotator differs from labels, as a confidence: low where they differ.
 * @param {Uint8Array} labels @param {Uint8Array} fresh @returns {Uint8Array}
 */
export function disagreement(labels, fresh) {
  return labels.map((value, place) => (value === fresh[place] ? 255 : DIFFERENT));
}

/**
 * Fetch a layer: the confidence of the annotator, or its disagreement with the labels that are shown.
 * @param {string} list @param {string} id @param {Layer} layer @param {LabelMap} labels
 * @returns {Promise<Uint8Array | null>}
 */
export async function fetchLayer(list, id, layer, labels) {
  if (layer === "none") return null;
  const kind = layer === "doubt" ? "confidence" : "labels";
  const answer = await send("POST", `${itemPath(list, id)}/segment?keep=false&layer=${kind}`, { json: {} });
  const { values } = await grayPixels(await answer.blob());
  return layer === "doubt" ? values : disagreement(labels.values, values);
}

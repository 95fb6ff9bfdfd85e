// @ts-check
/** Slices of a picture or volume as the service decodes them, to draw on. */

import { send } from "./api.js";
import { grayPng } from "./png.js";

/** @typedef {{count: number, width: number, height: number, channels: number, pixels: Uint8Array}} Slices */

/**
 * Have the service decode files: PNG, JPEG, TIFF, NIfTI, DICOM.
 * @param {File[]} files @returns {Promise<Slices>}
 */
export async function decodeSlices(files) {
  const body = new FormData();
  for (const file of files) body.append("image", file);
  const answer = await send("POST", "/slices", { body });
  const [count, height, width, channels = 1] = (answer.headers.get("X-Shape") ?? "").split(",").map(Number);
  return { count, width, height, channels, pixels: new Uint8Array(await answer.arrayBuffer()) };
}

/** @param {Slices} slices @param {number} index @returns {Uint8Array} the values of one slice */
function valuesOf(slices, index) {
  const size = slices.width * slices.height * slices.channels;
  return slices.pixels.subarray(index * size, (index + 1) * size);
}

/** @param {Slices} slices @param {number} index @returns {ImageData} */
export function imageData(slices, index) {
  const values = valuesOf(slices, index);
  const data = new ImageData(slices.width, slices.height);
  for (let i = 0; i < slices.width * slices.height; i++) {
    for (let c = 0; c < 3; c++) data.data[4 * i + c] = values[slices.channels === 1 ? i : 3 * i + c];
    data.data[4 * i + 3] = 255;
  }
  return data;
}

/** @param {Slices} slices @param {number} index @returns {Promise<Blob>} one slice as PNG, without loss */
export async function slicePng(slices, index) {
  if (slices.channels === 1) return grayPng({ width: slices.width, height: slices.height, values: valuesOf(slices, index) });
  const canvas = new OffscreenCanvas(slices.width, slices.height);
  /** @type {OffscreenCanvasRenderingContext2D} */ (canvas.getContext("2d")).putImageData(imageData(slices, index), 0, 0);
  return canvas.convertToBlob({ type: "image/png" });
}

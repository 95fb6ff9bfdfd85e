// @ts-check
/** Requests to the service: the session's cookie goes along by itself, its CSRF token here. */

/** @typedef {{key: string, role: string, csrf: string}} Session */

/** @type {Session | null} */
let session = null;

/** An error answer of the service, with its stable code. */
export class ApiError extends Error {
  /** @param {number} status @param {string} code @param {string} message */
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

const TRIES = 5;
const LONGEST_WAIT_S = 60;

/**
 * How long to wait before a refused request is sent again: it was refused before any work was done.
 * @param {number} status @param {string} code @param {string | null} retryAfter s
 * @returns {number} s, 0 for an error that goes to the person
 */
export function waitBeforeRetry(status, code, retryAfter) {
  const refused = status === 429 || code === "queue_full" || code === "not_ready";
  const seconds = Number(retryAfter);
  return refused && seconds > 0 && seconds <= LONGEST_WAIT_S ? seconds : 0;
}

/** @returns {Session | null} who is signed in */
export function currentSession() {
  return session;
}

/**
 * Send one request and raise ApiError for an error answer. A request that a limit refuses is sent again.
 * @param {string} method
 * @param {string} path
 * @param {{json?: unknown, body?: BodyInit, accept?: string, signal?: AbortSignal}} [options]
 * @returns {Promise<Response>}
 */
export async function send(method, path, options = {}) {
  /** @type {Record<string, string>} */
  const headers = { Accept: options.accept ?? "*/*" };
  let body = options.body;
  if (options.json !== undefined) {
    headers["Content-Type"] = "application/json";
    body = JSON.stringify(options.json);
  }
  if (method !== "GET" && session) headers["X-CSRF-Token"] = session.csrf;
  for (let left = TRIES; ; left--) {
    let response;
    try {
      response = await fetch(path, { method, headers, body, signal: options.signal });
    } catch (error) {
      if (error instanceof DOMException && error.name === "AbortError") throw error;
      throw new ApiError(0, "unreachable", "The service does not answer. Check that it runs, then try again.");
    }
    if (response.ok) return response;
    let code = "internal";
    let message = `The service answered with status ${response.status}.`;
    try {
      const answer = (await response.json()).error;
      code = answer.code;
      message = answer.message;
    } catch {
      // an answer of a proxy in between: its status is all that is known
    }
    const seconds = left > 0 ? waitBeforeRetry(response.status, code, response.headers.get("Retry-After")) : 0;
    if (!seconds) {
      if (response.status === 401) session = null;
      throw new ApiError(response.status, code, message);
    }
    await new Promise((done) => setTimeout(done, 1000 * seconds));
    options.signal?.throwIfAborted();
  }
}

/** @param {string} path @returns {Promise<any>} */
export async function get(path) {
  return (await send("GET", path, { accept: "application/json" })).json();
}

/** @param {string} path @param {unknown} json @returns {Promise<any>} */
export async function post(path, json) {
  const response = await send("POST", path, { json, accept: "application/json" });
  return response.status === 204 ? null : response.json();
}

/**
 * Open a session by a key or by the one-time link of `vessa-server serve`.
 * @param {{key?: string, link?: string}} how
 */
export async function signIn(how) {
  session = await post("/session", how);
  return session;
}

/** Take up the session of an earlier page load. @returns {Promise<Session | null>} */
export async function resume() {
  try {
    session = await get("/session");
  } catch (error) {
    if (!(error instanceof ApiError) || error.status !== 401) throw error;
    session = null;
  }
  return session;
}

/** End the session. */
export async function signOut() {
  await send("DELETE", "/session");
  session = null;
}

/**
 * Decode a gray PNG into its byte values.
 * @param {Blob} blob
 * @returns {Promise<{width: number, height: number, values: Uint8Array}>}
 */
export async function grayPixels(blob) {
  // no color management: the values are class ids, not colors
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = /** @type {OffscreenCanvasRenderingContext2D} */ (canvas.getContext("2d", { willReadFrequently: true }));
  context.drawImage(bitmap, 0, 0);
  const rgba = context.getImageData(0, 0, bitmap.width, bitmap.height).data;
  const values = new Uint8Array(bitmap.width * bitmap.height);
  for (let i = 0; i < values.length; i++) values[i] = rgba[4 * i];
  return { width: bitmap.width, height: bitmap.height, values };
}

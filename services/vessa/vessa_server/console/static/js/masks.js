// @ts-check
/** Edit label maps: brush, polygon, flood fill, merging one class, undo. Pure functions on Uint8Array (H x W). */

/** @typedef {{width: number, height: number, values: Uint8Array}} LabelMap */
/** @typedef {[number, number]} Point (x, y) in px of the image */

/** Okabe and Ito's colors, as in vessa.colors; a test holds the two together. */
export const COLORS = [
  [0, 158, 115],
  [230, 159, 0],
  [86, 180, 233],
  [213, 94, 0],
  [204, 121, 167],
  [240, 228, 66],
  [0, 114, 178],
];
const DARKER = 0.65; // factor for each further round through the colors

/** @param {number} classId @returns {number[]} RGB, the same as in every picture of the project */
export function classColor(classId) {
  const round = Math.floor((classId - 1) / COLORS.length);
  return COLORS[(classId - 1) % COLORS.length].map((channel) => Math.round(channel * DARKER ** round));
}

/**
 * Paint a disk along a line with a class id; id 0 erases. With `only`, other classes are left alone when erasing.
 * @param {LabelMap} map @param {Point} from @param {Point} to @param {number} radius px @param {number} id
 * @param {number} [only] erase this class alone
 */
export function paintLine(map, from, to, radius, id, only = 0) {
  const steps = Math.max(1, Math.ceil(Math.hypot(to[0] - from[0], to[1] - from[1]) / Math.max(0.5, radius / 2)));
  for (let s = 0; s <= steps; s++) {
    const x = from[0] + ((to[0] - from[0]) * s) / steps;
    const y = from[1] + ((to[1] - from[1]) * s) / steps;
    paintDisk(map, [x, y], radius, id, only);
  }
}

/** @param {LabelMap} map @param {Point} at @param {number} radius @param {number} id @param {number} [only] */
export function paintDisk(map, at, radius, id, only = 0) {
  const [cx, cy] = at;
  const y0 = Math.max(0, Math.floor(cy - radius));
  const y1 = Math.min(map.height - 1, Math.ceil(cy + radius));
  const x0 = Math.max(0, Math.floor(cx - radius));
  const x1 = Math.min(map.width - 1, Math.ceil(cx + radius));
  for (let y = y0; y <= y1; y++) {
    for (let x = x0; x <= x1; x++) {
      const inside = (x + 0.5 - cx) ** 2 + (y + 0.5 - cy) ** 2 <= Math.max(radius, 0.5) ** 2;
      const place = y * map.width + x;
      if (inside && (!only || map.values[place] === only)) map.values[place] = id;
    }
  }
}

/**
 * Fill a polygon by the even-odd rule; pixel centers decide.
 * @param {LabelMap} map @param {Point[]} points @param {number} id
 */
export function fillPolygon(map, points, id) {
  if (points.length < 3) return;
  for (let y = 0; y < map.height; y++) {
    const at = y + 0.5;
    const crossings = [];
    for (let i = 0; i < points.length; i++) {
      const [ax, ay] = points[i];
      const [bx, by] = points[(i + 1) % points.length];
      if (ay <= at !== by <= at) crossings.push(ax + ((at - ay) / (by - ay)) * (bx - ax));
    }
    crossings.sort((a, b) => a - b);
    for (let i = 0; i + 1 < crossings.length; i += 2) {
      const from = Math.max(0, Math.ceil(crossings[i] - 0.5));
      const to = Math.min(map.width - 1, Math.floor(crossings[i + 1] - 0.5));
      for (let x = from; x <= to; x++) map.values[y * map.width + x] = id;
    }
  }
}

/**
 * Replace the connected region of equal labels around a pixel (4 neighbors).
 * @param {LabelMap} map @param {Point} at @param {number} id
 */
export function floodFill(map, at, id) {
  const x = Math.floor(at[0]);
  const y = Math.floor(at[1]);
  if (x < 0 || y < 0 || x >= map.width || y >= map.height) return;
  const old = map.values[y * map.width + x];
  if (old === id) return;
  const stack = [y * map.width + x];
  map.values[stack[0]] = id;
  while (stack.length) {
    const place = /** @type {number} */ (stack.pop());
    const column = place % map.width;
    for (const next of [
      column > 0 ? place - 1 : -1,
      column < map.width - 1 ? place + 1 : -1,
      place - map.width,
      place + map.width,
    ]) {
      if (next >= 0 && next < map.values.length && map.values[next] === old) {
        map.values[next] = id;
        stack.push(next);
      }
    }
  }
}

/**
 * Replace one class by a new answer; other classes keep their pixels unless the new mask covers them.
 * @param {LabelMap} map @param {LabelMap} answer labels of that class alone @param {number} id
 */
export function mergeClass(map, answer, id) {
  for (let i = 0; i < map.values.length; i++) {
    if (answer.values[i] === id) map.values[i] = id;
    else if (map.values[i] === id) map.values[i] = 0;
  }
}

/** @param {LabelMap} map @returns {Map<number, number>} pixels by class id, background left out */
export function areas(map) {
  const counts = new Map();
  for (const value of map.values) if (value) counts.set(value, (counts.get(value) ?? 0) + 1);
  return counts;
}

/** Undo and redo of label maps: whole copies, the oldest dropped beyond `most`. */
export class UndoStack {
  /** @param {number} [most] */
  constructor(most = 50) {
    this.most = most;
    /** @type {Uint8Array[]} */
    this.past = [];
    /** @type {Uint8Array[]} */
    this.future = [];
  }

  /** Remember a state before it changes. @param {Uint8Array} values */
  remember(values) {
    this.past.push(values.slice());
    if (this.past.length > this.most) this.past.shift();
    this.future = [];
  }

  /** @param {Uint8Array} now @returns {Uint8Array | null} the state before, null when there is none */
  undo(now) {
    const before = this.past.pop();
    if (!before) return null;
    this.future.push(now.slice());
    return before;
  }

  /** @param {Uint8Array} now @returns {Uint8Array | null} */
  redo(now) {
    const after = this.future.pop();
    if (!after) return null;
    this.past.push(now.slice());
    return after;
  }
}

/**
 * Evenly spaced points along a stroke, as point prompts: at most `most`.
 * @param {Point[]} stroke @param {number} most @returns {Point[]}
 */
export function samplePoints(stroke, most) {
  if (stroke.length <= most) return stroke.slice();
  const picked = [];
  for (let i = 0; i < most; i++) picked.push(stroke[Math.round((i * (stroke.length - 1)) / (most - 1))]);
  return picked;
}

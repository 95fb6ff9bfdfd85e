// @ts-check
/** Order the review queue: open images first, by doubt, by suggestion, or as they came. */

/** @typedef {"doubt" | "suggestion" | "name"} Order */

const RANK = { open: 0, rejected: 1, accepted: 2 };

/**
 * Order a queue: open images first.
 * @param {any[]} items @param {Order} order
 * @param {Map<string, number>} [places] place of each open image by suggestion @returns {any[]}
 */
export function queueOf(items, order, places = new Map()) {
  const last = places.size;
  /** @param {any} item */
  const place = (item) => places.get(item.id) ?? last;
  /** @type {Record<Order, (a: any, b: any) => number>} */
  const by = {
    doubt: (a, b) => (b.doubt ?? 2) - (a.doubt ?? 2),
    suggestion: (a, b) => place(a) - place(b),
    name: () => 0,
  };
  return items
    .slice()
    .sort((a, b) => RANK[/** @type {"open"} */ (a.decision)] - RANK[/** @type {"open"} */ (b.decision)] || by[order](a, b) || a.name.localeCompare(b.name));
}

/**
 * The open image after a place of the queue, else the first open one.
 * @param {any[]} queue @param {string} id of the image that was decided
 */
export function nextOpen(queue, id) {
  const place = queue.findIndex((item) => item.id === id);
  return [...queue.slice(place + 1), ...queue.slice(0, place)].find((item) => item.decision === "open");
}

// @ts-check
/** Read the metrics and the summary of a training run: nested numbers by one name, and a table of scores. */

/**
 * Flatten the numbers of one line of metrics: {val_student: {mean: {dice: 1}}} gives {"val_student mean dice": 1}.
 * @param {any} row @param {string} [prefix] @returns {Record<string, number>}
 */
export function flatten(row, prefix = "") {
  /** @type {Record<string, number>} */
  const flat = {};
  for (const [name, value] of Object.entries(row)) {
    if (typeof value === "number") flat[prefix + name] = value;
    else if (value && typeof value === "object" && !Array.isArray(value)) Object.assign(flat, flatten(value, `${prefix}${name} `));
  }
  return flat;
}

const PARTS = [["val", "validation"], ["test", "test"], ["val_delivered", "validation, as delivered"], ["test_delivered", "test, as delivered"],
  ["val_fused", "validation, fused with VESSA"], ["test_fused", "test, fused with VESSA"]];

/**
 * The scores of a finished run by part and class, the worst class of each part first.
 * @param {any} summary @returns {{head: string[], rows: any[][]} | null} null before the run's end
 */
export function scoreTable(summary) {
  if (!summary) return null;
  const rows = PARTS.flatMap(([key, part]) => {
    const scores = summary[key];
    if (!scores?.by_class) return [];
    const classes = Object.entries(scores.by_class).sort(([, a], [, b]) => (a.dice ?? 0) - (b.dice ?? 0));
    return [["mean", scores.mean], ...classes].map(([name, s]) => [part, name, shown(s.dice, 3), shown(s.iou, 3), shown(s.hd95, 1)]);
  });
  return { head: ["Part", "Class", "Dice", "IoU", "HD95, px or mm"], rows };
}

/** @param {number | null | undefined} value @param {number} digits */
function shown(value, digits) {
  return typeof value === "number" ? value.toFixed(digits) : "none";
}

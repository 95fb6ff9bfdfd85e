// @ts-check
/** Class names as a person types them: one `number: name` a line. */

/**
 * Read "1: ventricle" lines.
 * @param {string} text @returns {Record<string, string>}
 */
export function readClasses(text) {
  /** @type {Record<string, string>} */
  const classes = {};
  for (const line of text.split("\n").map((l) => l.trim()).filter(Boolean)) {
    const match = /^(\d{1,3})\s*:\s*(.+)$/.exec(line);
    if (!match || Number(match[1]) < 1 || Number(match[1]) > 255) {
      throw new Error(`A class is "number: name" with a number from 1 to 255, got "${line}".`);
    }
    classes[match[1]] = match[2];
  }
  if (!Object.keys(classes).length) throw new Error("Name at least one class, such as 1: ventricle.");
  return classes;
}

/** @param {Record<string, string>} classes @returns {string} as `readClasses` reads them */
export function classLines(classes) {
  return Object.entries(classes).map(([id, name]) => `${id}: ${name}`).join("\n");
}

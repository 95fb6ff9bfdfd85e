// @ts-check
/** Write an 8-bit gray PNG: a canvas writes RGBA only, and the service takes class ids as gray values. */

/** @typedef {import("./masks.js").LabelMap} LabelMap */

const TABLE = new Uint32Array(256).map((_, n) => {
  let c = n;
  for (let k = 0; k < 8; k++) c = c & 1 ? 0xedb88320 ^ (c >>> 1) : c >>> 1;
  return c >>> 0;
});

/** @param {Uint8Array} bytes @returns {number} CRC-32 as PNG has it */
export function crc32(bytes) {
  let c = 0xffffffff;
  for (const byte of bytes) c = TABLE[(c ^ byte) & 255] ^ (c >>> 8);
  return (c ^ 0xffffffff) >>> 0;
}

/** @param {string} kind @param {Uint8Array} data @returns {Uint8Array<ArrayBuffer>} */
function chunk(kind, data) {
  const out = new Uint8Array(12 + data.length);
  const view = new DataView(out.buffer);
  view.setUint32(0, data.length);
  for (let i = 0; i < 4; i++) out[4 + i] = kind.charCodeAt(i);
  out.set(data, 8);
  view.setUint32(8 + data.length, crc32(out.subarray(4, 8 + data.length)));
  return out;
}

/**
 * Return the PNG file of a label map.
 * @param {LabelMap} map
 * @returns {Promise<Blob>}
 */
export async function grayPng(map) {
  const rows = new Uint8Array((map.width + 1) * map.height); // each row begins with filter 0
  for (let y = 0; y < map.height; y++) {
    rows.set(map.values.subarray(y * map.width, (y + 1) * map.width), y * (map.width + 1) + 1);
  }
  const packed = await new Response(new Blob([rows]).stream().pipeThrough(new CompressionStream("deflate"))).arrayBuffer();
  const header = new Uint8Array(13);
  const view = new DataView(header.buffer);
  view.setUint32(0, map.width);
  view.setUint32(4, map.height);
  header.set([8, 0, 0, 0, 0], 8);
  const signature = new Uint8Array([137, 80, 78, 71, 13, 10, 26, 10]);
  return new Blob([signature, chunk("IHDR", header), chunk("IDAT", new Uint8Array(packed)), chunk("IEND", new Uint8Array(0))], { type: "image/png" });
}

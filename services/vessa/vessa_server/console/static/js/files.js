// @ts-check
/** Sort files that a person chose: pictures, volumes, annotated folders; read patients from names. */

/** @typedef {{name: string, files: File[]}} VolumeFiles one NIfTI file, or the files of one DICOM series */
/** @typedef {{pictures: File[], volumes: VolumeFiles[], others: File[]}} Sorted */
/** @typedef {{name: string, annotated: {image: File, mask: File}[], plain: File[], meta: File | null}} DataFolder */

const PICTURE = /\.(png|jpe?g|tiff?)$/i;
const NIFTI = /\.nii(\.gz)?$/i;
const DICOM = /\.(dcm|dicom|ima)$/i;
const HEAD = 64 << 10; // bytes in which a DICOM file names its series

/**
 * Read the patient from a file name as data folders do: `<patient>_<slice>.png`.
 * @param {string} name @returns {string}
 */
export function groupOf(name) {
  const stem = name.replace(/\.nii\.gz$/i, "").replace(/\.[^.]+$/, "");
  const match = /^(.+?)(?:_frame\w+?)?_\d+$/.exec(stem);
  return match ? match[1] : stem;
}

/** @param {File} file @returns {string} its path below the chosen folder */
function pathOf(file) {
  return /** @type {any} */ (file).path ?? file.webkitRelativePath ?? "";
}

/**
 * Find the UID of a DICOM file's series (0020,000E), explicit or implicit, without parsing the file.
 * @param {Uint8Array} head @returns {string} empty when it is not in the head
 */
export function seriesUid(head) {
  for (let i = 0; i + 12 < head.length; i++) {
    if (head[i] !== 0x20 || head[i + 1] !== 0 || head[i + 2] !== 0x0e || head[i + 3] !== 0) continue;
    const explicit = head[i + 4] === 0x55 && head[i + 5] === 0x49;
    const length = explicit ? head[i + 6] | (head[i + 7] << 8) : head[i + 4] | (head[i + 5] << 8);
    const text = String.fromCharCode(...head.subarray(i + 8, i + 8 + Math.min(length, 64)));
    const uid = /^[0-9.]+/.exec(text);
    if (length <= 64 && uid) return uid[0];
  }
  return "";
}

/**
 * Sort files into pictures, volumes and others. A file without a suffix is DICOM when it says so at byte 128.
 * @param {File[]} files @returns {Promise<Sorted>}
 */
export async function sortFiles(files) {
  /** @type {Sorted} */
  const sorted = { pictures: [], volumes: [], others: [] };
  /** @type {Map<string, File[]>} */
  const series = new Map();
  for (const file of files) {
    if (PICTURE.test(file.name)) sorted.pictures.push(file);
    else if (NIFTI.test(file.name)) sorted.volumes.push({ name: file.name, files: [file] });
    else if (DICOM.test(file.name) || (!file.name.includes(".") && (await file.slice(128, 132).text()) === "DICM")) {
      const uid = seriesUid(new Uint8Array(await file.slice(0, HEAD).arrayBuffer()));
      const key = `${pathOf(file).split("/").slice(0, -1).join("/")} ${uid}`;
      series.set(key, [...(series.get(key) ?? []), file]);
    } else sorted.others.push(file);
  }
  for (const found of series.values()) {
    const folder = pathOf(found[0]).split("/").at(-2); // a series is known by its folder, not by one of its files
    sorted.volumes.push({ name: (found.length > 1 && folder) || found[0].name, files: found });
  }
  return sorted;
}

/**
 * Read a folder in the layout that `vessa-trainer` reads: `images/`, `masks/` with the same names, `meta.json`.
 * Files that lie elsewhere are images without a mask.
 * @param {File[]} files @returns {DataFolder}
 */
export function readDataFolder(files) {
  const paths = files.map((file) => ({ file, parts: pathOf(file).split("/") }));
  const root = paths[0]?.parts[0] || "folder";
  /** @type {Map<string, File>} */
  const masks = new Map();
  for (const { file, parts } of paths) if (parts.at(-2) === "masks") masks.set(file.name, file);
  const images = paths.filter(({ file, parts }) => parts.at(-2) !== "masks" && PICTURE.test(file.name)).map(({ file }) => file);
  const annotated = images.flatMap((image) => {
    const mask = masks.get(image.name.replace(/\.[^.]+$/, ".png"));
    return mask ? [{ image, mask }] : [];
  });
  const known = new Set(annotated.map(({ image }) => image));
  return {
    name: root.replace(/[^A-Za-z0-9._-]+/g, "-").replace(/^[^A-Za-z0-9]+/, "").slice(0, 64) || "folder",
    annotated,
    plain: images.filter((image) => !known.has(image)),
    meta: paths.find(({ file, parts }) => file.name === "meta.json" && parts.length <= 2)?.file ?? null,
  };
}

/** @param {DataTransfer} transfer @returns {Promise<File[]>} all dropped files, of folders too */
export async function filesOf(transfer) {
  /** @param {any} entry @returns {Promise<File[]>} */
  const walk = async (entry) => {
    if (entry.isFile) {
      const file = await new Promise((done, fail) => entry.file(done, fail));
      return [Object.assign(file, { path: entry.fullPath.replace(/^\//, "") })];
    }
    const reader = entry.createReader();
    const all = [];
    for (;;) {
      const part = await new Promise((done, fail) => reader.readEntries(done, fail));
      if (!part.length) return all;
      for (const child of part) all.push(...(await walk(child)));
    }
  };
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
  const found = await Promise.all(entries.map(walk));
  return found.flat();
}

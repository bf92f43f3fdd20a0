// Files without their names: a list of endings and sizes, and the files behind it (see uploads.py).

const ENDINGS = [".nii.gz", ".nii", ".npy", ".npz", ".nrrd", ".mha", ".zip"];

export function packed(files) {
  const list = files.map((file) => [ENDINGS.find((ending) => file.name.toLowerCase().endsWith(ending)) || "", file.size]);
  const text = new TextEncoder().encode(JSON.stringify(list));
  const length = new DataView(new ArrayBuffer(4));
  length.setUint32(0, text.length);
  return new Blob([length.buffer, text, ...files]);
}

// All files of what was dropped, folders walked through.
export async function gather(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
  const files = [];
  while (entries.length) {
    const entry = entries.pop();
    if (entry.isFile) files.push(await new Promise((resolve, reject) => entry.file(resolve, reject)));
    else {
      const reader = entry.createReader();
      for (let part; (part = await new Promise((resolve, reject) => reader.readEntries(resolve, reject))).length;) entries.push(...part);
    }
  }
  return files.filter((file) => !file.name.startsWith("."));
}

// Where trajectories come from: embedded in the page, or asked for one step at a time from `searchr1 watch`.
// A row is what the list shows; its body is the whole logged trajectory.

const CHUNK = 50;  // rows that are packed, or asked for, together
const TIMEOUT_MS = 30000;

async function unpack(base64) {
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

function toRow(columns, values, file, place) {
  const row = { file, place, key: "", body: null, haystack: null };
  columns.forEach((name, i) => { row[name] = values[i]; });
  row.key = [file.run, file.mode, file.step, row.replica, row.id].join("/");
  return row;
}

// A script element that holds data, once the parser is past it.
async function holder(id) {
  for (;;) {
    const node = $(id), done = document.readyState !== "loading";
    if (node && (node.nextSibling || done)) return node;
    if (done) throw new Error("this page is not complete: its end is missing");
    await new Promise(next => setTimeout(next, 20));
  }
}

// All rows are in the page, their bodies in packed chunks that are opened when they are needed.
class Embedded {
  constructor(overview) {
    this.files = overview.files;
    this.chunks = new Map();
    this.all = null;
  }

  async rows(files) {
    if (!this.all) {
      const index = await unpack($("index").textContent);
      this.all = index.rows.map((values, place) => toRow(index.columns, values.slice(1), this.files[values[0]], place));
    }
    const wanted = new Set(files);
    return this.all.filter(row => wanted.has(row.file));
  }

  async same(row) {
    return (await this.rows(this.files)).filter(other => other.id === row.id);
  }

  async fill(row) {
    const number = Math.floor(row.place / CHUNK);
    if (!this.chunks.has(number)) this.chunks.set(number, this.open(number));
    await this.chunks.get(number);
    return row.body;
  }

  async open(number) {
    const node = await holder("chunk-" + number), bodies = await unpack(node.textContent);
    bodies.forEach((body, i) => { this.all[number * CHUNK + i].body = body; });
    node.remove();
  }
}

// Rows of one file at a time, from the server. A file may grow; then only its new rows are asked for.
class Live {
  constructor(overview) {
    this.files = [];
    this.loaded = new Map();
    this.adopt(overview);
  }

  // New files; what was loaded of files that are gone or were written again is forgotten.
  adopt(overview) {
    const known = new Map(this.files.map(file => [file.key, file]));
    this.files = overview.files.map(file => {
      const old = known.get(file.key);
      if (!old || old.file !== file.file || file.bytes < old.bytes) { this.loaded.delete(file.key); return file; }
      return Object.assign(old, file);
    });
    const keys = new Set(this.files.map(file => file.key));
    for (const key of this.loaded.keys()) if (!keys.has(key)) this.loaded.delete(key);
  }

  async ask(path) {
    const answer = await fetch(path, { signal: AbortSignal.timeout(TIMEOUT_MS) });
    const content = await answer.json();
    if (!answer.ok) throw new Error(content.problem || "the server answered " + answer.status);
    return content;
  }

  async rows(files) {
    const found = await Promise.all(files.map(file => this.rowsOf(file)));
    return found.flat();
  }

  async rowsOf(file) {
    const entry = this.loaded.get(file.key) || { version: "", rows: [], chunks: new Map(), asked: Promise.resolve() };
    this.loaded.set(file.key, entry);
    entry.asked = entry.asked.catch(() => {}).then(async () => {
      const { version } = file;
      if (entry.version === version) return;
      const index = await this.ask(`api/rows?file=${file.key}&from=${entry.rows.length}`);
      index.rows.forEach(values => entry.rows.push(toRow(index.columns, values, file, entry.rows.length)));
      entry.version = version;
    });
    await entry.asked;
    return entry.rows.slice();
  }

  async same(row) {
    const found = new Set((await this.ask("api/same?id=" + encodeURIComponent(row.id))).files);
    const rows = await this.rows(this.files.filter(file => found.has(file.key)));
    return rows.filter(other => other.id === row.id);
  }

  async fill(row) {
    if (row.body) return row.body;
    await this.rowsOf(row.file);
    const entry = this.loaded.get(row.file.key), number = Math.floor(row.place / CHUNK);
    const kept = entry.rows[row.place];
    if (!kept || kept.key !== row.key) throw new Error("the run was started again");
    if (!kept.body) {
      if (!entry.chunks.has(number)) {
        const from = number * CHUNK, asked = this.ask(`api/bodies?file=${row.file.key}&from=${from}&count=${CHUNK}`);
        // Forgotten when it is there: the last chunk of a growing file is asked for again.
        entry.chunks.set(number, asked.then(bodies => bodies.forEach((body, i) => {
          if (entry.rows[from + i]) entry.rows[from + i].body = body;
        })).finally(() => entry.chunks.delete(number)));
      }
      await entry.chunks.get(number);
    }
    if (!kept.body) throw new Error("the server has it no more");
    row.body = kept.body;
    return row.body;
  }
}

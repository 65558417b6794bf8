// Which rows are shown, and in which order.

const FLAGS = [
  ["wrong", "wrong", row => !row.right],
  ["right", "right", row => row.right],
  ["invalid", "invalid action", row => row.invalid > 0],
  ["length", "out of tokens", row => row.stop === "length"],
  ["forced", "forced last turn", row => row.forced],
  ["failures", "tool failure", row => row.failures > 0],
  ["error", "error", row => row.stop === "error"],
  ["silent", "no answer", row => row.answer === null],
  ["unsearched", "no search", row => row.searches === 0],
];
const ORDERS = [
  ["logged", "as logged", null],
  ["searches", "most searches", (a, b) => b.searches - a.searches],
  ["longest", "longest", (a, b) => b.length - a.length],
  ["best", "highest reward", (a, b) => last(b.reward, -1) - last(a.reward, -1)],
  ["worst", "lowest reward", (a, b) => last(a.reward, 1) - last(b.reward, 1)],
  ["unsure", "least sure tokens", (a, b) => last(b.surprise, -1) - last(a.surprise, -1)],
  ["question", "by question", (a, b) => a.id < b.id ? -1 : a.id > b.id ? 1 : 0],
];
const last = (value, side) => value === null ? side * Infinity : value;
const SLICE_MS = 12;  // work between two breaks that let the page answer

// Words, and phrases in quotes; a phrase that is still being typed has no second quote yet.
const terms = query => [...query.toLowerCase().matchAll(/"([^"]+)"?|[^\s"]+/g)].map(match => match[1] || match[0]);

// All that can be found of a trajectory, in small letters.
function haystackOf(row, body) {
  const parts = [row.id, row.source, row.question, row.answer || "", ...row.golds];
  for (const turn of body.turns) {
    parts.push(turn.policy_text, turn.tool_text, turn.tool_error, ...(Array.isArray(turn.queries) ? turn.queries : []));
  }
  return parts.filter(part => part !== null && part !== undefined).join("\n").toLowerCase();
}

// Rows whose text holds every term. `report(rows, share)` is called on the way; stops when `stale()`.
async function findText(source, rows, query, report, stale) {
  const wanted = terms(query), found = [];
  let rested = performance.now(), reported = rested;
  for (let i = 0; i < rows.length; i++) {
    const row = rows[i];
    if (row.haystack === null) row.haystack = haystackOf(row, row.body || await source.fill(row));
    if (stale()) return null;
    if (wanted.every(term => row.haystack.includes(term))) found.push(row);
    const now = performance.now();
    if (now - rested > SLICE_MS) {
      if (now - reported > 300) { report(found.slice(), i / rows.length); reported = now; }
      await new Promise(next => setTimeout(next));
      rested = performance.now();
      if (stale()) return null;
    }
  }
  return found;
}

function filtered(rows, filters) {
  const tests = FLAGS.filter(([name]) => filters.flags.has(name)).map(flag => flag[2]);
  return rows.filter(row => (!filters.source || row.source === filters.source) && tests.every(test => test(row)));
}

function ordered(rows, name) {
  const compare = ORDERS.find(order => order[0] === name)[2];
  return compare ? [...rows].sort((a, b) => compare(a, b) || 0) : rows;
}

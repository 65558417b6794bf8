// The pane that shows one trajectory, its score, and other rollouts of the same question.

const MOST_COLUMNS = 12;

function stepName(file, runs) {
  const run = runs.length > 1 ? runs[file.run] + ", " : "";
  return run + (file.mode === "eval" ? "evaluation" : "training") + ", step " + count(file.step);
}

function rolloutLabel(row, runs) {
  const parts = [row.file.mode === "eval" ? "eval" : "train", count(row.file.step)];
  if (runs.length > 1) parts.unshift(runs[row.file.run]);
  return parts.join(" ") + (row.file.mode === "train" ? " #" + (row.replica + 1) : "");
}

class Detail {
  constructor(node, app) {
    Object.assign(this, { node, app, row: null, body: null, others: [], shade: true, beside: false, asked: 0 });
  }

  async show(row) {
    const number = ++this.asked, { source } = this.app;
    this.row = row;
    this.node.setAttribute("aria-busy", "true");
    try {
      const [body, others] = await Promise.all([source.fill(row), source.same(row)]);
      if (number !== this.asked) return;
      this.body = body;
      this.others = others.sort((a, b) => a.file.run - b.file.run || (a.file.mode < b.file.mode ? -1 : a.file.mode > b.file.mode ? 1 : 0) || a.file.step - b.file.step || a.replica - b.replica);
      await this.draw();
      this.node.scrollTop = 0;
    } catch (error) {
      if (number === this.asked) problem("This trajectory could not be read: " + error.message);
    } finally {
      if (number === this.asked) this.node.removeAttribute("aria-busy");
    }
  }

  empty(text) {
    this.asked++;
    this.row = this.body = null;
    this.node.replaceChildren(make("p", "nothing", text));
  }

  // The rollouts of this kind (evaluations, or training steps) of the same question: what [ and ] walk through.
  walk(by) {
    if (!this.row) return;
    const line = this.others.filter(other => other.file.mode === this.row.file.mode && other.file.run === this.row.file.run);
    const next = line[line.findIndex(other => other.key === this.row.key) + by];
    if (next) this.app.open(next);
  }

  toggle(what) {
    this[what] = !this[what];
    if (this.body) this.draw();
  }

  async draw() {
    const parts = [this.head(), this.same(), this.tools()];
    if (this.shade && hasTokens(this.body) && !this.beside) parts.push(legendOfShades());
    if (this.beside) {
      const columns = await this.columns(this.asked);
      if (!columns) return;
      parts.push(columns);
    } else parts.push(...blocksOf(this.body, this.shade));
    this.node.replaceChildren(...parts);
    highlight(this.node, this.app.filters.query);
  }

  head() {
    const { row, body } = this, head = make("header"), title = make("h3", "asked");
    title.append(verdict(row.right), " ", make("span", "", row.question || row.id));
    const facts = make("dl", "facts");
    const fact = (name, value) => { if (value !== null && value !== "") facts.append(make("dt", "", name), make("dd", "", value)); };
    fact("answer", row.answer === null ? "none" : row.answer);
    fact("gold", row.golds.join(" | "));
    fact("ended by", (ENDINGS[row.stop] || row.stop) + (row.forced ? "; the last turn was forced" : ""));
    fact("tokens", count(row.length) + (typeof body.policy_tokens === "number" ? `, ${count(body.policy_tokens)} of them sampled` : ""));
    fact("searches", count(row.searches));
    fact("tool failures", row.failures || "");
    fact("mean probability", row.surprise === null ? "" : Math.exp(-row.surprise / 1000).toFixed(3) + " a token");
    fact("from", `${stepName(row.file, this.app.overview.runs)}, ${row.source}, ${row.id}, rollout ${row.replica + 1}`);
    head.append(title, facts, this.rewards());
    return head;
  }

  rewards() {
    const parts = Object.entries(this.body.reward_parts || {}).filter(([name]) => name !== "reward"), list = make("div", "rewards");
    list.append(reward("reward", this.row.reward, true), ...parts.map(([name, value]) => reward(name, value, false)));
    list.setAttribute("aria-label", "Reward breakdown");
    list.setAttribute("role", "group");
    return list;
  }

  same() {
    const box = make("div", "same"), { runs } = this.app.overview;
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", "The same question at other steps");
    if (this.others.length < 2) return box;
    box.append(make("span", "", "Same question:"));
    for (const other of this.others) {
      const chip = button("chip" + (other.key === this.row.key ? " chosen" : ""), "", () => this.app.open(other));
      chip.append(verdict(other.right), " " + clean(rolloutLabel(other, runs)));
      chip.title = clean(`${stepName(other.file, runs)}: ${other.answer === null ? "no answer" : other.answer}, ${plural(other.searches, "search", "searches")}`);
      if (other.key === this.row.key) chip.setAttribute("aria-current", "true");
      box.append(chip);
    }
    return box;
  }

  tools() {
    const box = make("div", "tools"), known = hasTokens(this.body);
    const shade = button("switch", "Token probabilities", () => this.toggle("shade"));
    shade.id = "shade";
    shade.setAttribute("aria-pressed", String(this.shade && known));
    shade.disabled = !known;
    if (!known) shade.title = "This trajectory was logged without its tokens' probabilities.";
    const beside = button("switch", "Side by side", () => this.toggle("beside"));
    beside.id = "beside";
    beside.setAttribute("aria-pressed", String(this.beside));
    beside.disabled = this.others.length < 2;
    const link = button("switch", "Copy link", async () => {
      // Browsers have no clipboard for pages that came over the network without TLS.
      try {
        await navigator.clipboard.writeText(location.href);
        link.textContent = "Copied";
      } catch { link.textContent = "Copy it from the address bar"; }
    });
    box.append(shade, beside, link);
    return box;
  }

  // Rollouts of the same question beside each other: the evaluations, or the rollouts of a training question.
  async columns(number) {
    const { runs } = this.app.overview, same = this.others.filter(other => other.file.mode === this.row.file.mode);
    const start = Math.max(0, Math.min(same.findIndex(other => other.key === this.row.key) - MOST_COLUMNS / 2, same.length - MOST_COLUMNS));
    const shown = same.slice(start, start + MOST_COLUMNS);
    const bodies = await Promise.all(shown.map(other => this.app.source.fill(other)));
    if (number !== this.asked) return null;
    const box = make("div", "columns");
    shown.forEach((other, i) => {
      const column = make("section", "column" + (other.key === this.row.key ? " chosen" : "")), head = make("h3");
      head.append(verdict(other.right), " ", button("link", rolloutLabel(other, runs), () => this.app.open(other)));
      column.append(head, make("p", "facts", `${other.answer === null ? "no answer" : other.answer} · ${plural(other.searches, "search", "searches")} · reward ${value(other.reward)}`));
      column.append(...blocksOf(bodies[i], this.shade));
      box.append(column);
    });
    return box;
  }
}

const ENDINGS = {
  answer: "its answer", turns: "the last allowed turn", length: "running out of tokens", eos: "an end-of-text token", error: "an error",
};

const value = number => typeof number === "number" ? compact(number) : "not finite";

function reward(name, number, total) {
  const node = make("span", "part" + (total ? " total" : ""));
  node.append(make("span", "", name), make("b", "", value(number)));
  return node;
}

// Marks what was searched for, where the browser can mark without changing the document.
function highlight(node, query) {
  if (!window.Highlight || !CSS.highlights) return;
  const ranges = [], wanted = terms(query), texts = new Map();
  if (wanted.length) {
    // A block's text may be cut into tokens; what was searched for may reach over several.
    const walker = document.createTreeWalker(node, NodeFilter.SHOW_TEXT);
    for (let text = walker.nextNode(); text; text = walker.nextNode()) {
      const whole = text.parentElement.closest(".text") || text.parentElement;
      if (!texts.has(whole)) texts.set(whole, []);
      texts.get(whole).push(text);
    }
  }
  for (const parts of texts.values()) {
    const text = parts.map(part => part.data).join(""), letters = text.toLowerCase();
    if (letters.length !== text.length) continue;
    for (const term of wanted) {
      for (let at = letters.indexOf(term); at >= 0; at = letters.indexOf(term, at + term.length)) {
        ranges.push(rangeOver(parts, at, at + term.length));
      }
    }
  }
  CSS.highlights.set("found", new Highlight(...ranges));
}

function rangeOver(parts, start, end) {
  const range = new Range();
  let before = 0;
  for (const part of parts) {
    const after = before + part.data.length;
    if (start >= before && start < after) range.setStart(part, start - before);
    if (end > before && end <= after) range.setEnd(part, end - before);
    before = after;
  }
  return range;
}

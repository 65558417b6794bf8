// The page as a whole: filters, the address, keys, and updates from `searchr1 watch`.

const POLL_MS = 2000;

class App {
  constructor(overview) {
    this.overview = overview;
    this.source = overview.live ? new Live(overview) : new Embedded(overview);
    this.filters = { query: "", scope: "", source: "", order: "logged", flags: new Set() };
    this.rows = [];
    this.round = 0;
    this.pending = null;  // key of a row that will be opened
    this.chosen = false;  // whether a person chose what the detail pane shows
    this.list = new List($("list"), $("spacer"), row => this.labelOf(row), row => this.open(row));
    this.detail = new Detail($("detail"), this);
  }

  async start() {
    this.fromAddress();
    this.show();
    this.controls();
    await this.load();
    addEventListener("hashchange", () => { if (location.hash !== this.written) { this.fromAddress(); this.load(); } });
    if (this.overview.live) this.follow();
  }

  show() {
    showOverview(this.overview, key => { this.pending = key; this.toRow(); }, step => this.chooseStep(step));
    this.scopes();
    $("viewer").hidden = !this.overview.files.length;
    problem(this.overview.problem);
  }

  // ---- what is shown

  files() {
    const { scope } = this.filters, { files } = this.source;
    if (scope === "all") return files;
    if (scope === "eval" || scope === "train") return files.filter(file => file.mode === scope);
    return files.filter(file => file.key === scope);
  }

  // The newest evaluation, else the newest step.
  newest() {
    const { files } = this.source, evals = files.filter(file => file.mode === "eval" && file.run === 0);
    const best = (evals.length ? evals : files).reduce((a, b) => !a || b.step >= a.step ? b : a, null);
    return best ? best.key : "";
  }

  scopes() {
    const { files } = this.source, { runs, live } = this.overview, select = $("scope"), parts = [];
    const sum = some => some.reduce((total, file) => total + file.rows, 0);
    if (!live) {
      parts.push(option("all", `All steps (${count(sum(files))})`));
      for (const [mode, name] of [["eval", "All evaluations"], ["train", "All training steps"]]) {
        const some = files.filter(file => file.mode === mode);
        if (some.length > 1) parts.push(option(mode, `${name} (${count(sum(some))})`));
      }
    }
    parts.push(...files.map(file => option(file.key, stepName(file, runs) + (live ? "" : ` (${count(file.rows)})`))));
    select.replaceChildren(...parts);
    const known = [...select.options].some(entry => entry.value === this.filters.scope);
    if (!known) this.filters.scope = this.newest();
    select.value = this.filters.scope;
  }

  async load(keepPlace) {
    const round = ++this.round;
    let rows;
    try {
      rows = await this.source.rows(this.files());
    } catch (error) {
      if (round === this.round) problem("The trajectories could not be read: " + error.message);
      return;
    }
    if (round !== this.round) return;
    problem(this.overview.problem);
    this.rows = rows;
    const sources = [...new Set(rows.map(row => row.source))].sort();
    $("source").replaceChildren(option("", "All data sources"), ...sources.map(name => option(name, short(name, 60))));
    if (!sources.includes(this.filters.source)) this.filters.source = "";
    $("source").value = this.filters.source;
    $("source").hidden = sources.length < 2;
    await this.update(keepPlace);
    if (this.pending) await this.toRow();
  }

  async update(keepPlace) {
    const round = ++this.round, { filters } = this, stale = () => round !== this.round;
    this.flags();
    const some = filtered(this.rows, filters);
    const put = (rows, note) => {
      this.list.show(ordered(rows, filters.order), keepPlace);
      const all = rows.length === this.rows.length;
      $("count").textContent = (all ? "" : count(rows.length) + " of ") + plural(this.rows.length, "trajectory", "trajectories") + note;
    };
    $("clear").hidden = !(filters.query || filters.source || filters.flags.size);
    if (terms(filters.query).length) {
      $("count").textContent = "searching …";
      try {
        const found = await findText(this.source, some, filters.query, (rows, share) => put(rows, `, searched ${Math.round(100 * share)}%`), stale);
        if (found) put(found, "");
      } catch (error) {
        if (!stale()) problem("The search stopped: " + error.message);
      }
    } else put(some, "");
    if (!stale() && this.detail.body) highlight($("detail"), filters.query);
    if (stale()) return;
    this.glance();
    this.toAddress();
  }

  // While nobody has chosen a trajectory, the first of the list is shown.
  glance() {
    if (this.chosen || this.pending) return;
    const first = this.list.rows[0];
    if (!first) this.detail.empty(this.rows.length ? "No trajectory fits these filters." : "No trajectory here.");
    else if (first !== this.detail.row) { this.list.select(first); this.detail.show(first); }
  }

  labelOf(row) {
    const parts = [plural(row.searches, "search", "searches"), "reward " + value(row.reward)];
    if (this.files().length > 1) parts.unshift(rolloutLabel(row, this.overview.runs));
    else if (row.file.mode === "train") parts.unshift("rollout " + (row.replica + 1));
    if (!$("source").hidden) parts.push(short(row.source, 24));
    return parts.join(" · ");
  }

  async open(row, focus) {
    if (!this.files().includes(row.file)) {
      this.filters.scope = row.file.key;
      $("scope").value = row.file.key;
      await this.load();
    }
    this.chosen = true;
    this.list.select(row, focus);
    const shown = this.detail.show(row);
    this.toAddress();
    await shown;
  }

  // Opens the row that the address, or a link in the page, names.
  async toRow() {
    const key = this.pending;
    this.pending = null;
    const [run, mode, step] = key.split("/"), file = this.source.files.find(f => f.key === [run, mode, step].join("-"));
    const rows = file ? await this.source.rows([file]) : [], row = rows.find(other => other.key === key);
    if (!row) { problem("The trajectory of this link is not in the page."); return; }
    if (!this.list.rows.includes(row)) {
      Object.assign(this.filters, { query: "", source: "", flags: new Set() });
      $("query").value = "";
      if (!this.files().includes(file)) { this.filters.scope = file.key; $("scope").value = file.key; }
      await this.load();
    }
    await this.open(row);
    $("viewer").scrollIntoView({ block: "start" });
  }

  chooseStep(step) {
    const { files } = this.source, mode = this.filters.scope.includes("train") ? "train" : "";
    const some = files.filter(file => file.run === 0 && (!mode || file.mode === mode));
    const nearest = some.reduce((a, b) => !a || Math.abs(b.step - step) < Math.abs(a.step - step) ? b : a, null);
    if (!nearest) return;
    this.filters.scope = $("scope").value = nearest.key;
    this.load();
    $("viewer").scrollIntoView({ block: "start" });
  }

  // ---- controls

  controls() {
    const { filters } = this;
    $("order").replaceChildren(...ORDERS.map(([name, text]) => option(name, "Order: " + text)));
    $("order").value = filters.order;
    let waiting = 0;
    $("query").oninput = () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => { filters.query = $("query").value; this.update(); }, 120);
    };
    $("scope").onchange = () => { filters.scope = $("scope").value; this.load(); };
    $("source").onchange = () => { filters.source = $("source").value; this.update(); };
    $("order").onchange = () => { filters.order = $("order").value; this.update(); };
    $("clear").onclick = () => this.clear();
    $("help-button").onclick = () => $("help").showModal();
    $("help-close").onclick = () => $("help").close();
    document.addEventListener("keydown", event => this.key(event));
  }

  clear() {
    Object.assign(this.filters, { query: "", source: "", flags: new Set() });
    $("query").value = $("source").value = "";
    return this.update();
  }

  flags() {
    const { filters } = this;
    $("flags").replaceChildren(...FLAGS.map(([name, text, test]) => {
      const number = this.rows.filter(test).length, on = filters.flags.has(name);
      const chip = button("chip" + (on ? " chosen" : ""), text, () => {
        if (on) filters.flags.delete(name);
        else filters.flags.add(name);
        if (!on && name === "right") filters.flags.delete("wrong");
        if (!on && name === "wrong") filters.flags.delete("right");
        this.update().then(() => $("flag-" + name).focus());
      });
      chip.id = "flag-" + name;
      chip.setAttribute("aria-pressed", String(on));
      chip.disabled = !number && !on;
      chip.append(" ", make("small", "", count(number)));
      return chip;
    }));
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
    const typing = event.target.matches("input, select, textarea");
    if (event.key === "Escape" && event.target === $("query")) { this.clear(); $("list").focus(); return; }
    if (typing) {
      if (event.target === $("query") && (event.key === "ArrowDown" || event.key === "Enter")) { event.preventDefault(); this.list.node.focus(); this.list.step(this.detail.row ? 0 : 1); }
      return;
    }
    const inList = document.activeElement === $("list");
    const actions = {
      "/": () => { $("query").focus(); $("query").select(); },
      j: () => this.list.step(1), k: () => this.list.step(-1),
      "[": () => this.detail.walk(-1), "]": () => this.detail.walk(1),
      t: () => this.detail.toggle("shade"), s: () => this.detail.toggle("beside"),
      "?": () => $("help").showModal(),
    };
    if (inList) Object.assign(actions, {
      ArrowDown: () => this.list.step(1), ArrowUp: () => this.list.step(-1), PageDown: () => this.list.step(8), PageUp: () => this.list.step(-8),
      Home: () => this.list.step(-Infinity), End: () => this.list.step(Infinity), Enter: () => $("detail").focus(),
    });
    const action = Object.hasOwn(actions, event.key) ? actions[event.key] : null;
    if (action && !$("viewer").hidden) { event.preventDefault(); action(); }
  }

  // ---- the address

  toAddress() {
    const { filters } = this, parts = new URLSearchParams();
    if (this.chosen && this.detail.row) parts.set("row", this.detail.row.key);
    for (const name of ["query", "source"]) if (filters[name]) parts.set(name, filters[name]);
    if (filters.scope !== this.newest() && !this.overview.live) parts.set("scope", filters.scope);
    if (filters.order !== "logged") parts.set("order", filters.order);
    if (filters.flags.size) parts.set("only", [...filters.flags].join(","));
    this.written = parts.size ? "#" + parts : "";
    history.replaceState(null, "", this.written || location.pathname + location.search);
  }

  fromAddress() {
    const parts = new URLSearchParams(location.hash.slice(1)), { filters } = this;
    filters.query = $("query").value = parts.get("query") || "";
    filters.source = parts.get("source") || "";
    filters.scope = parts.get("scope") || filters.scope;
    filters.order = ORDERS.some(order => order[0] === parts.get("order")) ? parts.get("order") : "logged";
    filters.flags = new Set((parts.get("only") || "").split(",").filter(name => FLAGS.some(flag => flag[0] === name)));
    this.pending = parts.get("row");
    const [run, mode, step] = (this.pending || "").split("/");
    if (this.overview.live && this.pending) filters.scope = [run, mode, step].join("-");
  }

  // ---- updates

  async follow() {
    const live = $("live"), say = (text, well) => { live.textContent = clean(text); live.className = "live " + (well ? "on" : "off"); };
    live.hidden = false;
    say("live", true);
    for (;;) {
      await new Promise(next => setTimeout(next, POLL_MS));
      try {
        const answer = await fetch("api/overview", { signal: AbortSignal.timeout(TIMEOUT_MS), headers: { "if-none-match": this.overview.version } });
        if (answer.status === 200) await this.adopt(await answer.json());
        else if (answer.status !== 304) throw new Error("it answered " + answer.status);
        say("live", true);
      } catch (error) {
        say("no updates, the server does not answer: " + error.message, false);
      }
    }
  }

  async adopt(overview) {
    const followed = this.filters.scope === this.newest() && !this.chosen;
    this.overview = overview;
    this.source.adopt(overview);
    const gone = !this.source.files.some(file => file.key === this.filters.scope);
    if (followed || gone) this.filters.scope = this.newest();
    if (gone) this.chosen = false;
    this.show();
    await this.load(true);
  }
}

const app = new App(JSON.parse($("overview").textContent));
app.start();

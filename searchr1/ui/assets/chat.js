// The chat page: a question at a time, its events as they come.

let running = null;  // AbortController of the answer that is being written
const KINDS = { text: "loose", information: "forged" };  // blocks of the stream that the page shows under another name

const duration = seconds => seconds < 1 ? Math.max(1, Math.round(seconds * 1000)) + " ms" : seconds.toFixed(1) + " s";

async function request(path, options) {
  const headers = { "content-type": "application/json" };
  if ($("token").value) headers.authorization = "Bearer " + $("token").value;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached. Is searchr1 serve-chat still running?");
  }
  if (answer.status === 401) $("token").hidden = false;
  if (!answer.ok) {
    const content = await answer.json().catch(() => ({}));
    throw new Error(typeof content.detail === "string" ? content.detail : "The server answered " + answer.status + ".");
  }
  return answer;
}

const post = (path, body, signal) => request(path, { method: "POST", body: JSON.stringify(body), signal });

async function* linesOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try { part = await reader.read(); } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The connection broke before the answer was complete.");
    }
    if (part.done) return;
    const lines = (rest + part.value).split("\n");
    rest = lines.pop();
    yield* lines.filter(line => line.trim());
  }
}

// One question and what comes of it.
class Answer {
  constructor(question) {
    this.question = question;
    this.node = make("article");
    this.node.append(make("h2", "", question));
    this.ended = false;
    this.leave();
    $("answers").append(this.node);
  }

  leave() { this.kind = this.text = null; }  // the next text begins a block of its own

  add(node) {
    this.leave();
    this.node.append(node);
    return node;
  }

  handle(event) {
    const shown = { turn: "thinking", call: event.action === "access" ? "opening a page" : "searching",
                    started: "thinking", found: "reading", waiting: "waiting" }[event.type];
    if (shown) status(shown + " …", true);
    const method = "on_" + event.type;
    if (this[method]) this[method](event);
  }

  on_waiting(event) { status("waiting for " + plural(event.before, "other answer") + " to end …", true); }
  on_turn() { this.leave(); }

  on_text({ block: kind, text }) {
    if (kind !== this.kind) {
      const [node, inside] = block(KINDS[kind] || kind);
      this.text = document.createTextNode("");
      inside.append(this.text);
      this.node.append(node);
      this.kind = kind;
    }
    this.text.appendData(clean(text));
  }

  on_call({ action, arguments: queries }) {
    if (queries.length > 1) this.add(make("p", "note", plural(queries.length, "query", "queries") + ": " + queries.join(" · ")));
  }

  on_found({ action, results, seconds }) {
    const passages = results.flat(), box = make("details"), list = make("ol");
    const what = plural(passages.length, action === "access" ? "page" : "passage");
    box.append(make("summary", "", what + " in " + duration(seconds)), list);
    for (const passage of passages) list.append(passageNode(passage));
    this.results = this.add(box);
  }

  on_read({ text, tokens }) {
    if (!this.results) return;
    const box = make("details");
    box.append(make("summary", "", "as the model read it: " + plural(tokens, "token")), make("pre", "read", text.trim()));
    this.results.append(box);
  }

  on_tool_failed({ action, message }) {
    this.results = null;
    this.add(make("p", "error", (action === "access" ? "The page could not be opened: " : "The search failed: ") + message));
  }

  on_invalid({ text }) {
    const message = text.trim() ? " It was given a message about that, and goes on." : " It goes on.";
    this.add(make("p", "note", "The model neither searched nor answered." + message));
  }

  on_done({ answer, note, stats }) {
    this.ended = true;
    if (note) this.add(make("p", "note", "No answer: " + note + "."));
    const parts = [plural(stats.searches, "search", "searches"), plural(stats.turns, "turn"),
                   plural(stats.policy_tokens, "token") + " written, " + stats.read_tokens + " read",
                   duration(stats.seconds), Math.round(stats.tokens_per_second) + " tokens/s"];
    const line = make("p", "stats", parts.join(" · "));
    if (answer && navigator.clipboard) {
      line.append(" · ", button("link", "copy answer", () => navigator.clipboard.writeText(answer).catch(() => {})));
    }
    this.add(line);
  }

  on_error({ message }) {
    this.ended = true;
    const box = make("p", "error", message);
    box.append(button("", "Ask again", () => ask(this.question)));
    this.add(box);
  }

  stopped() {
    this.ended = true;
    this.add(make("p", "note", "Stopped."));
  }
}

function passageNode({ title, text, url, score }) {
  const item = make("li"), head = make("div", "head"), name = title || (url ? url : "(no title)");
  head.append(webLink(url, name) || make("b", "", name));
  if (typeof score === "number") head.append(make("span", "score", "score " + score.toFixed(2)));
  item.append(head, make("div", "passage", text));
  if (url) item.append(make("span", "where", url), button("link", "Read the page", () => openPage(url)));
  return item;
}

async function openPage(url) {
  status("opening " + url + " …", true);
  try {
    const page = await (await post("/page", { url }, AbortSignal.timeout(60000))).json();
    $("page-url").replaceChildren(webLink(page.url, page.url) || page.url);
    $("page-text").textContent = page.text + (page.left_out ? "\n\n… " + page.left_out + " more characters" : "");
    $("page").showModal();
    $("page").scrollTop = 0;
    status(running ? "…" : "", Boolean(running));
  } catch (error) { status(error.message, false); }
}

function status(text, busy) {
  $("status").textContent = text;
  $("status").classList.toggle("busy", busy);
}

const atBottom = () => window.innerHeight + window.scrollY > document.body.scrollHeight - 80;
const toBottom = () => window.scrollTo(0, document.body.scrollHeight);

function setRunning(controller) {
  running = controller;
  $("send").textContent = controller ? "Stop" : "Ask";
  $("send").classList.toggle("stop", Boolean(controller));
  $("clear").hidden = Boolean(controller) || !document.querySelector("article");
}

async function ask(question) {
  if (running) return;
  $("welcome").hidden = true;
  const answer = new Answer(question), controller = new AbortController();
  setRunning(controller);
  status("sent …", true);
  toBottom();
  let follow = true;  // until somebody reads further up
  try {
    const response = await post("/ask", { question }, controller.signal);
    for await (const line of linesOf(response.body)) {
      follow = atBottom();
      answer.handle(JSON.parse(line));
      if (follow) toBottom();
    }
    if (!answer.ended) throw new Error("The connection ended before the answer was complete.");
  } catch (error) {
    follow = atBottom();
    if (error.name === "AbortError") answer.stopped();
    else answer.on_error({ message: error.message });
  } finally {
    setRunning(null);
    status("", false);
    if (follow) toBottom();
    $("question").focus({ preventScroll: true });
    showAbout();
  }
}

function submit() {
  if (running) { running.abort(); return; }
  const question = $("question").value.trim();
  if (!question) return;
  $("question").value = "";
  grow();
  ask(question);
}

function grow() {
  $("question").style.height = "auto";
  $("question").style.height = $("question").scrollHeight + "px";
}

async function showAbout() {
  try {
    const about = await (await request("/about")).json();
    const parts = [about.model, "search: " + about.search];
    if (about.stopped) parts.push("the engine has stopped");
    $("about").textContent = parts.join(" · ");
    $("about").title = Object.entries(about).map(([name, value]) => name + ": " + value).join("\n");
    $("question").maxLength = about.question_characters;
  } catch (error) { $("about").textContent = error.message; }
}

$("composer").addEventListener("submit", event => { event.preventDefault(); submit(); });
$("token-form").addEventListener("submit", event => { event.preventDefault(); showAbout(); $("question").focus(); });
$("question").addEventListener("input", grow);
$("question").addEventListener("keydown", event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!running) submit();
});
$("clear").addEventListener("click", () => {
  for (const node of document.querySelectorAll("article")) node.remove();
  $("welcome").hidden = false;
  setRunning(null);
});
showAbout();

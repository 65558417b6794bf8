"use strict";
const $ = id => document.getElementById(id);
const LABELS = { think: "Thinking", search: "Search", access: "Open a page", answer: "Answer", text: "Text",
                 information: "Written by the model itself, not retrieved" };
let running = null;  // AbortController of the answer that is being written

// Everything that a model, a page or a server wrote enters this page as text, never as markup.
function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function button(text, className, action) {
  const node = make("button", className, text);
  node.type = "button";
  node.addEventListener("click", action);
  return node;
}

// A link to the web; null for any other kind of address, which must not become a link.
function webLink(address, text) {
  let url;
  try { url = new URL(address); } catch { return null; }
  if (url.protocol !== "http:" && url.protocol !== "https:") return null;
  const link = make("a", "", text);
  link.href = url.href;
  link.target = "_blank";
  link.rel = "noopener noreferrer";
  return link;
}

const count = (number, one, many) => number + " " + (number === 1 ? one : many || one + "s");
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

  leave() { this.kind = this.block = null; }  // the next text begins a block of its own

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

  on_waiting(event) { status("waiting for " + count(event.before, "other answer") + " to end …", true); }
  on_turn() { this.leave(); }

  on_text({ block, text }) {
    if (block !== this.kind) {
      const step = make("div", "step " + (block === "information" ? "made-up" : block));
      this.block = document.createTextNode("");
      const body = make("div", "body");
      body.append(this.block);
      step.append(make("span", "label", LABELS[block] || block), body);
      this.node.append(step);
      this.kind = block;
    }
    this.block.appendData(text);
  }

  on_call({ action, arguments: queries }) {
    if (queries.length > 1) this.add(make("p", "note", count(queries.length, "query", "queries") + ": " + queries.join(" · ")));
  }

  on_found({ action, results, seconds }) {
    const found = results.flat(), box = make("details"), list = make("ol");
    const what = action === "access" ? count(found.length, "page") : count(found.length, "passage");
    box.append(make("summary", "", what + " in " + duration(seconds)), list);
    for (const passage of found) list.append(passageNode(passage));
    this.found = this.add(box);
  }

  on_read({ text, tokens }) {
    if (!this.found) return;
    const box = make("details");
    box.append(make("summary", "", "as the model read it: " + count(tokens, "token")), make("pre", "read", text.trim()));
    this.found.append(box);
  }

  on_tool_failed({ action, message }) {
    this.found = null;
    this.add(make("p", "error", (action === "access" ? "The page could not be opened: " : "The search failed: ") + message));
  }

  on_invalid({ text }) {
    const told = text.trim() ? " It was told so, and goes on." : " It goes on.";
    this.add(make("p", "note", "The model neither searched nor answered." + told));
  }

  on_done({ answer, note, stats }) {
    this.ended = true;
    if (note) this.add(make("p", "note", "No answer: " + note + "."));
    const parts = [count(stats.searches, "search", "searches"), count(stats.turns, "turn"),
                   count(stats.policy_tokens, "token") + " written, " + stats.read_tokens + " read",
                   duration(stats.seconds), Math.round(stats.tokens_per_second) + " tokens/s"];
    const line = make("p", "stats", parts.join(" · "));
    if (answer && navigator.clipboard) {
      line.append(" · ", button("copy answer", "link", () => navigator.clipboard.writeText(answer).catch(() => {})));
    }
    this.add(line);
  }

  on_error({ message }) {
    this.ended = true;
    const box = make("p", "error", message);
    box.append(button("Ask again", "", () => ask(this.question)));
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
  if (url) item.append(make("span", "where", url), button("Read the page", "link", () => openPage(url)));
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
$("gate").addEventListener("submit", event => { event.preventDefault(); showAbout(); $("question").focus(); });
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

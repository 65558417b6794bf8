// The retrieval server's page: a query, its passages, the pages behind them.

const SHOWN = 100000;  // characters of a page
let latest = 0;

async function post(path, body) {
  const headers = { "content-type": "application/json" };
  if ($("token").value) headers.authorization = "Bearer " + $("token").value;
  const answer = await fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal: AbortSignal.timeout(60000) });
  const content = await answer.json().catch(() => ({}));
  if (answer.status === 401) $("token").hidden = false;
  if (!answer.ok) throw new Error(answer.status + ": " + (typeof content.detail === "string" ? content.detail : JSON.stringify(content.detail)));
  return content.result;
}

function split(contents) {
  const end = contents.indexOf("\n");
  if (end < 0) return ["", contents];
  return [contents.slice(0, end).trim().replace(/^"(.*)"$/, "$1"), contents.slice(end + 1).trim()];
}

function show(hit, rank) {
  const doc = hit.document, [title, text] = split(String(doc.contents));
  const item = make("li", ""), head = make("div", "head");
  head.append(make("span", "quiet", rank + "."), make("b", "", title || "(no title)"), make("span", "score", hit.score.toFixed(4)));
  item.append(head, make("div", "text", text), make("span", "quiet", "id " + doc.id + " "));
  if (doc.url) item.append(button("link", doc.url, () => openPage(doc.url)));
  return item;
}

async function openPage(url) {
  problem("");
  try {
    const [page] = await post("/access", { urls: [url] });
    const text = page ? page.contents : "This server has no such page.";
    $("page-url").textContent = clean(url);
    $("page-text").textContent = clean(text.slice(0, SHOWN) + (text.length > SHOWN ? "\n\n… " + (text.length - SHOWN) + " more characters" : ""));
    $("page").showModal();
  } catch (error) { problem(error.message); }
}

$("search").onsubmit = async event => {
  event.preventDefault();
  const number = ++latest, started = performance.now();
  problem("");
  $("took").textContent = "searching …";
  try {
    const [hits] = await post("/retrieve", { queries: [$("query").value], topk: Number($("topk").value) || 5, return_scores: true });
    if (number !== latest) return;
    $("hits").replaceChildren(...hits.map((hit, i) => show(hit, i + 1)));
    $("took").textContent = plural(hits.length, "passage") + " in " + Math.round(performance.now() - started) + " ms";
  } catch (error) {
    if (number !== latest) return;
    $("hits").replaceChildren();
    $("took").textContent = "";
    problem(error.message);
  }
};

fetch("/health").then(answer => answer.json()).then(about => {
  $("about").textContent = clean(Object.entries(about).map(([key, value]) => key + ": " + (typeof value === "number" ? count(value) : value)).join(" · "));
}).catch(error => { $("about").textContent = clean("no answer: " + error.message); });

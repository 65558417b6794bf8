// A trajectory's turns as blocks: thought, search, passages, answer; with each token's probability where it was logged.

// Least probability of each shade, from none to the strongest.
const SHADES = [0.9, 0.5, 0.2, 0.05, 0];
const OPENING = /<(think|search|access|answer|information)>/g;

// Where the parts of a policy's turn begin and end: {kind, start, end}, tags included, adding up to the whole text.
function segments(text) {
  const found = [];
  const add = (kind, start, end) => {
    const previous = found[found.length - 1];
    if (end <= start) return;
    if (kind === "loose" && previous && !text.slice(start, end).trim()) previous.end = end;
    else found.push({ kind, start, end });
  };
  let at = 0;
  // A think tag that the prompt or the environment opened.
  const closing = text.indexOf("</think>"), opening = text.indexOf("<think>");
  if (closing >= 0 && (opening < 0 || closing < opening)) {
    at = closing + "</think>".length;
    add("think", 0, at);
  }
  OPENING.lastIndex = at;
  for (let match = OPENING.exec(text); match; match = OPENING.exec(text)) {
    const tag = "</" + match[1] + ">", close = text.indexOf(tag, OPENING.lastIndex);
    const end = close < 0 ? text.length : close + tag.length;
    add("loose", at, match.index);
    add(match[1] === "information" ? "forged" : match[1], match.index, end);
    at = OPENING.lastIndex = end;
  }
  add("loose", at, text.length);
  if (found.length > 1 && found[0].kind === "loose" && !text.slice(0, found[0].end).trim()) {
    found[1].start = 0;
    found.shift();
  }
  return found;
}

// Tokens of a turn as {start, end, surprise} in UTF-16 units; null if they were not logged. Lengths count characters.
function tokensOf(turn) {
  const { token_chars: lengths, token_surprise: surprise } = turn;
  if (!Array.isArray(lengths) || !Array.isArray(surprise) || lengths.length !== surprise.length) return null;
  const letters = Array.from(turn.policy_text), tokens = [];
  let letter = 0, at = 0;
  for (let i = 0; i < lengths.length; i++) {
    const start = at;
    for (let n = 0; n < lengths[i] && letter < letters.length; n++) at += letters[letter++].length;
    tokens.push({ start, end: at, surprise: surprise[i] });
  }
  return at === turn.policy_text.length ? tokens : null;
}

function shadeOf(surprise) {
  const probability = Math.exp(-surprise / 1000);
  return SHADES.findIndex(least => probability >= least);
}

function tokenTip(token, text) {
  const probability = Math.exp(-token.surprise / 1000);
  const shown = probability >= 0.001 || probability === 0 ? probability.toFixed(3) : probability.toExponential(1);
  return [make("code", "", text.replace(/\n/g, "⏎").replace(/ /g, "␣")), make("div", "", `probability ${shown}`), make("div", "", `log-probability ${(-token.surprise / 1000).toFixed(3)}`)];
}

function shaded(node, text, tokens, start, end) {
  for (const token of tokens) {
    const from = Math.max(token.start, start), to = Math.min(token.end, end);
    if (to <= from) continue;
    const span = make("span", "token p" + shadeOf(token.surprise), text.slice(from, to));
    const tip = event => showTip(tokenTip(token, text.slice(token.start, token.end)), event.clientX, event.clientY);
    span.onpointerenter = tip;
    span.onpointerleave = hideTip;
    node.append(span);
  }
}

// Tags dimmed, the rest plain.
function tagged(node, text) {
  let at = 0;
  for (const match of text.matchAll(/<\/?(?:think|search|access|answer|information)>/g)) {
    node.append(clean(text.slice(at, match.index)), make("span", "tag", match[0]));
    at = match.index + match[0].length;
  }
  node.append(clean(text.slice(at)));
}

// Passages, each title in bold.
function passages(node, text) {
  let at = 0;
  for (const match of text.matchAll(/^(?:<information>)?(Doc \d+\(Title: ".*?"\)|\[Doc \d+\]\(.*?\):)/gm)) {
    const start = match.index + match[0].length - match[1].length;
    if (start > at) tagged(node, text.slice(at, start));
    node.append(make("b", "passage", match[1]));
    at = start + match[1].length;
  }
  tagged(node, text.slice(at));
}

function seconds(value) { return typeof value === "number" ? compact(value) + " s" : ""; }

// All blocks of a logged trajectory.
function blocksOf(body, shade) {
  const nodes = [];
  body.turns.forEach((turn, number) => {
    const text = typeof turn.policy_text === "string" ? turn.policy_text : "", tokens = shade ? tokensOf(turn) : null;
    nodes.push(make("h3", "turn", `Turn ${number + 1} · ${turn.action} · ${plural(turn.policy_tokens || 0, "token")}`));
    for (const part of segments(text)) {
      const [node, inside] = block(part.kind);
      if (tokens) shaded(inside, text, tokens, part.start, part.end);
      else tagged(inside, text.slice(part.start, part.end).trim());
      nodes.push(node);
    }
    if (turn.tool_text || turn.tool_error) {
      const tool = turn.action === "search" || turn.action === "access";
      const note = tool ? [plural(turn.tool_tokens || 0, "token"), seconds(turn.tool_seconds)].filter(Boolean).join(", ") : "";
      const [node, inside] = block(tool ? "information" : "message", note);
      if (turn.tool_error) node.insertBefore(make("p", "bad", "The tool failed: " + turn.tool_error), inside);
      passages(inside, typeof turn.tool_text === "string" ? turn.tool_text.trim() : "");
      nodes.push(node);
    }
  });
  return nodes;
}

function hasTokens(body) { return body.turns.some(turn => tokensOf(turn) !== null); }

function legendOfShades() {
  const legend = make("div", "shades"), names = ["90% and more", "50 to 90%", "20 to 50%", "5 to 20%", "less than 5%"];
  legend.append("Probability of each token when it was sampled: ", ...names.map((name, i) => make("span", "token p" + i, name)));
  return legend;
}

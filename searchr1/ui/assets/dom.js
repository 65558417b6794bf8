"use strict";
// Everything that a model, a page, a data file or a server wrote enters the page as text, never as markup.

const $ = id => document.getElementById(id);

// Control characters and characters that turn the direction of text, shown as the replacement character.
const UNSEEN = /[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]/g;
const clean = text => String(text).replace(UNSEEN, "\ufffd");

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined && text !== null) node.textContent = clean(text);
  return node;
}

function button(className, text, action) {
  const node = make("button", className, text);
  node.type = "button";
  node.onclick = action;
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

function option(value, text) {
  const node = make("option", "", text);
  node.value = value;
  return node;
}

function compact(value) {
  if (typeof value !== "number" || !Number.isFinite(value)) return "not finite";
  const size = Math.abs(value);
  if (size >= 1e6 || (size > 0 && size < 1e-3)) return value.toExponential(1);
  if (size >= 1e4) return Number((value / 1e3).toPrecision(3)) + "k";
  return String(Number(value.toPrecision(size >= 100 ? 4 : 3)));
}

const count = value => Number(value).toLocaleString("en-US");
const plural = (number, one, many) => count(number) + " " + (number === 1 ? one : many || one + "s");
const short = (text, most) => text.length <= most ? text : text.slice(0, most - 1) + "…";

const LABELS = {
  think: "think", search: "search", access: "open page", answer: "answer", loose: "text outside tags",
  information: "information", forged: "information that the model made up", message: "message to the model",
};

// A block of a trajectory, and the node that holds its text.
function block(kind, note) {
  const node = make("section", "block " + kind), head = make("h4", "", LABELS[kind]);
  if (note) head.append(make("small", "", note));
  const text = make("div", "text");
  node.append(head, text);
  return [node, text];
}

// The line that reports a problem.
function problem(text) {
  $("problem").textContent = clean(text || "");
  $("problem").hidden = !text;
}

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

// The tip that follows the pointer.
function showTip(lines, x, y) {
  const tip = $("tip");
  tip.replaceChildren(...lines);
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(x + 14, innerWidth - box.width - 8)) + "px";
  tip.style.top = (y + 18 + box.height > innerHeight ? y - box.height - 10 : y + 18) + "px";
}

function hideTip() { $("tip").hidden = true; }

function problem(text) {
  $("problem").textContent = clean(text || "");
  $("problem").hidden = !text;
}

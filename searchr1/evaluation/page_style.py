"""How results.html looks (light, and dark where the reader's system is), and how text gets into it."""

from __future__ import annotations

import html
import re

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def escape(value: object) -> str:
    """Any text as HTML that shows it and does nothing else.

    Control characters, halves of surrogate pairs and characters that turn the direction of text become U+FFFD.
    """
    return html.escape(_CONTROL.sub("\ufffd", str(value)), quote=True)


STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ground: #f6f7f9; --ink: #1c2430; --soft: #5d6b7e; --rule: #e1e6ed;
  --policy: #eef4ff; --tool: #f3f4f6; --good: #14804a; --bad: #bc2c1a;
  --c0: #2f6fde; --c1: #e0752d; --c2: #24945b; --c3: #8e4ec6; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #1a2029; --ground: #11151b; --ink: #dfe6ef; --soft: #93a1b4; --rule: #2b3441;
    --policy: #182742; --tool: #20262f; --good: #4cc38a; --bad: #ff8b7a;
    --c0: #6ba1ff; --c1: #f79a5a; --c2: #4cc38a; --c3: #bf8af0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 24px; margin: 0; overflow-wrap: anywhere; }
h1 + p { color: var(--soft); margin: 2px 0 14px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 40px 0 12px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 12px; margin-top: 18px; }
.tile, .card, .table { background: var(--paper); border: 1px solid var(--rule); border-radius: 10px; }
.tile { padding: 12px 14px; }
.tile span { color: var(--soft); font-size: 13px; display: block; }
.tile b { font-size: 21px; font-weight: 600; font-variant-numeric: tabular-nums; }
.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 9px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
th { color: var(--soft); font-weight: 500; font-size: 13px; }
td:first-child, th:first-child { text-align: left; }
tr:last-child td { border-bottom: 0; }
tr.ours td { font-weight: 600; }
.settings td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.note { color: var(--soft); font-size: 13px; max-width: 80em; }
.bars { padding: 14px; }
.bars svg { width: 100%; height: auto; max-width: 860px; display: block; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
svg .name { fill: var(--ink); font-size: 12.5px; }
.grid { stroke: var(--rule); }
.span { stroke: var(--c); stroke-width: 2; }
.dot { fill: var(--c); }
.published { fill: none; stroke: var(--soft); stroke-width: 1.5; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 13px; color: var(--soft); }
.key::before { content: ""; display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin-right: 6px;
  background: var(--c); }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.card { margin: 8px 0; }
summary { cursor: pointer; padding: 9px 14px; overflow-wrap: anywhere; }
summary small, .meta { color: var(--soft); font-size: 12.5px; }
.inside { padding: 0 14px 12px; }
.meta { margin: 0 0 8px; overflow-wrap: anywhere; }
pre { margin: 3px 0 0; padding: 8px 11px; border-radius: 7px; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.5 ui-monospace, monospace; max-height: 26em; overflow-y: auto; }
.policy { background: var(--policy); border-left: 3px solid var(--c0); }
.tool { background: var(--tool); border-left: 3px solid var(--soft); }
.good { color: var(--good); } .bad { color: var(--bad); }
"""

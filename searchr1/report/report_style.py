"""The style sheet of the report page: light, dark where the reader's system is dark, one column on a phone."""

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ground: #f6f7f9; --ink: #1c2430; --soft: #5d6b7e; --rule: #e1e6ed;
  --good: #14804a; --bad: #bc2c1a;
  --c0: #2f6fde; --c1: #e0752d; --c2: #24945b; --c3: #8e4ec6; --c4: #c2417f; --c5: #7a8798; --c6: #b59410; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #1a2029; --ground: #11151b; --ink: #dfe6ef; --soft: #93a1b4; --rule: #2b3441;
    --good: #4cc38a; --bad: #ff8b7a;
    --c0: #6ba1ff; --c1: #f79a5a; --c2: #4cc38a; --c3: #bf8af0; --c4: #f07fb4; --c5: #9aa7b8; --c6: #dcc04c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 24px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 40px 0 12px; }
h1 + p, h2 + p { color: var(--soft); margin: 2px 0 14px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); gap: 12px; margin-top: 18px; }
.tile, figure, .table { background: var(--paper); border: 1px solid var(--rule); border-radius: 10px; }
.tile { padding: 12px 14px; }
.tile span { color: var(--soft); font-size: 13px; display: block; }
.tile b { font-size: 21px; font-weight: 600; font-variant-numeric: tabular-nums; }
.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 12px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
th { color: var(--soft); font-weight: 500; font-size: 13px; }
th:first-child, td:first-child { text-align: left; }
tr:last-child td { border-bottom: 0; font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(360px, 100%), 1fr)); gap: 14px; }
figure { margin: 0; padding: 12px 14px; }
figcaption { font-weight: 600; font-size: 14px; }
figure p { color: var(--soft); font-size: 12.5px; margin: 0; }
svg { width: 100%; height: auto; display: block; }
svg text { font: 10.5px system-ui, sans-serif; fill: var(--soft); }
.grid { stroke: var(--rule); }
.line, .raw { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; }
.raw { opacity: .3; stroke-width: 1; }
.area { fill: var(--c); opacity: .8; }
.dot { fill: var(--c); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 12.5px; color: var(--soft); }
.key::before { content: ""; display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin-right: 6px;
  background: var(--c); }
.c0, .k0 { --c: var(--c0); } .c1, .k1 { --c: var(--c1); } .c2, .k2 { --c: var(--c2); } .c3, .k3 { --c: var(--c3); }
.c4, .k4 { --c: var(--c4); } .c5, .k5 { --c: var(--c5); } .c6, .k6 { --c: var(--c6); }
.turn { margin-top: 8px; font-size: 12px; color: var(--soft); }
.good { color: var(--good); } .bad { color: var(--bad); }
"""

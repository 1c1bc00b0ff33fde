"""How the inspect page looks. Colours follow the reader's light or dark preference."""

STYLE = """
:root { color-scheme: light dark; --bg: #fbfbfa; --fg: #1d2125; --dim: #68707a; --line: #dcdfe3;
  --card: #fff; --fill: 22%; --text: 34%; }
@media (prefers-color-scheme: dark) { :root { --bg: #14171a; --fg: #e4e7ea; --dim: #98a1ab;
  --line: #30363c; --card: #1b1f23; --fill: 30%; --text: 72%; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--fg);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 20px 16px 60px; }
h1 { margin: 0; font-size: 30px; letter-spacing: -0.02em; }
h2 { margin: 44px 0 4px; font-size: 21px; letter-spacing: -0.01em; }
h3 { margin: 20px 0 2px; font-size: 16px; }
p { margin: 2px 0 12px; color: var(--dim); max-width: 75ch; }
.cards { display: grid; gap: 10px; grid-template-columns: repeat(auto-fill, minmax(135px, 1fr)); }
.cards div { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 10px 12px; }
.cards b { display: block; font-size: 19px; }
.cards span { color: var(--dim); font-size: 13px; }
.k-map { --h: 150; } .k-reduce { --h: 38; } .k-matmul { --h: 214; } .k-dense_matmul { --h: 190; }
.k-attention { --h: 335; } .stage, tr { --h: 265; }
.k-map.stage, tr.k-map { --h: 150; } .k-reduce.stage, tr.k-reduce { --h: 38; }
.k-matmul.stage, tr.k-matmul { --h: 214; } .k-attention.stage, tr.k-attention { --h: 335; }
.k-dense_matmul.stage, tr.k-dense_matmul { --h: 190; }
.legend { display: flex; gap: 16px; flex-wrap: wrap; font-size: 14px; margin-bottom: 6px; }
i { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 6px;
  background: hsl(var(--h, 265) 65% 52%); }
.picture { max-width: 820px; }
svg { width: 100%; height: auto; display: block; font-family: inherit; }
svg text { fill: var(--fg); font-size: 12px; }
.box { fill: hsl(var(--h, 265) 65% 52% / var(--fill)); stroke: hsl(var(--h, 265) 60% 52% / 0.75); }
.op .box { fill: var(--card); }
.band { fill: hsl(var(--h, 265) 65% 52% / 0.16); }
.arc { fill: none; stroke: var(--dim); stroke-opacity: 0.45; }
.loop { fill: none; stroke: var(--dim); stroke-dasharray: 5 4; stroke-opacity: 0.7; }
svg .loop-name { fill: var(--dim); font-size: 12px; text-anchor: end; }
svg .name { font-weight: 650; font-size: 13px; }
svg .kind { font-weight: 400; fill: hsl(var(--h, 265) 55% var(--text)); }
svg .code { font: 10.5px ui-monospace, Menlo, Consolas, monospace; fill: var(--dim); }
svg .detail { fill: var(--dim); font-size: 11px; }
.stage:hover .band { fill: hsl(var(--h, 265) 65% 52% / 0.4); }
.stage:hover .box { stroke-width: 2; }
.arena { width: auto; height: 250px; max-width: none; }
svg .tick { fill: var(--dim); font-size: 11px; text-anchor: middle; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 10px;
  background: var(--card); padding: 2px; }
table { border-collapse: collapse; font-size: 13px; width: 100%; }
th, td { padding: 7px 10px; text-align: left; vertical-align: top; white-space: nowrap;
  border-top: 1px solid var(--line); font-variant-numeric: tabular-nums; }
thead th { border: 0; color: var(--dim); font-weight: 500; }
td.code { font: 12px/1.55 ui-monospace, Menlo, Consolas, monospace; }
td.code:nth-child(3) { white-space: normal; min-width: 300px; }
small { display: block; color: var(--dim); font: 12px/1.5 system-ui, sans-serif; }
tr.loop-row td { color: var(--dim); padding: 5px 10px; border-top: 2px dashed var(--line); }
tr.loop-row.end td { padding: 0; }
tr.total td { font-weight: 650; border-top: 2px solid var(--line); }
tr.lit { background: hsl(var(--h, 265) 65% 52% / 0.18); }
.bar { width: 90px; height: 6px; border-radius: 3px; background: var(--line); margin: 7px 0 2px; }
.bar div { height: 100%; border-radius: 3px; background: hsl(var(--h, 265) 65% 52%); }
"""

SCRIPT = """
addEventListener("hashchange", light); light();
function light() {
  document.querySelectorAll("tr.lit").forEach(row => row.classList.remove("lit"));
  const row = location.hash && document.getElementById(location.hash.slice(1));
  if (row) { row.classList.add("lit"); row.scrollIntoView({block: "center"}); }
}
"""

"""A self-contained HTML page in this project's style: no script, nothing loaded."""

from __future__ import annotations

import html
from collections.abc import Sequence

_STYLE = """
:root { color-scheme: light dark;
  --page:#f6f7f9; --card:#ffffff; --ink:#1b2330; --soft:#5c6778; --line:#e2e6ec;
  --base:#c2410c; --adapted:#0f766e; --int8:#1d4ed8; --good:#0f766e; --bad:#c2410c;
  --raw:#0f766e44; --mark:#7c3aed; }
@media (prefers-color-scheme: dark) { :root {
  --page:#10141b; --card:#181e28; --ink:#e7ebf2; --soft:#97a3b6; --line:#2a3341;
  --base:#fb923c; --adapted:#2dd4bf; --int8:#7aa2ff; --good:#2dd4bf; --bad:#fb923c;
  --raw:#2dd4bf44; --mark:#c4a1ff; } }
* { box-sizing:border-box }
body { margin:0; background:var(--page); color:var(--ink);
  font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif }
main { max-width:860px; margin:0 auto; padding:40px 20px 64px }
h1 { font-size:30px; line-height:1.2; margin:0 0 8px; letter-spacing:-.01em }
h2 { font-size:18px; margin:0 0 4px }
p { margin:0 0 14px; color:var(--soft); max-width:70ch }
.lead { font-size:17px; margin-bottom:26px }
section { background:var(--card); border:1px solid var(--line); border-radius:12px;
  padding:22px 24px; margin:18px 0 }
.figures { display:grid; grid-template-columns:repeat(auto-fit,minmax(180px,1fr)); gap:14px }
.figure { background:var(--card); border:1px solid var(--line); border-radius:12px;
  padding:16px 18px }
.figure b { display:block; font-size:30px; line-height:1.15; font-variant-numeric:tabular-nums }
.figure span { color:var(--soft); font-size:14px }
svg { width:100%; height:auto; display:block; font-size:14px }
svg text { fill:var(--ink) } svg .name { text-anchor:end } svg .value { font-weight:600 }
svg .tick { fill:var(--soft); font-size:12px } svg .end { text-anchor:end }
svg .middle { text-anchor:middle } svg .wer { fill:var(--mark) }
svg .grid { stroke:var(--line) } svg polyline { fill:none; stroke-linejoin:round }
svg .raw { stroke:var(--raw); stroke-width:1 } svg .smooth { stroke:var(--adapted);
  stroke-width:2.5 }
svg .werline { stroke:var(--mark); stroke-width:1.5; stroke-dasharray:4 4 }
svg .point { fill:var(--mark) }
svg .base { fill:var(--base) } svg .adapted { fill:var(--adapted) } svg .int8 { fill:var(--int8) }
.legend { font-size:13px; color:var(--soft); margin:8px 0 0 } .legend i { font-style:normal;
  font-weight:700 } .l { color:var(--adapted) } .w { color:var(--mark) }
.scroll { overflow-x:auto }
table { border-collapse:collapse; width:100%; font-size:14.5px; margin-top:8px }
th, td { text-align:left; vertical-align:top; padding:8px 10px 8px 0;
  border-top:1px solid var(--line) }
th { color:var(--soft); font-weight:600; white-space:nowrap; width:1% ; padding-right:18px }
tr.first > * { border-top:2px solid var(--line); padding-top:12px }
tr.last > * { padding-bottom:12px }
mark { background:none; color:var(--bad); font-weight:600; text-decoration:underline;
  text-decoration-thickness:1.5px; text-underline-offset:3px }
del { color:var(--bad); opacity:.75 }
footer { color:var(--soft); font-size:13px; margin-top:26px }
code { font:13px/1.4 ui-monospace,Menlo,Consolas,monospace }
"""


def page(title: str, heading: str, lead: str, sections: Sequence[str], footer: str) -> str:
    """Put a page together; everything but the title is HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>"
        f'<h1>{heading}</h1><p class="lead">{lead}</p>'
        + "".join(sections)
        + f"<footer>{footer}</footer></main></body></html>\n"
    )


def section(title: str, text: str, body: str) -> str:
    """A card with a title, a paragraph and a body, the last two in HTML."""
    return f"<section><h2>{escape(title)}</h2><p>{text}</p>{body}</section>"


def escape(text: object) -> str:
    """Text that stands for itself in HTML."""
    return html.escape(str(text))

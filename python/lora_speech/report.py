"""The demonstration's report as one self-contained HTML page: no script, nothing loaded."""

from __future__ import annotations

import difflib
import html
from typing import Any

from lora_speech.charts import bar_chart, line_chart

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


def render_report(report: dict[str, Any]) -> str:
    """Write the page.

    Parameters
    ----------
    report : dict
        What `demo.run_demo` returns.

    Returns
    -------
    str
        HTML with its style and charts inside.
    """
    speed, training = report["tokens_per_second"], report["training"]
    accent, second = report["accent_name"], report["second_adapter"]
    equal = report["mixed_batch_equal"]
    sections = [
        _figures(report),
        _section(
            "Word error rate",
            f"On {report['settings']['test']} noisy sentences by speakers with "
            f"{_e(accent)} that the training never heard. The adapter stays apart "
            "from the base; with INT8 only the base is quantized.",
            bar_chart(
                [
                    _bar("base", report["wer_base"], "base"),
                    _bar("base + LoRA", report["wer_adapted"], "adapted"),
                    _bar("INT8 base + LoRA", report["wer_int8_adapted"], "int8"),
                ],
                label="Word error rates",
            ),
        ),
        _section(
            "Learning the accent",
            f"{training['trainable_parameters']:,} trainable of {training['parameters']:,} "
            f"parameters (rank {training['rank']}), {len(training['losses'])} steps on "
            f"{training['utterances']} utterances in {training['seconds']:.0f}&nbsp;s.",
            line_chart(training["losses"], training["validations"], label="Training loss")
            + '<p class="legend"><i class="l">—</i> loss per step (thin) and smoothed &nbsp; '
            '<i class="w">●</i> word error rate on the validation sentences, right axis</p>',
        ),
        _section(
            "Decoding speed",
            f"Features to {speed['new_tokens']} tokens, encoder included, batch 1, "
            f"{speed['threads']} thread{'s' * (speed['threads'] > 1)}; medians of measurements "
            "taken in turns in this run.",
            bar_chart(
                [
                    (
                        "lora_kernels, INT8 + LoRA",
                        speed["ours"],
                        f"{speed['ours']:,.0f} tokens/s",
                        "int8",
                    ),
                    (
                        "transformers + peft",
                        speed["transformers_peft"],
                        f"{speed['transformers_peft']:,.0f} tokens/s",
                        "base",
                    ),
                ],
                label="Tokens per second",
            ),
        ),
        _section(
            "Many adapters, one base",
            f"A second adapter learnt {_e(second['accent_name'])}: "
            f"{second['wer_base']:.1%} with the base, {second['wer_adapted']:.1%} with it. One "
            "batch that mixes both adapters and the bare base gives "
            + (
                "<b>exactly the tokens</b> that each utterance gives alone."
                if equal
                else "<b>other tokens</b> than the utterances give alone; that should not happen."
            ),
            "",
        ),
        _section("Transcripts", "What differs from the reference is marked.", _transcripts(report)),
    ]
    environment = report["environment"]
    footer = (
        f"Base <code>{_e(report['base'])}</code>; all speech synthesised with espeak-ng. Made in "
        f"{report['seconds']:.0f}&nbsp;s with torch {_e(environment['torch'])}, transformers "
        f"{_e(environment['transformers'])}, peft {_e(environment['peft'])} on "
        f"{environment['cores']} cores ({_e(environment['machine'])})."
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>lora_kernels: demonstration</title><style>{_STYLE}</style></head><body><main>"
        "<h1>A Whisper learns an accent</h1>"
        '<p class="lead">LoRA through fused operators, an INT8 base, adapters that stay live and '
        "mix within a batch.</p>" + "".join(sections) + f"<footer>{footer}</footer>"
        "</main></body></html>\n"
    )


def _figures(report: dict[str, Any]) -> str:
    speed = report["tokens_per_second"]
    cards = [
        (f"{report['wer_base']:.1%}", "word errors before", "base"),
        (f"{report['wer_int8_adapted']:.1%}", "after LoRA, on an INT8 base", "int8"),
        (f"{speed['ratio']:.1f}×", "the decoding speed of transformers + peft", "adapted"),
        (
            "equal" if report["mixed_batch_equal"] else "not equal",
            "mixed batch and each row alone",
            "adapted" if report["mixed_batch_equal"] else "base",
        ),
    ]
    inner = "".join(
        f'<div class="figure"><b style="color:var(--{colour})">{_e(value)}</b>'
        f"<span>{_e(text)}</span></div>"
        for value, text, colour in cards
    )
    return f'<div class="figures">{inner}</div>'


def _section(title: str, text: str, body: str) -> str:
    return f"<section><h2>{_e(title)}</h2><p>{text}</p>{body}</section>"


def _bar(name: str, rate: float, style: str) -> tuple[str, float, str, str]:
    return name, rate, f"{rate:.1%}", style


def _transcripts(report: dict[str, Any]) -> str:
    rows = []
    for item in report["transcripts"]:
        rows.append(f'<tr class="first"><th>said</th><td>{_e(item["reference"])}</td></tr>')
        for key, name in (("base", "base"), ("adapted", "LoRA"), ("int8", "INT8 + LoRA")):
            last = ' class="last"' if key == "int8" else ""
            marked = _marked(item["reference"], item[key])
            rows.append(f"<tr{last}><th>{name}</th><td>{marked}</td></tr>")
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'


def _marked(reference: str, hypothesis: str) -> str:
    """Write a hypothesis with wrong words marked and missing ones struck through."""
    said, heard = reference.lower().split(), hypothesis.split()
    matcher = difflib.SequenceMatcher(None, said, [w.lower() for w in heard], autojunk=False)
    words = []
    for tag, a, b, c, d in matcher.get_opcodes():
        text = _e(" ".join(heard[c:d]))
        if tag == "equal":
            words.append(text)
        elif c < d:
            words.append(f"<mark>{text}</mark>")
        else:
            words.append(f"<del>{_e(' '.join(said[a:b]))}</del>")
    return " ".join(words) or "<del>nothing</del>"


def _e(text: object) -> str:
    return html.escape(str(text))

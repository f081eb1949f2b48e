"""The demonstration's report as one self-contained HTML page: no script, nothing loaded."""

from __future__ import annotations

import difflib
from typing import Any

from lora_speech.charts import bar_chart, line_chart
from lora_speech.page import escape, page, section


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
        section(
            "Word error rate",
            f"On {report['settings']['test']} noisy sentences by speakers with "
            f"{escape(accent)} that the training never heard. The adapter stays apart "
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
        section(
            "Learning the accent",
            f"{training['trainable_parameters']:,} trainable of {training['parameters']:,} "
            f"parameters (rank {training['rank']}), {len(training['losses'])} steps on "
            f"{training['utterances']} utterances in {training['seconds']:.0f}&nbsp;s.",
            line_chart(training["losses"], training["validations"], label="Training loss")
            + '<p class="legend"><i class="l">—</i> loss per step (thin) and smoothed &nbsp; '
            '<i class="w">●</i> word error rate on the validation sentences, right axis</p>',
        ),
        section(
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
        section(
            "Many adapters, one base",
            f"A second adapter learnt {escape(second['accent_name'])}: "
            f"{second['wer_base']:.1%} with the base, {second['wer_adapted']:.1%} with it. One "
            "batch that mixes both adapters and the bare base gives "
            + (
                "<b>exactly the tokens</b> that each utterance gives alone."
                if equal
                else "<b>other tokens</b> than the utterances give alone; that should not happen."
            ),
            "",
        ),
        section("Transcripts", "What differs from the reference is marked.", _transcripts(report)),
    ]
    environment = report["environment"]
    versions = ", ".join(
        f"{name} {escape(environment[name])}" for name in ("torch", "transformers", "peft")
    )
    footer = (
        f"Base <code>{escape(report['base'])}</code>; all speech synthesised with espeak-ng. Made "
        f"in {report['seconds']:.0f}&nbsp;s with {versions} on {environment['cores']} cores "
        f"({escape(environment['machine'])})."
    )
    return page(
        "lora_kernels: demonstration",
        "A Whisper learns an accent",
        "LoRA through fused operators, an INT8 base, adapters that stay live and mix within a "
        "batch.",
        sections,
        footer,
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
        f'<div class="figure"><b style="color:var(--{colour})">{escape(value)}</b>'
        f"<span>{escape(text)}</span></div>"
        for value, text, colour in cards
    )
    return f'<div class="figures">{inner}</div>'


def _bar(name: str, rate: float, style: str) -> tuple[str, float, str, str]:
    return name, rate, f"{rate:.1%}", style


def _transcripts(report: dict[str, Any]) -> str:
    rows = []
    for item in report["transcripts"]:
        rows.append(f'<tr class="first"><th>said</th><td>{escape(item["reference"])}</td></tr>')
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
        text = escape(" ".join(heard[c:d]))
        if tag == "equal":
            words.append(text)
        elif c < d:
            words.append(f"<mark>{text}</mark>")
        else:
            words.append(f"<del>{escape(' '.join(said[a:b]))}</del>")
    return " ".join(words) or "<del>nothing</del>"

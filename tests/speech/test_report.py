"""The HTML report: self-contained, well-formed, and safe with any text."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from lora_speech.charts import bar_chart, line_chart, nice_ceiling, smooth
from lora_speech.demo.report import render_report


@pytest.fixture
def report() -> dict[str, Any]:
    return {
        "wer_base": 0.46,
        "wer_adapted": 0.08,
        "wer_int8_adapted": 0.085,
        "mixed_batch_equal": True,
        "tokens_per_second": {
            "ours": 2500.0,
            "transformers_peft": 310.0,
            "ratio": 8.1,
            "new_tokens": 56,
            "threads": 2,
        },
        "second_adapter": {
            "accent": "en-029",
            "accent_name": "a Caribbean accent",
            "wer_base": 0.3,
            "wer_adapted": 0.1,
        },
        "accent": "en-gb-scotland",
        "accent_name": "a Scottish accent",
        "base": "<script>alert(1)</script>",
        "training": {
            "losses": [3.0, 2.0, 1.5, 1.0],
            "validations": [[2, 0.5], [4, 0.25]],
            "best_step": 4,
            "trainable_parameters": 1000,
            "parameters": 20000,
            "rank": 16,
            "utterances": 100,
            "seconds": 12.0,
        },
        "transcripts": [
            {"reference": "turn left", "base": "turn lift <b>", "adapted": "turn left", "int8": ""}
        ],
        "settings": {"test": 60},
        "environment": {
            "torch": "2",
            "transformers": "5",
            "peft": "0",
            "cores": 2,
            "machine": "x86_64",
        },
        "seconds": 200.0,
    }


class Balance(HTMLParser):
    """Checks that every tag that is opened is closed, and collects what would be loaded."""

    VOID = ("meta", "br", "rect", "line", "circle", "polyline")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.loads += [v or "" for k, v in attributes if k in ("src", "href", "srcset")]
        if tag in ("script", "link", "iframe", "img"):
            self.loads.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_page_is_balanced_and_loads_nothing(report: dict[str, Any]) -> None:
    page = render_report(report)
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    assert parser.loads == []
    assert "url(" not in page
    assert "@import" not in page
    assert "prefers-color-scheme: dark" in page


def test_page_shows_the_figures_and_marks_errors(report: dict[str, Any]) -> None:
    page = render_report(report)
    for text in ("46.0%", "8.0%", "8.5%", "8.1×", "2,500 tokens/s", "exactly the tokens"):
        assert text in page
    assert "turn <mark>lift &lt;b&gt;</mark>" in page
    assert "<del>turn left</del>" in page
    assert "<script>" not in page
    report["mixed_batch_equal"] = False
    assert "not equal" in render_report(report)


def test_charts_are_xml() -> None:
    for svg in (
        bar_chart([("a<b", 0.0, "0 %", "base"), ("c", 2.0, "2", "int8")], label='"x"'),
        line_chart([1.0], [], label="one"),
        line_chart([3.0, 2.0, float("1e-9")], [(2, 1.5)], label="more"),
        line_chart([], [], label="none"),
    ):
        ElementTree.fromstring(svg)


def test_axis_and_smoothing() -> None:
    assert [nice_ceiling(v) for v in (0.0, 0.7, 1.0, 3.1, 41.0)] == [1.0, 0.8, 1.0, 4.0, 50.0]
    assert smooth([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])

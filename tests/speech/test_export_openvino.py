"""OpenVINO IR: torch's tokens in floating point, nearly all of its words in INT8."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pytest
from exported import compare, real_digits, spoken

from lora_speech.errors import ModelError, SpeechError
from lora_speech.export.run import ExportReport, export_model

pytestmark = [
    pytest.mark.skipif(
        find_spec(name) is None,
        reason=f"needs {name}: pip install '.[openvino]'",
    )
    for name in ("openvino", "nncf")
]


CPU_INFO = Path("/proc/cpuinfo")
# Without VNNI OpenVINO multiplies INT8 another way, and a word more is heard otherwise.
MOST_WRONG = 0.05 if CPU_INFO.is_file() and "vnni" in CPU_INFO.read_text() else 0.1


@pytest.fixture(scope="module")
def live(
    tiny_whisper_folder: Path,
    adapters: Any,
    tones: list[Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> ExportReport:
    output = tmp_path_factory.mktemp("live") / "out"
    return export_model(tiny_whisper_folder, "openvino", output, adapters=adapters, check=tones)


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    spoken(1, seed=1)  # skips where nothing can speak
    output = tmp_path_factory.mktemp("int8") / "out"
    return export_model("shipped", "openvino", output, int8=True, max_wer=MOST_WRONG)


def test_live_adapters_give_the_tokens_of_torch(live: ExportReport) -> None:
    assert live.check.identical and live.check.wer == 0
    texts = {c.adapter: c.got for c in live.check.comparisons[:3]}
    assert len(set(texts.values())) == 3 and set(texts) == {None, "all", "some"}
    assert max(c.tokens for c in live.check.comparisons) > 10


def test_rows_of_a_batch_have_adapters_of_their_own(live: ExportReport) -> None:
    """Through the graphs themselves, with caches as states, as a program would call them."""
    recognizer: Any = live.target.open(live.output)
    rng = np.random.default_rng(0)
    features = rng.standard_normal((3, 80, 200), dtype=np.float32)

    def logits(rows: slice, ids: list[int]) -> np.ndarray:
        extra = {**recognizer.adapters, "adapter_ids": np.array(ids, np.int32)}
        found = recognizer.run("encode", {"features": features[rows].copy(), **extra})
        cross = {name: value.copy() for name, value in found.items()}
        prompt = np.tile(np.array([recognizer.decoding.prompt], np.int64), (len(ids), 1))
        recognizer.run("prefill", {"tokens": prompt, **cross, **extra})
        step = recognizer.run("step", {"tokens": np.full((len(ids), 1), 70, np.int64)})
        return np.array(step["logits"])

    ids = [1, -1, 0]
    together = logits(slice(0, 3), ids)
    for row, index in enumerate(ids):
        alone = logits(slice(row, row + 1), [index])
        np.testing.assert_allclose(together[row], alone[0], atol=1e-4)
        assert (
            np.abs(together[row] - logits(slice(row, row + 1), [(index + 2) % 3 - 1])).max() > 0.1
        )


def test_a_merged_adapter(
    tiny_whisper_folder: Path, adapters: Any, tones: list[Path], live: ExportReport, tmp_path: Path
) -> None:
    one = {"all": adapters["all"]}
    report = export_model(
        tiny_whisper_folder, "openvino", tmp_path / "out", adapters=one, merge=True, check=tones
    )
    assert report.check.identical and report.plan.merged == "all"
    assert not (tmp_path / "out" / "adapters").exists()
    with_all = [c.got for c in live.check.comparisons if c.adapter == "all"]
    assert [c.got for c in report.check.comparisons] == with_all


def test_int8_hears_what_torch_hears(int8: ExportReport) -> None:
    """On sentences and voices that did not calibrate it."""
    found = compare(int8, spoken(8, seed=7))
    assert sum(len(c.expected.split()) for c in found.comparisons) > 30
    assert found.wer <= MOST_WRONG
    assert int8.bytes["encode.bin"] + int8.bytes["decode.bin"] < 2_500_000  # of 6.9 MB in fp32


def test_int8_hears_people_as_well_as_torch(int8: ExportReport, real_speech: Path) -> None:
    """Of voices that the model was never trained on, and so hears badly: as badly as torch."""
    recordings, texts = real_digits(real_speech, 12)
    found = compare(int8, recordings).comparisons
    torch_wer = jiwer.wer(texts, [c.expected for c in found])
    assert torch_wer < 1 and jiwer.wer(texts, [c.got for c in found]) <= torch_wer + 0.1


def test_int8_leaves_products_by_adapters_alone(
    tiny_whisper_folder: Path, adapters: Any, tones: list[Path], tmp_path: Path
) -> None:
    """Adapters are loaded after calibration, so nothing is known of their sizes."""
    import openvino

    export_model(
        tiny_whisper_folder, "openvino", tmp_path / "out", adapters=adapters, int8=True,
        check=tones, max_wer=9.0,
    )  # fmt: skip
    core = openvino.Core()
    products = quantized = 0
    for name in ("encode", "decode"):
        for node in core.read_model(tmp_path / "out" / f"{name}.xml").get_ops():
            if node.get_type_name() != "MatMul":
                continue
            sources = [node.input_value(i).get_node() for i in (0, 1)]
            if any(".lora_" in source.get_friendly_name() for source in sources):
                products += 1
                assert all(source.get_type_name() != "FakeQuantize" for source in sources)
            else:
                quantized += sources[0].get_type_name() == "FakeQuantize"
    assert products == 2 * (2 * 6 + 2 * 2 + 2 * 8) and quantized > 20


def test_other_adapters_are_refused(live: ExportReport) -> None:
    recognizer = live.target.open(live.output)
    with pytest.raises(ModelError, match="expected one of all, some, got 'nobody'"):
        recognizer.decode(np.zeros((1, 80, 200), np.float32), [1, 2], 4, "nobody")


def test_an_unwritable_output_leaves_nothing(
    tiny_whisper_folder: Path, tones: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openvino

    def full(model: Any, path: Path, **more: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(openvino, "save_model", full)
    with pytest.raises(SpeechError, match="No space left on device"):
        export_model(tiny_whisper_folder, "openvino", tmp_path / "out", check=tones)
    assert not list(tmp_path.iterdir())

"""`lora-speech bench` in miniature: what it writes, and what it says when something is wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from test_cli import failure, run

from lora_kernels.ops import int8_pack, int8_pack_screen
from lora_speech.bench import peers
from lora_speech.bench.measure import Contestant, compare
from lora_speech.bench.settings import MIXED_RANKS, BenchSettings
from lora_speech.bench.suite import run_bench
from lora_speech.bench.systems import Job, Ours, System, TransformersPeft, encode
from lora_speech.bench.whole_model import bytes_per_token
from lora_speech.bench.workload import Workload, build_model

DECODING = ("decode", "decode_batch8", "decode_beam5")


def miniature(folder: Path, *only: str) -> BenchSettings:
    return BenchSettings(
        models=(str(folder),), threads=(1,), seconds=0.0, only=only, new_tokens=4, turns=3
    )


class Broken(System):
    """A peer that comes up but cannot decode, and brings an encoder that raises."""

    def __init__(self, work: Workload) -> None:
        pass

    def contestants(self, job: Job, threads: int) -> list[Contestant]:
        if job.decode:
            raise RuntimeError("no kernel for this CPU\nand a long story")

        def encode() -> None:
            raise OSError("out of luck")

        return [Contestant("ctranslate2", encode, "int8")]


class Unusable(System):
    """A peer that does not take the model."""

    def __init__(self, work: Workload) -> None:
        raise TypeError("unknown model")


def test_command_writes_figures_and_plots(
    tiny_whisper_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out" / "bench.json"
    code = run(
        "bench", "--suite", "cpu", "--models", tiny_whisper_folder, "--threads", "1", "--quick",
        "--only", "decode,batch,beam,encoder,linear", "--json", path,
    )  # fmt: skip
    assert code == 0
    data = json.loads(path.read_text())
    key = tiny_whisper_folder.name
    assert data["complete"]
    assert data["environment"]["versions"].keys() >= {"torch", "ctranslate2", "openvino"}
    assert str(tiny_whisper_folder.parent) not in path.read_text()
    present = {name for name in peers.PEERS if peers.missing(name) is None}
    assert data["left_out"].keys() == peers.PEERS.keys() - present
    decoding = {"ours", "transformers_peft"} | present & {"ctranslate2"}
    encoding = decoding | ({"openvino_bf16", "openvino_f32"} if "openvino" in present else set())
    for section, names in (*((s, decoding) for s in DECODING), ("encoder", encoding)):
        figures, timings = data[section][key]["1"], data["timings"][section][key]["1"]
        assert figures.keys() == timings.keys() == names
        for name in names:
            assert figures[name] > 0
            assert timings[name]["p20_ms"] <= timings[name]["p50_ms"] <= timings[name]["p80_ms"]
            assert timings[name]["turns"] >= 3
    mixed = data["decode_batch8_adapters"][key]["1"]
    systems = {"ours", "ours_one_adapter", "ours_rank16", "transformers_peft"}
    timings = data["timings"]["decode_batch8_adapters"][key]["1"]
    assert timings.keys() == systems
    assert mixed.keys() == systems | {"over_one_adapter", "over_rank16"}
    assert mixed["over_one_adapter"] == pytest.approx(
        timings["ours"]["p50_ms"] / timings["ours_one_adapter"]["p50_ms"], rel=0.5
    )
    linear = data["linear"][key]["1"]
    assert linear.keys() == {"q_proj", "fc1", "fc2"}
    assert linear["fc1"].keys() == {"1", "1500"}
    assert linear["fc1"]["1"].keys() >= {"int8", "int8_lora", "lora_over_int8"}
    roofline = data["roofline"][key]["1"]
    limit = roofline["read_bytes_per_second"] / roofline["bytes_per_token"]
    expected = data["decode"][key]["1"]["ours"] / limit
    assert roofline["fraction"] == pytest.approx(expected, rel=0.01)
    assert "tokens/s" in (printed := capsys.readouterr().out)
    assert "8 adapters" in printed
    page = path.with_suffix(".html").read_text()
    assert "<script" not in page
    for chart in page.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + chart.partition("</svg>")[0] + "</svg>")


def test_contestants_compute_the_same(tiny_whisper_folder: Path, tmp_path: Path) -> None:
    work = Workload(str(tiny_whisper_folder), miniature(tiny_whisper_folder), tmp_path)
    features = work.features(2)
    ours, theirs = Ours(work).encode(features), TransformersPeft(work).encode(features)
    assert float((ours - theirs).norm() / theirs.norm()) < 0.05  # INT8
    merged = work.merged.model.encoder(features).last_hidden_state
    torch.testing.assert_close(merged, theirs)
    base = build_model(str(tiny_whisper_folder)).model.encoder(features).last_hidden_state
    assert float((base - theirs).norm() / theirs.norm()) > 0.1  # the adapter is in all of them


def test_rows_of_a_mixed_batch_compute_the_same(tiny_whisper_folder: Path, tmp_path: Path) -> None:
    work = Workload(str(tiny_whisper_folder), miniature(tiny_whisper_folder), tmp_path)
    peft, folders = work.mixed
    names = list(folders)
    assert [peft.peft_config[name].r for name in names] == [*MIXED_RANKS, 26]
    features = work.features(len(names))
    ours = encode(Ours(work).mixed, features, names)
    for row, name in enumerate(names):
        peft.set_adapter(name)
        with torch.no_grad():
            alone = peft.get_base_model().get_encoder()(features[row : row + 1])
        theirs = alone.last_hidden_state[0]
        assert float((ours[row] - theirs).norm() / theirs.norm()) < 0.05, name  # INT8
        other = ours[row - 1]
        assert float((other - theirs).norm() / theirs.norm()) > 0.1, name


@pytest.mark.slow
def test_training_is_measured_in_processes_of_its_own(tiny_whisper_folder: Path) -> None:
    data = run_bench(miniature(tiny_whisper_folder, "train"))
    steps = data["train"][tiny_whisper_folder.name]
    for name in ("ours", "peft"):
        assert steps[name]["ms_per_step"] > 0
        assert steps[name]["peak_mib"] > 50


def test_broken_and_missing_peers_are_left_out_with_the_reason(
    tiny_whisper_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "PEERS", {"torch": Broken, "numpy": Unusable, "absent_": System})
    data = run_bench(miniature(tiny_whisper_folder, "decode", "batch", "beam", "encoder"))
    key = tiny_whisper_folder.name
    for section in (*DECODING, "encoder"):
        assert data[section][key]["1"].keys() == {"ours", "transformers_peft"}
    mixed = data["decode_batch8_adapters"][key]["1"]
    assert mixed.keys() >= {"ours", "ours_one_adapter", "transformers_peft", "over_one_adapter"}
    left_out = data["left_out"]
    assert left_out["absent_"] == "not installed; pip install 'lora-kernels[bench]'"
    assert left_out[f"numpy with {key}"] == "TypeError: unknown model"
    assert left_out[f"Broken in decode.{key}.1"] == "RuntimeError: no kernel for this CPU"
    assert left_out[f"ctranslate2 int8 in encoder.{key}.1"] == "OSError: out of luck"


def test_the_fastest_variant_stands_for_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    takes = {"slow": 2.5, "fast": 2.0, "hopeless": 5.0}

    def taking(seconds: float) -> Callable[[], None]:
        def run() -> None:
            clock[0] += seconds

        return run

    contestants = [Contestant("peer", taking(takes[name]), name) for name in takes]
    result = compare(contestants, BenchSettings(seconds=20.0), lambda done, total: None)
    timings = result.timings()["peer"]
    assert timings["variant"] == "fast"
    assert timings["turns"] == 4  # rounds of 4.5 s, in 20 s
    assert timings["variants"].keys() == {"slow", "fast"}
    assert timings["slower_ms"] == {"hopeless": 5000.0}
    assert result.figures(lambda seconds: 1 / seconds) == {"peer": 0.5}


def test_bytes_per_token_of_whisper_base() -> None:
    parts = bytes_per_token(build_model("base").config, prompt=4, new_tokens=128)
    # 6 layers of 14 squares of 512; keys and values of 1,500 frames in INT8, of 68 tokens in fp32.
    assert parts["weights"] == 6 * 14 * 512**2
    assert parts["adapter"] == 6 * 2 * 16 * (6 * 1024 + 2 * 2560)
    assert parts["keys_and_values"] == 6 * 2 * 512 * (1500 + 4 * 68)
    packed = int8_pack(torch.zeros(51865, 512, dtype=torch.int8), torch.ones(51865))
    screen = int8_pack_screen(packed, 51865, 512)
    assert parts["vocabulary"] == pytest.approx(screen.numel(), rel=1e-2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--models", "huge"), "--models: expected tiny, base, small, shipped or a folder"),
        (("--models", "tiny,tiny"), "--models: expected different names"),
        (("--models", ","), "--models: expected"),
        (("--threads", "0"), "--threads: expected numbers from 1 to"),
        (("--threads", "one"), "--threads: expected numbers from 1 to"),
        (("--seconds", "-1"), "--seconds: expected 0 or more"),
        (("--seconds", "nan"), "--seconds: expected 0 or more"),
        (
            ("--only", "decode,fun"),
            "--only: expected some of decode, batch, beam, encoder, linear, train",
        ),
        (("--json", "plots.html"), "--json: expected a file for the figures"),
        (("--json", "/proc/none/bench.json"), "expected a file that can be written"),
    ],
)
def test_bad_flags(
    flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in failure(capsys, "bench", *flags)

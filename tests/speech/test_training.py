"""Fine-tuning: it learns, it resumes bit for bit, it writes plain PEFT folders."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_whisper import tone

from lora_speech.data.features import extract_features
from lora_speech.data.manifest import Utterance
from lora_speech.decoding.greedy import greedy_decode
from lora_speech.errors import AudioError, SpeechError, TrainingError
from lora_speech.models.loading import load_base, load_for_serving
from lora_speech.training import checkpoints
from lora_speech.training import finetune as training
from lora_speech.training.batching import ExampleStore, epoch_batches, hash_seed, spec_augment
from lora_speech.training.checkpoints import FOLDER, list_checkpoints
from lora_speech.training.config import TrainingResult
from lora_speech.training.finetune import TrainingConfig, TrainingEvent, finetune, read_log

WORDS = ["go", "stop", "left", "right", "up", "down"]


def utterances(count: int = 12) -> list[Utterance]:
    return [
        Utterance(
            tone(0.6 + 0.1 * (i % 3), frequency=200.0 * (1 + i % 6)),
            WORDS[i % 6],
            sampling_rate=16_000,
            name=f"u{i}",
        )
        for i in range(count)
    ]


def config(**changes: object) -> TrainingConfig:
    settings = {
        "steps": 8,
        "batch_size": 4,
        "rank": 4,
        "dropout": 0.1,
        "checkpoint_every": 3,
        "validate_every": 4,
        "learning_rate": 5e-3,
    }
    return TrainingConfig(**{**settings, **changes})


def test_it_learns(tiny_whisper_folder: Path, tmp_path: Path) -> None:
    events: list[TrainingEvent] = []
    result = finetune(
        tiny_whisper_folder,
        utterances(),
        utterances(6),
        tmp_path / "out",
        config(steps=30, augment=False, dropout=0.0, learning_rate=1e-2, validate_every=15),
        progress=events.append,
    )
    assert np.mean(result.losses[-3:]) < 0.7 * result.losses[0]
    assert [step for step, _ in result.validations] == [15, 30]
    assert result.best_wer == min(wer for _, wer in result.validations)
    assert 0 < result.trainable < 0.5 * result.total
    assert {event.stage for event in events} == {"prepare", "train", "validate"}


@pytest.mark.parametrize(
    ("interrupted_at", "changes"),
    [(5, {}), (3, {"accumulation": 2, "augment": False}), (7, {"dropout": 0.0, "seed": 3})],
)
def test_resume_after_an_interruption_is_exact(
    tiny_whisper_folder: Path,
    tmp_path: Path,
    interrupted_at: int,
    changes: dict,
) -> None:
    settings = config(**changes)
    data, held_out = utterances(), utterances(3)
    whole = finetune(tiny_whisper_folder, data, held_out, tmp_path / "whole", settings)

    def interrupt(event: TrainingEvent) -> None:
        if event.stage == "train" and event.done == interrupted_at:
            raise KeyboardInterrupt

    torch.manual_seed(99)  # whatever the process did before must not matter
    with pytest.raises(KeyboardInterrupt):
        finetune(
            tiny_whisper_folder, data, held_out, tmp_path / "cut", settings, progress=interrupt
        )
    torch.rand(5)
    resumed = finetune(tiny_whisper_folder, data, held_out, tmp_path / "cut", settings, resume=True)
    assert_same(resumed, whole)


def assert_same(resumed: TrainingResult, whole: TrainingResult) -> None:
    """Two runs left the same, bit for bit, and nothing else."""
    assert resumed.losses == whole.losses
    assert len(whole.losses) == 8
    assert resumed.validations == whole.validations
    assert read_log(resumed.output) == read_log(whole.output)
    left = [sorted(p.relative_to(r.output) for p in r.output.rglob("*")) for r in (resumed, whole)]
    assert left[0] == left[1]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (resumed.output / name).read_bytes() == (whole.output / name).read_bytes()


def train_until_killed(base: Path, output: Path, moment: str) -> None:
    """Go on with a training and kill this process at a moment."""

    def kill(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: TrainingEvent) -> None:
        if moment == "step" and event.stage == "train" and event.done == 5:
            kill()

    if moment == "adapter":
        training.publish = kill
    if moment == "checkpoint":
        checkpoints.publish = kill
    torch.set_num_threads(1)
    finetune(base, utterances(), utterances(3), output, config(), resume=True, progress=watch)


@pytest.mark.slow
def test_resume_after_kills_is_exact(tiny_whisper_folder: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    # What each kill leaves staged; the next run sweeps it.
    moments = {"step": [], "adapter": [".adapter"], "checkpoint": [".step-00000006"]}
    fresh = multiprocessing.get_context("forkserver")
    fresh.set_forkserver_preload([__name__, "peft"])  # imported once for all, which takes seconds
    for moment, staged in moments.items():
        process = fresh.Process(target=train_until_killed, args=(tiny_whisper_folder, cut, moment))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert [p.name for p in list_checkpoints(cut)] == ["step-00000003"]
        assert [p.name for p in cut.rglob("*.partial")] == [
            f"{name}.{process.pid}.partial" for name in staged
        ]
    data, held_out = utterances(), utterances(3)
    whole = finetune(tiny_whisper_folder, data, held_out, tmp_path / "whole", config())
    resumed = finetune(tiny_whisper_folder, data, held_out, cut, config(), resume=True)
    assert_same(resumed, whole)


def test_a_partial_checkpoint_and_log_line_do_no_harm(
    tiny_whisper_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    settings = config(steps=6)
    finetune(tiny_whisper_folder, utterances(), None, out, settings)
    assert [p.name for p in list_checkpoints(out)] == ["step-00000003", "step-00000006"]
    (out / FOLDER / ".step-00000009.1.partial").mkdir()
    with open(out / training.LOG, "a") as log:
        log.write('{"step": 7, "lo')
    again = finetune(tiny_whisper_folder, utterances(), None, out, settings, resume=True)
    assert len(again.losses) == 6
    assert all(json.loads(line) for line in (out / training.LOG).read_text().splitlines())


def test_the_adapter_is_a_plain_peft_folder(tiny_whisper_folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    out = finetune(tiny_whisper_folder, utterances(), None, tmp_path / "out", config()).output
    speech = load_base(tiny_whisper_folder)
    features = extract_features(speech, [tone(1.0)])["input_features"]
    plain = PeftModel.from_pretrained(speech.model, str(out)).eval()
    expected = greedy_decode(plain, features, language="en").tokens
    served = load_for_serving(tiny_whisper_folder, {"me": out})
    assert greedy_decode(served.model, features, adapters="me", language="en").tokens == expected
    assert not list(tmp_path.rglob("*.partial"))


def test_the_best_on_validation_is_kept(
    tiny_whisper_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = iter([0.5, 0.2, 0.9])
    saved: list[int] = []

    def score(model: object, data: object, **kwargs: object) -> object:
        wer = next(rates)

        class Result:
            rates = type("Rates", (), {"wer": wer, "cer": wer})

        return Result

    original = training.save_adapter

    def save(model: object, output: Path) -> None:
        saved.append(1)
        original(model, output)

    monkeypatch.setattr(training, "evaluate", score)
    monkeypatch.setattr(training, "save_adapter", save)
    settings = config(steps=6, validate_every=2)
    result = finetune(tiny_whisper_folder, utterances(), utterances(2), tmp_path / "o", settings)
    assert (result.best_wer, result.best_step, len(saved)) == (0.2, 4, 2)


def test_the_callers_random_state_is_left_alone(tiny_whisper_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    finetune(tiny_whisper_folder, utterances(4), None, tmp_path / "o", config(steps=1))
    assert torch.equal(torch.rand(3), expected)


class TestBatching:
    """Order and augmentation are functions of the seed."""

    def test_every_epoch_has_every_example_once(self) -> None:
        lengths = [(7 * i) % 50 for i in range(1000)]
        for epoch in range(3):
            batches = epoch_batches(lengths, 8, 0, epoch)
            assert sorted(i for b in batches for i in b) == list(range(1000))
        assert epoch_batches(lengths, 8, 0, 1) == epoch_batches(lengths, 8, 0, 1)
        assert epoch_batches(lengths, 8, 0, 1) != epoch_batches(lengths, 8, 0, 2)
        spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches]
        assert np.mean(spread) < 10

    def test_spec_augment(self) -> None:
        features = torch.randn(3, 80, 200)
        once = spec_augment(features, torch.Generator().manual_seed(1))
        again = spec_augment(features, torch.Generator().manual_seed(1))
        assert torch.equal(once, again)
        changed = (once != features).float().mean()
        assert 0.02 < changed < 0.6
        assert torch.equal(features[once == features], once[once == features])

    def test_seeds_are_stable(self) -> None:
        assert hash_seed(0, 1, "order") == hash_seed(0, 1, "order")
        assert hash_seed(0, 1, "order") != hash_seed(0, 11, "order")

    def test_long_utterances_are_left_out(self, tiny_whisper_folder: Path) -> None:
        speech = load_base(tiny_whisper_folder)
        long = Utterance(tone(2.5), "go", sampling_rate=16_000, name="long")
        wordy = Utterance(tone(1.0), "x" * 60, sampling_rate=16_000, name="wordy")
        store = ExampleStore(speech, [long, *utterances(2), wordy])
        assert len(store.examples) == 2
        assert [name.split()[0] for name in store.skipped] == ["long", "wordy"]
        with pytest.raises(TrainingError, match="all 1 are too long"):
            ExampleStore(speech, [long])

    def test_labels_ignore_the_prompt(self, tiny_whisper_folder: Path) -> None:
        data = [Utterance(tone(1.0), text, sampling_rate=16_000) for text in ("go stop", "up")]
        batch = ExampleStore(load_base(tiny_whisper_folder), data).collate([0, 1])
        assert batch.features.shape == (2, 80, 200)
        assert (batch.labels[:, :3] == -100).all()
        text = batch.labels[0, 3:-1]
        assert len(text) >= 3
        assert torch.equal(batch.decoder_input[0, 4:], text)  # each label is the next input
        assert batch.labels[1, -1] == -100  # padding


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps: expected a positive number, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"dropout": 1.0}, "dropout: expected at least 0 and less than 1, got 1.0"),
        ({"rank": -1, "alpha": 0.0}, "rank.*alpha"),
    ],
)
def test_bad_settings(changes: dict, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        config(**changes)


def test_bad_outputs_and_data_write_nothing(tiny_whisper_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    broken = Utterance(np.zeros(0, dtype=np.float32), "x", sampling_rate=16_000, name="broken")
    with pytest.raises(AudioError, match="broken: expected speech, got 0 samples"):
        finetune(tiny_whisper_folder, [broken], None, out, config())
    with pytest.raises(SpeechError, match="got nothing there"):
        finetune("./nowhere", utterances(2), None, out, config())
    assert not out.exists()
    with pytest.raises(TrainingError, match=r"targets: .*q_proj.* got nonsense"):
        finetune(tiny_whisper_folder, utterances(2), None, out, config(targets=("nonsense",)))
    assert not out.exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(TrainingError, match="got a file"):
        finetune(tiny_whisper_folder, utterances(2), None, tmp_path / "file", config())


def test_an_earlier_run_is_neither_overwritten_nor_mixed_up(
    tiny_whisper_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    settings = config(steps=3)
    finetune(tiny_whisper_folder, utterances(4), None, out, settings)
    before = (out / "adapter_model.safetensors").read_bytes()
    with pytest.raises(TrainingError, match="--resume, replace it with --overwrite"):
        finetune(tiny_whisper_folder, utterances(4), None, out, settings)
    with pytest.raises(TrainingError, match="seed: 0 then, 1 now"):
        finetune(
            tiny_whisper_folder, utterances(4), None, out, config(steps=3, seed=1), resume=True
        )
    with pytest.raises(TrainingError, match="data: "):
        finetune(tiny_whisper_folder, utterances(5), None, out, settings, resume=True)
    assert (out / "adapter_model.safetensors").read_bytes() == before
    finetune(tiny_whisper_folder, utterances(4), None, out, config(steps=3, seed=1), overwrite=True)
    assert (out / "adapter_model.safetensors").read_bytes() != before


def test_a_damaged_checkpoint_is_named(tiny_whisper_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = config(steps=3)
    finetune(tiny_whisper_folder, utterances(4), None, out, settings)
    (list_checkpoints(out)[-1] / "state.safetensors").write_bytes(b"half")
    with pytest.raises(TrainingError, match=r"step-00000003: .* delete this folder"):
        finetune(tiny_whisper_folder, utterances(4), None, out, settings, resume=True)


def test_a_diverging_run_says_so(tiny_whisper_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"loss: expected a finite number.*learning-rate"):
        finetune(
            tiny_whisper_folder,
            utterances(4),
            None,
            tmp_path / "o",
            config(steps=40, learning_rate=1e30, warmup=0.0),
        )

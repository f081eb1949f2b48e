"""The synthesiser: speakers, samples, noise and rooms."""

import re
import subprocess
import sys
import time

import numpy as np
import pytest

from lora_speech.synthetic import synthesis
from lora_speech.synthetic.synthesis import Speaker

needs_espeak = pytest.mark.skipif(
    not synthesis.is_available(), reason="espeak-ng is missing: pip install espeakng-loader"
)


@needs_espeak
def test_speech_is_mono_float_in_range() -> None:
    samples = synthesis.synthesize("set a timer for ten minutes", Speaker("en-us+f2"))
    assert samples.dtype == np.float32
    assert samples.ndim == 1
    assert 1.0 < len(samples) / synthesis.SAMPLING_RATE < 3.0
    assert 0.1 < np.abs(samples).max() <= 1.0


@needs_espeak
def test_speech_starts_and_ends_at_once() -> None:
    samples = np.abs(synthesis.synthesize("seven", Speaker("en-us")))
    tenth = synthesis.SAMPLING_RATE // 10
    assert samples[:tenth].max() > 0.003
    assert samples[-tenth:].max() > 0.003


@needs_espeak
def test_the_sampling_rate_is_the_one_asked_for() -> None:
    speaker = Speaker("en")
    slow = synthesis.synthesize("call maria", speaker, sampling_rate=8000)
    fast = synthesis.synthesize("call maria", speaker, sampling_rate=48000)
    assert len(fast) == pytest.approx(6 * len(slow), rel=0.03)


@needs_espeak
def test_the_rate_changes_the_length_and_the_pitch_the_sound() -> None:
    text = "turn on the lights in the kitchen"
    slow = synthesis.synthesize(text, Speaker("en-us", rate=120))
    fast = synthesis.synthesize(text, Speaker("en-us", rate=210))
    assert len(slow) > 1.3 * len(fast)

    def fundamental(samples: np.ndarray) -> float:
        """Hz of the strongest autocorrelation between 50 and 400 Hz."""
        power = np.abs(np.fft.rfft(samples, 2 * len(samples))) ** 2
        lags = np.fft.irfft(power)[: synthesis.SAMPLING_RATE // 50]
        shortest = synthesis.SAMPLING_RATE // 400
        return synthesis.SAMPLING_RATE / (shortest + int(lags[shortest:].argmax()))

    low = synthesis.synthesize("four", Speaker("en-us", pitch=10, pitch_range=10))
    high = synthesis.synthesize("four", Speaker("en-us", pitch=80, pitch_range=10))
    assert fundamental(high) > 1.3 * fundamental(low)


@needs_espeak
@pytest.mark.parametrize("accent", synthesis.SEEN_ACCENTS + synthesis.HELD_OUT_ACCENTS)
def test_every_accent_speaks(accent: str) -> None:
    for speaker in synthesis.accent_speakers(accent, 2, seed=5):
        assert speaker.accent == accent
        assert len(synthesis.synthesize("seven", speaker)) > 1000


@needs_espeak
@pytest.mark.parametrize("variant", synthesis.VARIANTS)
def test_every_variant_speaks(variant: str) -> None:
    assert len(synthesis.synthesize("five", Speaker(f"en-us+{variant}"))) > 1000


@needs_espeak
def test_what_was_said_before_changes_nothing() -> None:
    speakers = [Speaker(f"nl+{variant}", 150) for variant in synthesis.VARIANTS]
    first = [synthesis.synthesize("call maria at seven", speaker) for speaker in speakers]
    synthesis.synthesize("turn on the lights", Speaker("en-us+f2", 190))
    for speaker, before in reversed(list(zip(speakers, first, strict=True))):
        again = synthesis.synthesize("call maria at seven", speaker)
        assert np.array_equal(again, before), speaker.voice


@needs_espeak
def test_a_new_process_says_the_same() -> None:
    # A breathy voice, and not in the same second: by default the time seeds the breath.
    code = (
        "import sys; from lora_speech.synthetic.synthesis import Speaker, synthesize; "
        "sys.stdout.buffer.write(synthesize('one', Speaker('en-us+f2')).tobytes())"
    )
    spoken = []
    for pause in (0.0, 1.0):
        time.sleep(pause)
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        spoken.append(process.stdout)
    assert len(spoken[0]) > 1000
    assert spoken[0] == spoken[1]


@needs_espeak
def test_wrong_arguments_are_named() -> None:
    for voice in ("nonsense", "en-us+nobody"):
        with pytest.raises(ValueError, match=rf"speaker.voice: .* got '{re.escape(voice)}'"):
            synthesis.synthesize("seven", Speaker(voice))
    with pytest.raises(ValueError, match=r"text: expected words"):
        synthesis.synthesize("", Speaker("en-us"))


def test_accents_are_seen_or_held_out_never_both() -> None:
    assert len(synthesis.HELD_OUT_ACCENTS) >= 2
    assert not set(synthesis.SEEN_ACCENTS) & set(synthesis.HELD_OUT_ACCENTS)


def test_speakers_follow_the_seed() -> None:
    assert synthesis.seen_speakers(seed=1) == synthesis.seen_speakers(seed=1)
    assert synthesis.seen_speakers(seed=1) != synthesis.seen_speakers(seed=2)
    assert {speaker.language for speaker in synthesis.seen_speakers(language="es")} == {"es"}
    voices = {speaker.voice for speaker in synthesis.accent_speakers("en-us", 20)}
    assert len(voices) == 20


@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 10.0, 30.0])
def test_noise_has_the_ratio_asked_for(snr_db: float) -> None:
    speech = np.sin(np.arange(16000, dtype=np.float32) / 10)
    noisy = synthesis.add_noise(speech, snr_db, np.random.default_rng(0))
    assert noisy.dtype == np.float32
    ratio = 10 * np.log10(np.mean(speech**2) / np.mean((noisy - speech) ** 2))
    assert ratio == pytest.approx(snr_db, abs=0.05)


def test_noise_follows_the_generator_and_leaves_silence_alone() -> None:
    speech = np.ones(1001, np.float32)
    first = synthesis.add_noise(speech, 10.0, np.random.default_rng(3))
    again = synthesis.add_noise(speech, 10.0, np.random.default_rng(3))
    np.testing.assert_array_equal(first, again)
    silence = np.zeros(100, np.float32)
    assert not synthesis.add_noise(silence, 10.0, np.random.default_rng(3)).any()
    assert synthesis.add_noise(silence[:0], 10.0, np.random.default_rng(3)).size == 0


def test_a_room_keeps_length_and_power_and_adds_a_tail() -> None:
    click = np.zeros(8000, np.float32)
    click[100] = 1.0
    wet = synthesis.reverberate(click, np.random.default_rng(0), decay=0.2)
    assert wet.shape == click.shape
    assert np.mean(wet**2) == pytest.approx(np.mean(click**2), rel=1e-3)
    assert np.abs(wet[101:2000]).max() > 1e-3
    assert np.abs(wet[:100]).max() < 1e-5

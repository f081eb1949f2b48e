"""Speech made by espeak-ng: many voices, accents, rates and pitches, and what a room adds to them.

espeak-ng comes with the ``espeakng-loader`` wheel and is called through its C interface, in this
process. It keeps one global state, so calls take a lock; and it carries its phase, flutter and
noise over from one utterance to the next, up to their lengths, which nothing in its interface
resets. So the library is loaded anew for each utterance (2.5 ms): the same text by the same speaker
gives the same samples, whatever was said before.
"""

from __future__ import annotations

import _ctypes
import ctypes
import random
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soxr

Samples = npt.NDArray[np.float32]

SAMPLING_RATE = 16000

# Accents are espeak-ng voices. The base model is trained on the seen ones only.
SEEN_ACCENTS: tuple[str, ...] = ("en-us", "en", "en-gb-x-rp", "es", "es-419")
# Never trained on: the first is the demonstration's unseen accent, the second its other adapter's.
# The Dutch voice reads English by the rules of Dutch, the strongest accent that an adapter of a few
# hundred steps still mends; the others are English accents that the base model half understands.
HELD_OUT_ACCENTS: tuple[str, ...] = ("nl", "en-gb-x-gbcwmd", "en-gb-scotland", "en-029")

ACCENT_NAMES: dict[str, str] = {
    "nl": "a Dutch accent",
    "en-gb-x-gbcwmd": "a West Midlands accent",
    "en-gb-scotland": "a Scottish accent",
    "en-029": "a Caribbean accent",
}
"""What people call the voices of :data:`HELD_OUT_ACCENTS`."""

# Variants are espeak-ng's larynxes and vocal tracts: one accent spoken by another person. Those
# that whisper, sing or shout are left out, and so is "rob", which crashes espeak-ng 1.52.
VARIANTS: tuple[str, ...] = (
    *("m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "f1", "f2", "f3", "f4", "f5"),
    *("klatt", "klatt2", "klatt3", "klatt4", "Andy", "Annie", "Alicia", "Gene", "Lee", "Marco"),
    *("Michael", "Mike", "Reed", "belinda", "caleb", "david", "ed", "edward", "iven", "john"),
    *("linda", "max", "paul", "robert", "steph", "travis", "victor", "zac", "adam"),
)

# Words per minute: from a careful to a brisk speaker.
_RATES = (120, 210)
_PITCHES = (15, 85)
_PITCH_RANGES = (20, 80)

# Values of espeak-ng's speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_CHARACTERS_UTF8 = 1
_POSITION_CHARACTER = 1
_RATE, _PITCH, _PITCH_RANGE = 1, 3, 4
_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


class SynthesisUnavailable(RuntimeError):
    """espeak-ng cannot be used here; the message says what to install."""


@dataclass(frozen=True)
class Speaker:
    """Who speaks, and how.

    Attributes
    ----------
    voice : str
        An espeak-ng voice with an optional variant: ``"en-us"``, ``"en-us+f2"``.
    rate : int
        Words per minute, 80 to 450.
    pitch : int
        0 to 99; 50 is the voice's own.
    pitch_range : int
        Liveliness of the intonation, 0 (monotone) to 99.
    """

    voice: str
    rate: int = 170
    pitch: int = 50
    pitch_range: int = 50

    @property
    def accent(self) -> str:
        """The voice without its variant."""
        return self.voice.split("+")[0]

    @property
    def language(self) -> str:
        """The language's two letters; accents made by a foreign voice name the voice's language."""
        return self.accent.split("-")[0]


class _Engine:
    """espeak-ng, as it is after loading at the beginning of every utterance."""

    def __init__(self) -> None:
        try:
            import espeakng_loader

            self._path, self._data = (
                str(espeakng_loader.get_library_path()),
                str(espeakng_loader.get_data_path()),
            )
            self._library: ctypes.CDLL | None = None
            # Kept on the object: ctypes would free a callback that nothing in Python refers to.
            self._callback = _Callback(self._collect)
            self.sampling_rate = self._load()
        except (ImportError, OSError) as error:
            raise SynthesisUnavailable(
                f"espeak-ng could not be loaded ({error}); pip install espeakng-loader"
            ) from error
        if self.sampling_rate <= 0:
            raise SynthesisUnavailable(
                f"espeak-ng found no usable data in {self._data}; pip install --force-reinstall "
                "espeakng-loader"
            )
        self.lock = threading.Lock()
        self._chunks: list[npt.NDArray[np.int16]] = []
        self._variants = {path.name for path in (Path(self._data) / "voices" / "!v").iterdir()}

    def _load(self) -> int:
        """Load the library, again if need be, and return its sampling rate."""
        if self._library is not None:
            self._library.espeak_Terminate()
            handle, self._library = self._library._handle, None
            _ctypes.dlclose(handle)
        self._library = library = ctypes.CDLL(self._path)
        rate = library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, self._data.encode(), 0)
        # By default it is the time, and breathy voices would differ from one call to the next.
        library.espeak_ng_SetRandSeed(ctypes.c_long(0))
        # Some voices draw their noise from the C library's generator, which is this process' own.
        ctypes.CDLL(None).srand(1)
        library.espeak_SetSynthCallback(self._callback)
        return int(rate)

    def _collect(self, samples: ctypes._Pointer[ctypes.c_short], count: int, _: int | None) -> int:
        if count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def speak(self, text: str, speaker: Speaker) -> npt.NDArray[np.int16]:
        """Samples at espeak-ng's own rate. The caller holds the lock."""
        self._load()
        library = self._library
        assert library is not None, "loaded just now"
        _, plus, variant = speaker.voice.partition("+")
        # espeak-ng itself passes over a variant that it does not know.
        known = not plus or variant in self._variants
        if not known or library.espeak_SetVoiceByName(speaker.voice.encode()) != 0:
            raise ValueError(
                f"speaker.voice: expected a voice of espeak-ng, for example 'en-us+f2', "
                f"got {speaker.voice!r}"
            )
        library.espeak_SetParameter(_RATE, speaker.rate, 0)
        library.espeak_SetParameter(_PITCH, speaker.pitch, 0)
        library.espeak_SetParameter(_PITCH_RANGE, speaker.pitch_range, 0)
        encoded = text.encode() + b"\0"
        self._chunks.clear()
        library.espeak_Synth(
            encoded,
            ctypes.c_size_t(len(encoded)),
            0,
            _POSITION_CHARACTER,
            0,
            _CHARACTERS_UTF8,
            None,
            None,
        )
        return np.concatenate(self._chunks) if self._chunks else np.zeros(0, np.int16)


@lru_cache(maxsize=1)
def _engine() -> _Engine:
    return _Engine()


def is_available() -> bool:
    """Whether espeak-ng can be loaded here."""
    try:
        _engine()
    except SynthesisUnavailable:
        return False
    return True


def synthesize(text: str, speaker: Speaker, sampling_rate: int = SAMPLING_RATE) -> Samples:
    """Speak a text.

    Parameters
    ----------
    text : str
        What to say.
    speaker : Speaker
        Who says it.
    sampling_rate : int
        Hz of the result.

    Returns
    -------
    float32 array [samples]
        In [-1, 1], with the silence before and after the speech cut off.

    Raises
    ------
    SynthesisUnavailable
        espeak-ng cannot be loaded.
    ValueError
        The voice is unknown, or the text is silent.
    """
    engine = _engine()
    with engine.lock:
        spoken = engine.speak(text, speaker)
    samples = spoken.astype(np.float32) / 32768.0
    # espeak-ng ends every utterance with a pause. Its speech is louder than 0.003, -50 dB.
    audible = np.flatnonzero(np.abs(samples) > 0.003)
    if audible.size == 0:
        raise ValueError(f"text: expected words that {speaker.voice!r} can speak, got {text!r}")
    samples = samples[audible[0] : audible[-1] + 1]
    if sampling_rate != engine.sampling_rate:
        samples = soxr.resample(samples, engine.sampling_rate, sampling_rate, quality="MQ")
    return np.clip(samples, -1.0, 1.0)


def random_speaker(accent: str, rng: random.Random) -> Speaker:
    """Draw a variant, rate, pitch and intonation for an accent."""
    return Speaker(
        voice=f"{accent}+{rng.choice(VARIANTS)}",
        rate=rng.randint(*_RATES),
        pitch=rng.randint(*_PITCHES),
        pitch_range=rng.randint(*_PITCH_RANGES),
    )


def accent_speakers(accent: str, count: int, seed: int = 0) -> list[Speaker]:
    """Draw speakers of one accent: variants in turn, so that they differ as long as they can.

    Parameters
    ----------
    accent : str
        An espeak-ng voice, for example one of :data:`HELD_OUT_ACCENTS`.
    count : int
        How many.
    seed : int
        The same seed gives the same speakers.
    """
    rng = random.Random(f"{seed}/{accent}")
    order = rng.sample(VARIANTS, len(VARIANTS))
    return [
        Speaker(
            voice=f"{accent}+{order[index % len(order)]}",
            rate=rng.randint(*_RATES),
            pitch=rng.randint(*_PITCHES),
            pitch_range=rng.randint(*_PITCH_RANGES),
        )
        for index in range(count)
    ]


def seen_speakers(seed: int = 0, *, language: str | None = None) -> list[Speaker]:
    """Every seen accent in every variant, once each, at a random rate and pitch.

    Parameters
    ----------
    seed : int
        The same seed gives the same speakers.
    language : str, optional
        Only accents of this language: ``"en"`` or ``"es"``.
    """
    return [
        speaker
        for accent in SEEN_ACCENTS
        for speaker in accent_speakers(accent, len(VARIANTS), seed)
        if language in (None, speaker.language)
    ]


def add_noise(samples: Samples, snr_db: float, rng: np.random.Generator) -> Samples:
    """Add coloured noise, between white and brown, at a signal-to-noise ratio.

    Parameters
    ----------
    samples : float32 array [samples]
        Speech in [-1, 1].
    snr_db : float
        10 log10 of the speech's mean power over the noise's.
    rng : numpy.random.Generator
        Draws the noise and its colour.

    Returns
    -------
    float32 array [samples]
        Speech with noise, not clipped; silence comes back unchanged.
    """
    power = float(np.mean(np.square(samples))) if samples.size else 0.0
    if power == 0.0:
        return samples
    noise = coloured_noise(samples.size, rng)
    return samples + noise * np.float32(np.sqrt(power) * 10.0 ** (-snr_db / 20.0))


def coloured_noise(count: int, rng: np.random.Generator) -> Samples:
    """Noise of unit power whose spectrum falls by 0 to 6 dB per octave.

    Parameters
    ----------
    count : int
        Samples.
    rng : numpy.random.Generator
        Draws the noise and the slope.
    """
    # Shaped at the next power of two, where the FFT is fastest.
    size = 1 << max(count - 1, 1).bit_length()
    spectrum = np.fft.rfft(rng.standard_normal(size, dtype=np.float32))
    frequency = np.arange(spectrum.size, dtype=np.float32)
    # Flat below 1/400 of the band (20 Hz), or a brown spectrum would be nearly a constant.
    slope = np.maximum(frequency, spectrum.size / 400.0) ** np.float32(-rng.uniform(0.0, 1.0))
    noise = np.fft.irfft(spectrum * slope, size)[:count]
    return (noise / (np.sqrt(np.mean(np.square(noise))) + 1e-12)).astype(np.float32)


def reverberate(
    samples: Samples,
    rng: np.random.Generator,
    *,
    decay: float = 0.3,
    sampling_rate: int = SAMPLING_RATE,
) -> Samples:
    """Put a voice into a simple room: exponentially decaying noise as the impulse response.

    Parameters
    ----------
    samples : float32 array [samples]
        Dry speech.
    rng : numpy.random.Generator
        Draws the impulse response.
    decay : float
        Seconds in which the echo falls by 60 dB.
    sampling_rate : int
        Hz.

    Returns
    -------
    float32 array [samples]
        As long as the dry speech, with the same mean power.
    """
    length = max(int(decay * sampling_rate), 1)
    time = np.arange(length, dtype=np.float32) / sampling_rate
    # 60 dB is a factor of 1000, and ln 1000 = 6.9.
    response = rng.standard_normal(length, dtype=np.float32) * np.exp(-6.9 * time / decay)
    response *= rng.uniform(0.02, 0.08)
    response[0] = 1.0
    size = 1 << (samples.size + length - 1).bit_length()
    wet = np.fft.irfft(np.fft.rfft(samples, size) * np.fft.rfft(response, size), size)
    wet = wet[: samples.size]
    gain = np.sqrt(np.mean(np.square(samples)) / (np.mean(np.square(wet)) + 1e-12))
    return (wet * gain).astype(np.float32)

"""Word and character error rates of a model on a list of utterances."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lora_speech.data.manifest import Utterance, load_utterances
from lora_speech.data.text import normalizer
from lora_speech.errors import MissingExtraError, SpeechError
from lora_speech.files import write_json, write_jsonl
from lora_speech.models.loading import SpeechModel
from lora_speech.transcription import checked_length_penalty, transcribe_many


@dataclass(frozen=True)
class ScoredUtterance:
    """One utterance with its hypothesis; rates are fractions, `wer` and `cer` normalised."""

    name: str
    reference: str
    hypothesis: str
    normalized_reference: str
    normalized_hypothesis: str
    wer: float
    cer: float
    adapter: str | None
    language: str | None
    seconds: float


@dataclass(frozen=True)
class ErrorRates:
    """Errors over all words (characters) of a list, as fractions; 1.0 may be exceeded.

    Attributes
    ----------
    wer, cer : float
        After normalisation.
    wer_raw, cer_raw : float
        Of the texts as they are.
    words, characters : int
        In the normalised references.
    substitutions, deletions, insertions : int
        Of words, normalised.
    """

    wer: float
    cer: float
    wer_raw: float
    cer_raw: float
    words: int
    characters: int
    substitutions: int
    deletions: int
    insertions: int

    @property
    def errors(self) -> int:
        """Word errors of all three kinds."""
        return self.substitutions + self.deletions + self.insertions


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`: totals, every utterance, and how they were decoded.

    Attributes
    ----------
    base : str
        As the caller named it.
    int8 : bool
        Whether the base is quantized.
    device : str
        Where the model was.
    beam_size : int
        Hypotheses kept per window; 1: greedy.
    length_penalty : float or None
        Of the beam search; None: greedy.
    """

    rates: ErrorRates
    utterances: tuple[ScoredUtterance, ...]
    normalizer: str
    audio_seconds: float
    elapsed_seconds: float
    base: str
    int8: bool
    device: str
    beam_size: int
    length_penalty: float | None

    def totals(self) -> dict[str, Any]:
        """Everything but the utterances, as JSON writes it.

        `adapters` (None: the base alone) and `languages` are those that some utterance used.
        """
        elapsed = max(self.elapsed_seconds, 1e-9)
        return asdict(self.rates) | {
            "utterances": len(self.utterances),
            "normalizer": self.normalizer,
            "base": self.base,
            "int8": self.int8,
            "device": self.device,
            "adapters": list(dict.fromkeys(u.adapter for u in self.utterances)),
            "languages": list(dict.fromkeys(u.language for u in self.utterances)),
            "beam_size": self.beam_size,
            "length_penalty": self.length_penalty,
            "audio_seconds": round(self.audio_seconds, 3),
            "elapsed_seconds": round(self.elapsed_seconds, 3),
            "rtfx": round(self.audio_seconds / elapsed, 2),
        }


def evaluate(
    model: SpeechModel,
    data: Any,
    *,
    adapter: str | None = None,
    language: str | None = None,
    normalization: str = "auto",
    beam_size: int = 1,
    length_penalty: float | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Transcribe utterances and count errors.

    Parameters
    ----------
    model : SpeechModel
        From `load_base` or `load_for_serving`.
    data : path, data set or list of Utterance
        See `manifest.load_utterances`.
    adapter : str, optional
        Loaded adapter for every utterance; by default each uses the one its manifest line names
        (which must be loaded then), or the base.
    language : str, optional
        For every utterance without its own; English by default, where the model knows languages.
    normalization : str
        See `text.normalizer`.
    beam_size : int
        Hypotheses kept per window; 1 decodes greedily.
    length_penalty : float, optional
        As `transcription.transcribe` has it.
    batch_size : int
        Windows decoded at once.
    progress : callable, optional
        Called with utterances done and in all.

    Returns
    -------
    Evaluation
    """
    utterances = load_utterances(data)
    normalizer(normalization)  # what is wrong fails before any work
    penalty = checked_length_penalty(beam_size, length_penalty)
    started = time.perf_counter()
    scored: list[ScoredUtterance] = []
    audio_seconds = 0.0
    # Groups of a few batches: progress moves, and one group's audio is in memory at a time.
    group_size = 4 * batch_size
    for at in range(0, len(utterances), group_size):
        group = utterances[at : at + group_size]
        adapters = [adapter or _own_adapter(model, utterance) for utterance in group]
        languages = [u.language or language or "en" for u in group]
        results = transcribe_many(
            model,
            [u.samples(model.sampling_rate) for u in group],
            adapters=adapters,
            language=languages,
            beam_size=beam_size,
            length_penalty=length_penalty,
            batch_size=batch_size,
        )
        for utterance, used, code, (segments, info) in zip(
            group, adapters, languages, results, strict=True
        ):
            text = " ".join(segment.text for segment in segments)
            audio_seconds += info.duration
            scored.append(_score(model, utterance, text, used, code, normalization, info.duration))
        if progress is not None:
            progress(len(scored), len(utterances))
    return Evaluation(
        rates=total_rates(scored),
        utterances=tuple(scored),
        normalizer=normalization,
        audio_seconds=audio_seconds,
        elapsed_seconds=time.perf_counter() - started,
        base=model.source,
        int8=model.int8,
        device=str(model.device),
        beam_size=beam_size,
        length_penalty=penalty,
    )


def write_evaluation(
    evaluation: Evaluation,
    json_path: str | os.PathLike[str],
    utterances_path: str | os.PathLike[str] | None = None,
) -> None:
    """Write totals as JSON (`wer`, `cer`, ...) and, where asked, each utterance as JSONL."""
    if utterances_path is not None:
        write_jsonl(utterances_path, (asdict(item) for item in evaluation.utterances))
    write_json(json_path, evaluation.totals())


def total_rates(utterances: Sequence[ScoredUtterance]) -> ErrorRates:
    """Add the errors of all utterances up.

    An utterance whose reference normalises to nothing counts its hypothesis' words as insertions.
    """
    reference = [u.normalized_reference for u in utterances]
    hypothesis = [u.normalized_hypothesis for u in utterances]
    words = _count("words", reference, hypothesis)
    characters = _count("characters", reference, hypothesis)
    raw = [u.reference.strip() for u in utterances], [u.hypothesis.strip() for u in utterances]
    return ErrorRates(
        wer=words.rate,
        cer=characters.rate,
        wer_raw=_count("words", *raw).rate,
        cer_raw=_count("characters", *raw).rate,
        words=words.total,
        characters=characters.total,
        substitutions=words.substitutions,
        deletions=words.deletions,
        insertions=words.insertions,
    )


@dataclass(frozen=True)
class _Counts:
    total: int
    substitutions: int
    deletions: int
    insertions: int

    @property
    def rate(self) -> float:
        errors = self.substitutions + self.deletions + self.insertions
        return errors / self.total if self.total else float(errors > 0)


def _count(unit: str, references: Sequence[str], hypotheses: Sequence[str]) -> _Counts:
    try:
        import jiwer
    except ImportError as error:
        raise MissingExtraError(
            "counting errors needs jiwer; install the speech extra: "
            "pip install 'lora-kernels[speech]'"
        ) from error
    if len(references) != len(hypotheses):
        raise SpeechError(
            f"hypotheses: expected one per reference ({len(references)}), got {len(hypotheses)}"
        )
    # jiwer refuses empty references: what is said where nothing should be are insertions.
    pairs = [(r, h) for r, h in zip(references, hypotheses, strict=True) if r]
    stray = [h for r, h in zip(references, hypotheses, strict=True) if not r]
    inserted = sum(len(h.split()) if unit == "words" else len(h) for h in stray)
    if not pairs:
        return _Counts(0, 0, 0, inserted)
    process = jiwer.process_words if unit == "words" else jiwer.process_characters
    output = process([r for r, _ in pairs], [h for _, h in pairs])
    return _Counts(
        total=output.hits + output.substitutions + output.deletions,
        substitutions=output.substitutions,
        deletions=output.deletions,
        insertions=output.insertions + inserted,
    )


def _score(
    model: SpeechModel,
    utterance: Utterance,
    text: str,
    adapter: str | None,
    language: str,
    normalization: str,
    seconds: float,
) -> ScoredUtterance:
    spelling = getattr(model.processor.tokenizer, "english_spelling_normalizer", None)
    normalize = normalizer(normalization, language, spelling)
    reference, hypothesis = normalize(utterance.text), normalize(text)
    return ScoredUtterance(
        name=utterance.name,
        reference=utterance.text,
        hypothesis=text,
        normalized_reference=reference,
        normalized_hypothesis=hypothesis,
        wer=_count("words", [reference], [hypothesis]).rate,
        cer=_count("characters", [reference], [hypothesis]).rate,
        adapter=adapter,
        language=language,
        seconds=seconds,
    )


def _own_adapter(model: SpeechModel, utterance: Utterance) -> str | None:
    # Without any adapter loaded the manifest's names are ignored: that is the base's figure.
    return utterance.adapter if model.adapters else None

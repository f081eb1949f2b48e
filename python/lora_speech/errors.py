"""The errors that `lora_speech` raises on purpose.

Every message names the thing that is wrong, what was expected, what came and how to mend it.
The command line prints the message alone, without a traceback, and exits with status 2.
"""

from __future__ import annotations


class SpeechError(ValueError):
    """Base class: something the caller gave cannot be used, and the text says what to do."""


class AudioError(SpeechError):
    """An audio file or array cannot be read or used."""


class ManifestError(SpeechError):
    """A manifest line or a data set row is missing, malformed or points at nothing."""


class ModelError(SpeechError):
    """A base model cannot be found, is of an unknown family, or does not fit the request."""


class TrainingError(SpeechError):
    """A training setting, an output folder or a checkpoint cannot be used."""


class MissingExtraError(SpeechError):
    """An optional package that this function needs is not installed."""

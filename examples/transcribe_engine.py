"""Transcribes with TensorRT engines that `lora-speech export --to tensorrt` wrote, without torch.

python examples/transcribe_engine.py exported talk.wav --adapter medical

Needs TensorRT (for RTX, where `arch` was given), cuda-python (the package cuda-bindings) or PyCUDA,
and of this package's speech extra soundfile, soxr and transformers, whose feature extractor and
tokenizer do without torch.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from run_engine import import_runner


def main() -> None:
    """Read the command line, decode the first window of a recording, print its text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what the export wrote")
    parser.add_argument("audio", type=Path, help="wav, flac, ogg or mp3")
    parser.add_argument("--adapter", help="one of the live adapters (default: the base alone)")
    arguments = parser.parse_args()
    import_runner()  # before anything imports lora_kernels as a whole
    from transformers import AutoTokenizer, WhisperFeatureExtractor

    from lora_kernels.errors import LoraKernelsError
    from lora_speech.data.audio import load_audio
    from lora_speech.errors import SpeechError
    from lora_speech.export.engine_decoding import open_engines

    companions = arguments.folder / "onnx"
    try:
        engines = open_engines(arguments.folder)
        decoding = engines.decoding
        samples = load_audio(arguments.audio, decoding.sampling_rate)[: decoding.window_samples]
        extractor = WhisperFeatureExtractor.from_pretrained(companions)
        features = extractor(
            samples, sampling_rate=decoding.sampling_rate, return_tensors="np"
        ).input_features
        tokens = engines.decode(
            features.astype(np.float32), decoding.prompt, decoding.max_new_tokens, arguments.adapter
        )
    except (LoraKernelsError, SpeechError) as error:
        sys.exit(str(error))
    tokenizer = AutoTokenizer.from_pretrained(companions)
    print(tokenizer.decode(tokens, skip_special_tokens=True).strip())


if __name__ == "__main__":
    main()

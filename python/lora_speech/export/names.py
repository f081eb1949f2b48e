"""Names of the targets; apart from all else, so that the command line starts without torch."""

TARGETS: dict[str, str] = {
    "peft": "a folder for transformers and peft",
    "ctranslate2": "a folder for CTranslate2 and faster-whisper",
    "onnx": "files for ONNX Runtime",
    "tensorrt": "engines for NVIDIA GPUs",
    "torchscript": "TorchScript for LibTorch, without Python",
    "aoti": "compiled by AOTInductor for LibTorch, without Python",
    "openvino": "OpenVINO IR, for Intel's processors",
    "litert": "a LiteRT (TensorFlow Lite) file, for phones",
}
"""Each target's file in `targets`, and what it makes."""

MAX_WER = 0.05
"""Word error rate of an export against torch beyond which it is refused: INT8 in another place
changes a word here and there, a wrong graph nearly all of them."""

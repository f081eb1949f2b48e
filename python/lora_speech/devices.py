"""The device that a model runs on, as people name it: auto, cpu, cuda, cuda:1."""

from __future__ import annotations

import re

import torch

from lora_speech.errors import SpeechError

LEAST_CAPABILITY = (8, 0)
"""Of a GPU that runs models as they are loaded, in fp32: the kernels for older ones are of fp16."""


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """Settle where a model goes.

    Parameters
    ----------
    device : str or torch.device
        "auto" (the current CUDA device where torch sees one of compute capability 8.0 or more and
        the build has CUDA kernels, else the CPU), "cpu", "cuda" (the current one) or "cuda:N".

    Returns
    -------
    torch.device
        Of CUDA with its index.

    Raises
    ------
    SpeechError
        The name is another, or that CUDA device cannot be used: the text says why, and what to do.
    """
    # torch numbers CPUs as well: cpu:0.
    on_cpu = isinstance(device, torch.device) and device.type == "cpu"
    name = "cpu" if on_cpu else str(device)
    if name == "auto":
        return _cuda(None) if not why_not_cuda() else torch.device("cpu")
    named = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if named is None:
        raise SpeechError(
            f"device: expected auto, cpu, cuda or cuda:N, got {name!r}; an NVIDIA GPU is cuda"
        )
    if name == "cpu":
        return torch.device("cpu")
    index = None if named[1] is None else int(named[1])
    reason = why_not_cuda(index)
    if reason:
        raise SpeechError(f"device: {name} cannot be used: {reason}, or use cpu")
    return _cuda(index)


def why_not_cuda(index: int | None = None) -> str:
    """Why a CUDA device (None: the current one) runs no model, and the remedy; "" if it does."""
    from lora_kernels import implementations

    if torch.version.cuda is None:
        return (
            f"expected a torch with CUDA, got {torch.__version__}; install one "
            "(https://pytorch.org/get-started) and lora-kernels again"
        )
    if not torch.cuda.is_available():
        return "torch sees no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES"
    count = torch.cuda.device_count()
    if index is not None and index >= count:
        return f"expected an index below {count}, the number of GPUs that torch sees; correct it"
    build, _ = implementations.describe()
    if build.without_cuda:
        return (
            f"expected lora-kernels with CUDA kernels, got a build without ({build.without_cuda}); "
            "install it again with LORA_KERNELS_CUDA=ON"
        )
    chosen = _cuda(index)
    capability = torch.cuda.get_device_capability(chosen)
    if capability < LEAST_CAPABILITY:
        least, got = (".".join(map(str, pair)) for pair in (LEAST_CAPABILITY, capability))
        return (
            f"expected compute capability {least} or later for fp32, got {got} "
            f"({torch.cuda.get_device_name(chosen)}); take a newer GPU"
        )
    return ""


def _cuda(index: int | None) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device() if index is None else index)

"""Which device a name means, what is refused and why, and what goes there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_whisper import make_adapter

from lora_kernels import implementations
from lora_speech.devices import choose_device
from lora_speech.errors import SpeechError
from lora_speech.models import loading
from lora_speech.models.loading import load_base, load_for_serving


def pretend(
    monkeypatch: pytest.MonkeyPatch,
    *,
    torch_cuda: str | None = "13.0",
    gpus: int = 2,
    capability: tuple[int, int] = (9, 0),
    without: str = "",
) -> None:
    """Let torch and the build say that they are on a machine with these GPUs, on the second."""
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: torch_cuda is not None and gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    build = SimpleNamespace(without_cuda=without)
    monkeypatch.setattr(implementations, "describe", lambda: (build, []))


def test_names_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    assert choose_device() == choose_device("auto") == choose_device("cuda")
    assert choose_device("auto") == torch.device("cuda", 1)
    assert choose_device("cuda:0") == choose_device(torch.device("cuda", 0))
    assert choose_device("cuda:0") == torch.device("cuda", 0)
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        ({"torch_cuda": None}, "expected a torch with CUDA, got 2"),
        ({"gpus": 0}, "torch sees no GPU; check nvidia-smi"),
        (
            {"without": "no nvcc"},
            r"without \(no nvcc\); install it again with LORA_KERNELS_CUDA=ON",
        ),
        ({"capability": (7, 5)}, r"expected compute capability 8.0 .* got 7.5 \(Some GPU\)"),
    ],
    ids=["torch", "GPU", "kernels", "capability"],
)
def test_without_a_usable_gpu(
    monkeypatch: pytest.MonkeyPatch, machine: dict[str, object], reason: str
) -> None:
    pretend(monkeypatch, **machine)  # type: ignore[arg-type]
    assert choose_device("auto") == torch.device("cpu")
    for name in ("cuda", "cuda:0"):
        with pytest.raises(SpeechError, match=f"^device: {name} cannot be used: .*{reason}.*cpu$"):
            choose_device(name)


def test_bad_names(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    for name in ("gpu", "cuda:", "cuda:x", "CUDA", "", "mps", "cuda:-1"):
        with pytest.raises(SpeechError, match=r"^device: expected auto, cpu, cuda or cuda:N, got "):
            choose_device(name)
    with pytest.raises(SpeechError, match=r"cuda:2 cannot be used: expected an index below 2"):
        choose_device("cuda:2")


def test_a_device_is_refused_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, gpus=0)
    for load in (load_base, load_for_serving):
        with pytest.raises(SpeechError, match="torch sees no GPU"):
            load("/no/such/model", device="cuda")


def test_weights_and_adapters_go_there(
    tiny_whisper_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To memory that is not this machine's: torch's device without any stands for it."""
    folders = {"a": make_adapter(tiny_whisper_folder, tmp_path / "a", rank=4, seed=1)}
    here = load_for_serving(tiny_whisper_folder, int8=True, device="cpu")
    assert here.device == torch.device("cpu")
    monkeypatch.setattr(loading, "choose_device", torch.device)
    there = load_for_serving(here, folders, device="meta")
    assert there is here
    model = there.model
    tensors = [*model.parameters(), *model.buffers()]
    banks = [bank for m in model.modules() if (bank := getattr(m, "_bank", None)) is not None]
    assert banks
    for bank in banks:
        tensors += [bank.lora_a, bank.lora_b, bank.offsets, bank.scales]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert load_for_serving(there, device=None).device.type == "meta"  # stays where it is

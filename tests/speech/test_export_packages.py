"""Packages that an export needs: missing, too old, and what its check says of them."""

from __future__ import annotations

import re
from importlib import metadata, util

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lora_speech.errors import MissingExtraError
from lora_speech.export import packages
from lora_speech.export.names import TARGETS
from lora_speech.export.target import target


@pytest.mark.parametrize(
    ("to", "text"),
    [
        ("onnx", r"onnx, onnxscript, .*\[speech,export\]"),
        ("openvino", r"openvino, nncf, which .*\[speech,openvino\]"),
        ("litert", r"ai_edge_litert, which .*\[speech,litert\]"),
    ],
)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, to: str, text: str) -> None:
    monkeypatch.setattr(packages.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=text):
        target(to).require({})


@pytest.mark.parametrize("version", ["1.17.3", "2.0.0"])
def test_a_package_of_another_version_is_named(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    pytest.importorskip("onnx")
    real = metadata.version
    monkeypatch.setattr(
        packages.metadata, "version", lambda name: version if name == "onnx" else real(name)
    )
    text = f"--to onnx: got onnx {version}, expected onnx<2,>=1.18; pip install 'lora-kernels["
    with pytest.raises(MissingExtraError, match=re.escape(text)):
        target("onnx").require({})
    target("peft").require({})  # needs no onnx


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_installed_here_fits(name: str) -> None:
    chosen = target(name)
    here = [package for package in chosen.packages if util.find_spec(package)]
    packages.require_packages(name, here, chosen.extra)


def test_every_package_of_a_target_has_a_range() -> None:
    """Otherwise its version would be asked of nobody."""
    required = [Requirement(text) for text in metadata.requires("lora-kernels") or []]
    for chosen in map(target, TARGETS):
        extras = ("speech", chosen.extra)
        ranged = {
            canonicalize_name(r.name)
            for r in required
            if r.specifier and r.marker and any(r.marker.evaluate({"extra": e}) for e in extras)
        }
        for distribution in packages.installed(chosen.packages):
            assert canonicalize_name(distribution) in ranged, chosen.name


def test_the_check_tells_threads_and_versions() -> None:
    told = target("peft").environment()
    assert told["threads"] == torch.get_num_threads()
    for name in ("torch", "transformers", "peft", "lora-kernels"):
        assert told["versions"][name] == metadata.version(name)
    if metadata.packages_distributions().get("onnxruntime"):
        assert "onnxruntime" in target("onnx").environment()["versions"]
        assert "onnxruntime" not in told["versions"]

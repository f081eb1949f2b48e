"""What an export asks of a TensorRT builder, and what it leaves, with a builder that is not one.

The stand-in reads the model's inputs, so profiles are checked against the graphs themselves; what
real builders do with them needs TensorRT and is tested where that is installed.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lora_kernels.errors import LoraKernelsError
from lora_speech.errors import SpeechError
from lora_speech.export.run import ExportReport, export_model
from lora_speech.export.targets import tensorrt as target_module
from lora_speech.export.targets.onnx import open_graphs

OPTIONS = {"precision": "fp32", "max_batch": "3", "max_rank": "12"}
HEAD = (2, 48, 32)
"""Heads, positions and head size of the tiny Whisper's caches."""


class StandIn(ModuleType):
    """The module ``tensorrt``, as far as a build uses it; `builds` tells what each was given.

    Parameters
    ----------
    build : callable
        Called with this module, in the place of a builder; gives the engine or None.
    """

    __version__ = "10.16.1.11"
    float32, float16, bfloat16 = "float32", "float16", "bfloat16"
    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    PreviewFeature = SimpleNamespace(ALIASED_PLUGIN_IO_10_03="aliased")

    class ILogger:
        Severity = SimpleNamespace(ERROR=1, INTERNAL_ERROR=0)

    class IProgressMonitor:
        pass

    def __init__(self, build: Callable[[StandIn], bytes | None]) -> None:
        super().__init__("tensorrt")
        self.build, self.builds = build, list[dict[str, Any]]()

    def Builder(self, logger: Any) -> Any:
        self.logger, self.inputs = logger, list[Any]()
        given: dict[str, Any] = {"profiles": [], "cache": None}
        self.builds.append(given)
        network = SimpleNamespace(get_input=lambda index: self.inputs[index], num_inputs=0)

        def create_timing_cache(content: bytes) -> Any:
            return SimpleNamespace(content=content, serialize=lambda: content + b"+timed")

        config = SimpleNamespace(
            create_timing_cache=create_timing_cache,
            set_timing_cache=lambda cache, mismatch: given.update(cache=cache.content),
            add_optimization_profile=lambda profile: given["profiles"].append(profile.sizes),
            set_preview_feature=lambda feature, on: None,
            progress_monitor=None,
        )

        def build_serialized_network(network: Any, config: Any) -> bytes | None:
            monitor = config.progress_monitor
            monitor.phase_start("tactics", None, 4)
            assert monitor.step_complete("tactics", 0)
            monitor.phase_finish("tactics")
            return self.build(self)

        def create_optimization_profile() -> Any:
            sizes: dict[str, Any] = {}
            return SimpleNamespace(
                sizes=sizes, set_shape=lambda name, *shapes: sizes.update({name: shapes})
            )

        return SimpleNamespace(
            get_plugin_registry=lambda: SimpleNamespace(load_library=lambda path: None),
            create_network=lambda flags: network,
            create_builder_config=lambda: config,
            create_optimization_profile=create_optimization_profile,
            build_serialized_network=build_serialized_network,
        )

    def OnnxParser(self, network: Any, logger: Any) -> Any:
        def parse_from_file(path: str) -> bool:
            import onnx_ir

            kinds = {"FLOAT": "float32", "FLOAT16": "float16"}
            for value in onnx_ir.load(path).graph.inputs:
                shape = tuple(size if isinstance(size, int) else -1 for size in value.shape)
                kind = kinds.get(value.dtype.name, value.dtype.name)
                self.inputs.append(SimpleNamespace(name=value.name, shape=shape, dtype=kind))
            network.num_inputs = len(self.inputs)
            self.builds[-1]["model"] = Path(path).name.partition(".")[0]
            return True

        return SimpleNamespace(parse_from_file=parse_from_file)


@pytest.fixture(scope="module")
def built(
    tiny_whisper_folder: Path,
    adapters: Any,
    tones: list[Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> SimpleNamespace:
    """One export that succeeds, of which ``timings`` were there before."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "timings").write_bytes(b"earlier")
    module, said = StandIn(lambda module: b"engine"), list[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt", module)
        # Its engines are none: their graphs are opened instead.
        patch.setattr(target_module, "open_engines", lambda folder: open_graphs(folder / "onnx"))
        patch.chdir(folder)
        report = export_model(
            tiny_whisper_folder, "tensorrt", "out", adapters=adapters, check=tones,
            options={**OPTIONS, "timing_cache": "timings"}, say=said.append,
        )  # fmt: skip
    return SimpleNamespace(folder=folder, builds=module.builds, said=said, report=report)


@pytest.mark.slow
def test_each_graph_becomes_an_engine_and_is_told_of(built: SimpleNamespace) -> None:
    report: ExportReport = built.report
    assert report.check.identical
    assert [build["model"] for build in built.builds] == ["encode", "prefill", "step"]
    for name in ("encode", "prefill", "step"):
        assert (built.folder / "out" / f"{name}.engine").read_bytes() == b"engine"
        at = built.said.index(f"building {name}")
        assert built.said[at + 1 : at + 4] == [
            f"building {name}: tactics {step}/4" for step in (0, 1, 4)
        ]


@pytest.mark.slow
def test_the_timing_cache_goes_from_build_to_build(built: SimpleNamespace) -> None:
    """Each build reads what the one before wrote, and what was there before all."""
    assert [build["cache"] for build in built.builds] == [
        b"earlier" + b"+timed" * count for count in range(3)
    ]
    assert (built.folder / "timings").read_bytes() == b"earlier" + b"+timed" * 3
    assert sorted(path.name for path in built.folder.iterdir()) == ["out", "timings"]


@pytest.mark.slow
def test_the_script_that_builds_them_again_names_what_is_there(built: SimpleNamespace) -> None:
    script = built.folder / "out" / "trtexec.sh"
    assert os.access(script, os.X_OK)
    text = script.read_text()
    commands = [line for line in text.splitlines() if line.startswith("trtexec ")]
    assert len(commands) == 3 and ".partial" not in text
    for command, name in zip(commands, ("encode", "prefill", "step"), strict=True):
        assert (script.parent / re.findall(r"--onnx=(\S+)", command)[0]).is_file()
        assert re.findall(r"--saveEngine=(\S+)", command) == [f"{name}.engine"]
        # The script changes to its own folder: a path from elsewhere must not be relative.
        assert f"--timingCacheFile={built.folder / 'timings'}" in command


@pytest.mark.slow
def test_profiles_cover_what_the_options_say(built: SimpleNamespace) -> None:
    """Batches to 3, rank rows to 12, and prompts to half of the decoder's positions."""
    profiles = {build["model"]: build["profiles"] for build in built.builds}
    assert all(len(found) == 1 for found in profiles.values())
    encode, prefill, step = (profiles[name][0] for name in ("encode", "prefill", "step"))
    assert encode["features"] == ((1, 80, 200), (1, 80, 200), (3, 80, 200))
    assert prefill["tokens"] == ((1, 1), (1, 4), (3, 24))
    assert step["tokens"] == ((1, 1), (1, 1), (3, 1))
    assert step["lengths"] == ((1,), (1,), (3,))
    assert step["past.1.key"] == ((1, *HEAD), (1, *HEAD), (3, *HEAD))
    q, fc2 = "decoder.layers.0.self_attn.q_proj", "decoder.layers.1.fc2"
    for profile in (prefill, step):
        assert profile["adapter_ids"] == ((1,), (1,), (3,))
        assert profile[f"{q}.lora_a"] == ((1, 64), (12, 64), (12, 64))
        assert profile[f"{fc2}.lora_a"] == ((1, 128), (12, 128), (12, 128))
        assert profile[f"{fc2}.lora_b"] == ((1, 64), (12, 64), (12, 64))
        assert profile[f"{q}.offsets"] == ((2,), (3,), (65,))


def _refuses(module: StandIn) -> None:
    """TensorRT's way to fail: no engine, and the reason in its log."""
    module.logger.log(1, "tactic ran out of memory")


def _interrupted(module: StandIn) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fails", "error", "text"),
    [
        (_refuses, LoraKernelsError, "the build failed .*tactic ran out of memory"),
        (_interrupted, KeyboardInterrupt, None),
    ],
)
def test_a_build_that_fails_leaves_nothing(
    built: SimpleNamespace, tiny_whisper_folder: Path, adapters: Any, tones: list[Path],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Any, error: Any, text: str | None,
) -> None:  # fmt: skip
    """Neither the engine that was built before it, nor the graphs."""

    def copied(graphs: Any, folder: Path, say: Any) -> None:
        for path in (built.folder / "out" / "onnx").glob("*"):
            if path.suffix in (".onnx", ".bin"):
                shutil.copy(path, folder)

    def second(module: StandIn) -> bytes | None:
        return b"engine" if len(module.builds) < 2 else fails(module)

    module = StandIn(second)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(target_module, "write_onnx", copied)  # as they were exported: it is shorter
    with pytest.raises(error, match=text):
        export_model(
            tiny_whisper_folder, "tensorrt", tmp_path / "out", adapters=adapters, check=tones,
            options=OPTIONS,
        )  # fmt: skip
    assert [build["model"] for build in module.builds] == ["encode", "prefill"]
    assert not list(tmp_path.iterdir())


def test_ranks_beyond_the_profiles_are_refused_before_a_build(
    tiny_whisper_folder: Path, adapters: Any, tones: list[Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The adapters of a layer share its rank rows: 3 and 5 are 8."""
    module = StandIn(lambda module: b"engine")
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    with pytest.raises(SpeechError, match=r"max_rank: expected at least 8, .* got 7; raise it"):
        export_model(
            tiny_whisper_folder, "tensorrt", tmp_path / "out", adapters=adapters, check=tones,
            options={**OPTIONS, "max_rank": "7"},
        )  # fmt: skip
    assert not module.builds and not list(tmp_path.iterdir())

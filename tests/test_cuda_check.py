"""tools/cuda_check.py finds what it looks for; compilers have a stand-in here."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import cuda_check  # noqa: E402
import cuda_machine_code as code_of  # noqa: E402

RECORDED = json.loads((ROOT / "csrc" / "cuda" / "resources.json").read_text())
GEMM = "gemm<__half, LargeShape, kForward>"
STORAGE = ["__half", "__nv_bfloat16", "float"]

REPORT = """
ptxas info    : Compiling entry function '_Z3oneP' for 'sm_80'
ptxas info    : Function properties for _Z3oneP
    16 bytes stack frame, 24 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 16 bytes cumulative stack size
ptxas info    : Compiling entry function '_Z3twoP' for 'sm_80'
ptxas info    : Function properties for _Z3twoP
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
"""


def kernel(**changes: object) -> object:
    return code_of.Kernel(**(RECORDED["sm_80"][GEMM] | changes))


def faults(found: object, budget: dict | None = RECORDED["sm_80"][GEMM], arch: int = 80) -> str:
    return "; ".join(code_of.faults(GEMM, "f16", arch, found, budget))


def test_the_compiler_s_report_is_read() -> None:
    kernels = code_of.parse(REPORT)
    assert kernels["_Z3oneP"] == code_of.Kernel(128, 16, 24, 20)
    assert kernels["_Z3twoP"] == code_of.Kernel(32, 0, 0, 0)


def test_a_kernel_as_recorded_has_no_faults() -> None:
    assert faults(kernel()) == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spill_stores": 4}, "spill_stores 4, recorded 0"),
        ({"spill_loads": 8}, "spill_loads 8, recorded 0"),
        ({"stack": 16}, "stack 16, recorded 0"),
        ({"registers": 255}, "registers 255, recorded"),
        ({"shared": 200000}, "200000 bytes of shared memory, at most 166912"),
        ({"instructions": "FFMA:64 LDGSTS:4 LDSM:4"}, "no HMMA.16816.F32"),
        ({"instructions": "HMMA.16816.F32:32 LDSM:4"}, "no LDGSTS"),
        ({"instructions": "HMMA.16816.F32:32 LDGSTS:4"}, "no LDSM"),
    ],
)
def test_every_fault_is_named(changes: dict, words: str) -> None:
    assert words in faults(kernel(**changes))


def test_products_of_a_warpgroup_are_expected_on_sm_90_alone() -> None:
    name = "gemm_wgmma<__half, WgmmaShape<256>, kForward>"
    mma = code_of.Kernel(**(RECORDED["sm_80"][GEMM]))
    budget = RECORDED["sm_80"][GEMM]
    found = code_of.faults(name, "f16", 90, mma, budget)
    assert any("no HGMMA.64x" in fault for fault in found)
    assert not code_of.faults(name, "f16", 80, mma, budget)
    assert "HGMMA.64x256x16" in RECORDED["sm_90"][name]["instructions"]
    assert "HGMMA" not in RECORDED["sm_100"][name]["instructions"]


def test_integer_products_of_a_warpgroup_are_expected_with_their_branch() -> None:
    """On sm_90 alone; mma.sync in their place would pass for the branch's own."""
    budget = RECORDED["sm_80"][GEMM]
    for kind, full, product in (
        ("f16", "int8_persistent<__half, 256>", "IGMMA.64x256x32"),
        ("f16", "int8_persistent<__half, 320>", "IGMMA.64x160x32"),
        ("f16", "int8_wgmma<__half>", "IGMMA.64x128x32"),
        ("f32", "int8_wgmma<float>", "IGMMA.64x128x32"),
    ):
        found = RECORDED["sm_90"][full]
        assert not code_of.faults(full, kind, 90, code_of.Kernel(**found), found)
        without = code_of.Kernel(**(found | {"instructions": "IMMA.16832.S8.S8:64 LDSM:4"}))
        text = "; ".join(code_of.faults(full, kind, 90, without, found))
        wanted = (product, "HMMA", "UTMALDG:", "UTMALDG.MULTICAST", "LDGSTS")
        for words in (f"no {instruction}" for instruction in wanted):
            assert words in text
        assert not code_of.faults(full, kind, 80, code_of.Kernel(**budget), budget)
        assert "IGMMA" not in RECORDED["sm_100"][full]["instructions"]


@pytest.mark.parametrize("kind", ["__half", "__nv_bfloat16"])
def test_a_tile_of_wgmma_has_room_beside_two_blocks_that_make_its_t(kind: str) -> None:
    """What the plan counts on (t_blocks): registers go to threads in eights, 65,536 of them; of
    228 KB of shared memory each block takes 1 KB for itself.
    """
    tile = RECORDED["sm_90"][f"gemm_wgmma<{kind}, WgmmaShape<128>, kForward>"]
    of_t = RECORDED["sm_90"][f"down_beside<{kind}>"]
    threads, blocks = 256, [tile, of_t, of_t]
    assert sum(-(-block["registers"] // 8) * 8 * threads for block in blocks) <= 65536
    assert sum(block["shared"] + 1024 for block in blocks) <= 228 << 10


@pytest.mark.parametrize(
    "name",
    [
        *(f"int8_wgmma<{kind}>" for kind in STORAGE),
        *(
            f"gemm_wgmma<{kind}, WgmmaShape<128>, {product}>"
            for kind in STORAGE[:2]
            for product in ("kForward", "kInputGradient")
        ),
    ],
)
def test_two_narrow_tiles_of_wgmma_share_a_multiprocessor(name: str) -> None:
    """What the plans count on (HopperTile::together), by the same account."""
    tile = RECORDED["sm_90"][name]
    assert 2 * -(-tile["registers"] // 8) * 8 * 256 <= 65536
    assert 2 * (tile["shared"] + 1024) <= 228 << 10


@pytest.mark.parametrize(
    ("said", "found"),
    [
        (
            "info (C7510): Potential Performance Loss: wgmma.mma_async instructions are serialized",
            True,
        ),
        ("(C7519) Potential Performance Loss: warpgroup.arrive is injected around line 9", True),
        ("ptxas info : Used 128 registers, used 1 barriers", False),
    ],
)
def test_products_that_wait_for_themselves_are_found_in_what_ptxas_says(
    said: str, found: bool
) -> None:
    assert code_of.serialized(said) == found


def test_what_is_loaded_before_the_wait_is_found() -> None:
    """In the order of machine code; of kernels that may start while any other runs."""
    symbol = "_ZN12lora_kernels4cuda12int8_combineI6__halfEEvNS0_17Int8FewRowsParamsE"
    other = symbol.replace("12int8_combine", "9int8_gemm")
    section = f'\t.section\t.text.{symbol},"ax",@progbits\n'
    load, wait = "  LDG.E.128.CONSTANT R4, [R2] ;\n", "  ACQBULK ;\n"
    assert code_of.too_soon(section + load + wait) == ["int8_combine<__half>"]
    assert code_of.too_soon(section + load) == ["int8_combine<__half>"]
    assert not code_of.too_soon(section + "  UTMALDG.2D [UR8], [UR4] ;\n" + wait + load)
    assert not code_of.too_soon(section.replace(symbol, other) + load + wait)
    assert code_of.starts_early("gemm<__half, SmallShape, kRowSums>")
    assert not code_of.starts_early("gemm<__half, SmallShape, kInputGradient>")


def test_fences_of_the_device_and_boxes_for_a_cluster_are_told_from_others() -> None:
    """What release at the scope of a cluster becomes, in the main loop of a product."""
    code = '\t.section\t.text.gemm,"ax",@progbits\n'
    for line in ("MEMBAR.ALL.CTA", "MEMBAR.ALL.GPU", "UTMALDG.2D.MULTICAST [UR4]", "UTMALDG.3D"):
        code += f"  /*0140*/  {line} ;\n"
    counts = code_of.instructions(code)["gemm"]
    assert counts == {"MEMBAR.GPU": 1, "UTMALDG.MULTICAST": 1, "UTMALDG": 1}
    fenced = kernel(instructions=f"{RECORDED['sm_80'][GEMM]['instructions']} MEMBAR.GPU:1")
    assert "a fence of the whole device" in faults(fenced)


def test_a_kernel_without_a_record_is_a_fault() -> None:
    assert "not in resources.json" in faults(kernel(), budget=None)


NVCC = """#!{python}
import pathlib, sys
if "--version" in sys.argv:
    print("release {version}")
elif "-E" in sys.argv:
    print('# 1 "{path}"\\n\\n{source}')
else:
    pathlib.Path(sys.argv[sys.argv.index("-o") + 1]).write_text("cubin")
    with open("{folder}/compiled", "a") as log:
        print(*(a for a in sys.argv if a.startswith("-arch")), file=log)
    print({report!r}, file=sys.stderr)
"""


class StandIn:
    """Compilers that note what they compile, and records of their own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.version, self.source, self.path = folder, "13.0", "int x;", "a.cu"
        monkeypatch.setattr(cuda_check, "RECORD", folder / "resources.json")
        monkeypatch.setattr(cuda_check, "COMPILED", folder / "compiled.json")
        monkeypatch.setattr(cuda_check, "tool", lambda name: str(folder / name))
        monkeypatch.setattr(cuda_check, "shared_sizes", lambda _: {})
        self._run = monkeypatch
        self.report = REPORT.split("ptxas info    : Compiling entry function '_Z3two")[0].replace(
            "16 bytes stack frame, 24 bytes spill stores, 20 bytes spill loads",
            "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads",
        )

    def run(self, *options: str) -> tuple[int, list[str]]:
        """Its status, and the architectures that were compiled for."""
        values = {"python": sys.executable, "folder": self.folder, "version": self.version}
        text = NVCC.format(**values, source=self.source, path=self.path, report=self.report)
        for name, script in (("nvcc", text), ("nvdisasm", f"#!{sys.executable}\n")):
            (self.folder / name).write_text(script)
            (self.folder / name).chmod(0o755)
        (self.folder / "compiled").write_text("")
        wanted = ["--operator", "kv_pack", "--type", "f16", "--arch", "80", "90"]
        self._run.setattr(sys, "argv", ["cuda_check", *wanted, "--jobs", "1", *options])
        status = cuda_check.main()
        return status, (self.folder / "compiled").read_text().split()


def test_what_was_compiled_is_not_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    both, always = ["-arch=sm_80", "-arch=sm_90a"], ["-arch=sm_90a"]
    stand_in = StandIn(tmp_path, monkeypatch)
    assert stand_in.run("--changed") == (1, both)  # nothing is recorded
    assert not (tmp_path / "compiled.json").exists()
    assert stand_in.run("--record") == (0, both)
    assert stand_in.run("--changed") == (0, always)
    assert "1 of 2 sources are as compiled.json has them" in capsys.readouterr().out
    stand_in.path = "elsewhere/a.cu"
    assert stand_in.run("--changed") == (0, always)
    assert stand_in.run() == (0, both)
    for change in ({"source": "int y;"}, {"version": "13.1"}):
        vars(stand_in).update(change)
        assert stand_in.run("--changed") == (0, both), change
    stand_in.run()
    assert "2 sources are not as compiled.json has them: --record" in capsys.readouterr().out
    rules = tmp_path / "rules.py"
    rules.write_text("others")
    monkeypatch.setattr(cuda_check, "RULES", rules)
    stand_in.run("--record")
    assert stand_in.run("--changed") == (0, always)
    rules.write_text("new ones")
    assert stand_in.run("--changed") == (0, both)
    stand_in.run("--record")
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-G")
    assert stand_in.run("--changed") == (0, both)
    monkeypatch.delenv("NVCC_APPEND_FLAGS")
    record = tmp_path / "resources.json"
    record.write_text(record.read_text().replace('"registers": 128', '"registers": 255'))
    assert stand_in.run("--changed") == (0, both)
    stand_in.run("--record")
    options = cuda_check.Unit.options
    monkeypatch.setattr(
        cuda_check.Unit, "options", property(lambda unit: [*options.fget(unit), "-G"])
    )
    assert stand_in.run("--changed") == (0, both)


def test_what_is_not_compiled_still_has_to_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A change of the host's code alone can make a block take more."""
    stand_in = StandIn(tmp_path, monkeypatch)
    assert stand_in.run("--record")[0] == 0
    monkeypatch.setattr(cuda_check, "shared_sizes", lambda _: {"_Z3oneP": 200000})
    assert stand_in.run("--changed")[0] == 1
    assert "sm_80 _Z3oneP: 200000 bytes of shared memory, at most 166912" in capsys.readouterr().out


def test_what_has_a_fault_counts_as_not_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = StandIn(tmp_path, monkeypatch)
    stand_in.report = stand_in.report.replace("_Z3oneP", "_Z10kv_blocked")
    monkeypatch.setattr(cuda_check, "short", lambda symbol: "kv_blocked<__half, 1>")
    assert stand_in.run("--record")[0] == 1  # it has no IMMA
    assert set(json.loads((tmp_path / "compiled.json").read_text())) == {"resources.json"}
    assert len(stand_in.run("--changed")[1]) == 2


def test_the_record_has_a_hash_of_every_source() -> None:
    names = {
        f"{operator} {kind} sm_{arch}"
        for operator in cuda_check.OPERATORS
        for kind, architectures in cuda_check.TYPES.items()
        for arch in architectures
    }
    compiled = json.loads(cuda_check.COMPILED.read_text())
    assert set(compiled) == {*names, "resources.json"}
    assert compiled["resources.json"] == cuda_check.hash_of_record()


def test_everything_is_recorded_without_spills() -> None:
    assert set(RECORDED) == {f"sm_{arch}" for arch in cuda_check.ARCHITECTURES}
    for arch, kernels in RECORDED.items():
        types = ["__half"] if arch == "sm_75" else ["__half", "__nv_bfloat16", "float"]
        for kind in types:
            assert sum(f"<{kind}" in name for name in kernels) >= 18, f"{arch} {kind}"
        for name, found in kernels.items():
            assert found["spill_stores"] == found["spill_loads"] == found["stack"] == 0, name


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="c++filt is not installed")
def test_names_are_short() -> None:
    symbol = (
        "_ZN12lora_kernels4cuda4gemmI6__halfNS0_10LargeShapeELNS0_7ProductE0EEEvNS0_10GemmParamsE"
    )
    assert code_of.short(symbol) == GEMM

"""tools/cuda_check.py finds what it looks for; the compilers themselves are not called here."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
check = runpy.run_path(str(ROOT / "tools" / "cuda_check.py"), run_name="cuda_check")
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
    return check["Kernel"](**(RECORDED["sm_80"][GEMM] | changes))


def faults(found: object, budget: dict | None = RECORDED["sm_80"][GEMM], arch: int = 80) -> str:
    return "; ".join(check["faults"](GEMM, "f16", arch, found, budget))


def test_the_compiler_s_report_is_read() -> None:
    kernels = check["parse"](REPORT)
    assert kernels["_Z3oneP"] == check["Kernel"](128, 16, 24, 20)
    assert kernels["_Z3twoP"] == check["Kernel"](32, 0, 0, 0)


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
    mma = check["Kernel"](**(RECORDED["sm_80"][GEMM]))
    budget = RECORDED["sm_80"][GEMM]
    found = check["faults"](name, "f16", 90, mma, budget)
    assert any("no HGMMA.64x" in fault for fault in found)
    assert not check["faults"](name, "f16", 80, mma, budget)
    assert "HGMMA.64x256x16" in RECORDED["sm_90"][name]["instructions"]
    assert "HGMMA" not in RECORDED["sm_100"][name]["instructions"]


def test_integer_products_of_a_warpgroup_are_expected_with_their_branch() -> None:
    """On sm_90 alone; mma.sync in their place would pass for the branch's own."""
    budget = RECORDED["sm_80"][GEMM]
    for kind, name in (("f16", "__half"), ("f32", "float")):
        full = f"int8_wgmma<{name}, Int8WgmmaShape<256> >"
        found = RECORDED["sm_90"][full]
        assert not check["faults"](full, kind, 90, check["Kernel"](**found), found)
        without = check["Kernel"](**(found | {"instructions": "IMMA.16832.S8.S8:64 LDSM:4"}))
        text = "; ".join(check["faults"](full, kind, 90, without, found))
        wanted = ("IGMMA.64x128x32", "HMMA", "UTMALDG:", "UTMALDG.MULTICAST", "LDGSTS")
        for words in (f"no {instruction}" for instruction in wanted):
            assert words in text
        assert not check["faults"](full, kind, 80, check["Kernel"](**budget), budget)
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
        *(f"int8_wgmma<{kind}, Int8WgmmaShape<128> >" for kind in STORAGE),
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
    assert check["serialized"](said) == found


def test_what_is_loaded_before_the_wait_is_found() -> None:
    """In the order of machine code; of kernels that may start while any other runs."""
    symbol = "_ZN12lora_kernels4cuda12int8_combineI6__halfEEvNS0_17Int8FewRowsParamsE"
    other = symbol.replace("12int8_combine", "9int8_gemm")
    section = f'\t.section\t.text.{symbol},"ax",@progbits\n'
    load, wait = "  LDG.E.128.CONSTANT R4, [R2] ;\n", "  ACQBULK ;\n"
    assert check["too_soon"](section + load + wait) == ["int8_combine<__half>"]
    assert check["too_soon"](section + load) == ["int8_combine<__half>"]
    assert not check["too_soon"](section + "  UTMALDG.2D [UR8], [UR4] ;\n" + wait + load)
    assert not check["too_soon"](section.replace(symbol, other) + load + wait)
    assert check["starts_early"]("gemm<__half, SmallShape, kRowSums>")
    assert not check["starts_early"]("gemm<__half, SmallShape, kInputGradient>")


def test_fences_of_the_device_and_boxes_for_a_cluster_are_told_from_others() -> None:
    """What release at the scope of a cluster becomes, in the main loop of a product."""
    code = '\t.section\t.text.gemm,"ax",@progbits\n'
    for line in ("MEMBAR.ALL.CTA", "MEMBAR.ALL.GPU", "UTMALDG.2D.MULTICAST [UR4]", "UTMALDG.3D"):
        code += f"  /*0140*/  {line} ;\n"
    counts = check["instructions"](code)["gemm"]
    assert counts == {"MEMBAR.GPU": 1, "UTMALDG.MULTICAST": 1, "UTMALDG": 1}
    fenced = kernel(instructions=f"{RECORDED['sm_80'][GEMM]['instructions']} MEMBAR.GPU:1")
    assert "a fence of the whole device" in faults(fenced)


def test_a_kernel_without_a_record_is_a_fault() -> None:
    assert "not in resources.json" in faults(kernel(), budget=None)


def test_everything_is_recorded_without_spills() -> None:
    assert set(RECORDED) == {f"sm_{arch}" for arch in check["ARCHITECTURES"]}
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
    assert check["short"](symbol) == GEMM

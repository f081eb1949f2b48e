"""int8_lora_linear's CUDA kernels, run on the host by the emulation, against the reference."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from emulated import library, missing
from emulated_int8 import EmulatedInt8, EmulationError
from test_emulated_lora_linear import bank
from tolerances import assert_close

from lora_kernels import ops, reference

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (rows, in, out): one row, primes, both sides of every tile, step of depth, block and path.
SHAPES = [
    (1, 1, 1),
    (1, 64, 64),
    (3, 37, 53),
    (8, 513, 77),
    (16, 1030, 33),
    (17, 128, 130),
    (32, 64, 200),
    (33, 40, 16),
    (65, 136, 65),
    (129, 257, 191),
    (130, 96, 264),
]
# By wgmma: both sides of a tile, and more steps of depth than it has places for them.
WGMMA_SHAPES = [(1, 1, 1), (33, 40, 16), (129, 257, 191), (130, 1030, 264), (140, 516, 400)]
# By four blocks that stay: one tile, and several of one step and of more.
STAYING_SHAPES = [(1, 1, 2), (33, 40, 16), (323, 257, 390), (340, 1030, 264), (650, 140, 600)]
# path, large tiles (128, 256, 320: by wgmma, so many rows), splits of K (clustered, fused: blocks
# of a cluster), most rows
PLANS = [
    ("tiled", False, 1, 1 << 20),
    ("tiled", True, 1, 1 << 20),
    ("tiled", 128, 1, 1 << 20),
    ("tiled", 256, 1, 1 << 20),
    ("tiled", 320, 1, 1 << 20),
    ("few_rows", False, 1, 32),
    ("few_rows", False, 3, 32),
    ("clustered", False, 4, 32),
    ("fused", False, 1, 16),
    ("fused", False, 2, 16),
    ("fused", False, 8, 16),
]
NAMES = [
    f"{path}-{f'wgmma{large}' if large > 1 else 'large' if large else splits}"
    for path, large, splits, _ in PLANS
]
# One plan of each kernel.
WAYS = [("tiled", False), ("tiled", 128), ("tiled", 256), ("tiled", 320)]
WAYS += [("few_rows", False), ("fused", False)]
ORDERS = [("forward", 1), ("reverse", 1), ("shuffled", 1), ("shuffled", 2)]


def expect_made(dtype: torch.dtype, large: int) -> None:
    if large > 128 and dtype == torch.float32:
        pytest.skip("blocks that stay are for 16 bits")


def weight_of(k: int, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, scales = reference.quantize_rows(torch.randn(n, k) / k**0.5)
    return q, scales, ops.int8_pack(q, scales)


def rounded(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What plain PyTorch could give: fp16 cannot hold integer sums, so all of it in fp32."""
    return exact.float().to(dtype)


def check(emulated: EmulatedInt8, shape, dtype, mode, activation="none", static=False) -> None:
    rows, k, n = shape
    q, scales, packed = weight_of(k, n)
    x, bias = torch.randn(rows, k).to(dtype), torch.randn(n).to(dtype)
    operands = bank(mode, rows, k, n, dtype)
    operands |= {"residual": torch.randn(rows, n).to(dtype), "activation": activation}
    if static:
        operands["x_scale"] = torch.tensor([0.02])
    got = emulated.forward(x, packed, n, bias, **operands)
    want_q, want_scales = (
        reference.quantize_static(x, operands["x_scale"]) if static else reference.quantize_rows(x)
    )
    if "fused" not in emulated.plan:
        assert torch.equal(emulated.q, want_q)
        assert torch.equal(emulated.row_scales, want_scales)
    exact = reference.int8_lora_linear(x, q, scales, bias, **operands)
    assert_close(got, exact, rounded(exact, dtype), what=f"{shape} {mode} {emulated.plan}")


@pytest.mark.parametrize("plan", PLANS, ids=NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_forward_quickly(dtype: torch.dtype, plan: tuple[str, int, int, int]) -> None:
    path, large, splits, most = plan
    expect_made(dtype, large)
    shape = (min(most, 70), 101, 68 if large > 128 else 67)
    for mode in ("peft", "bank"):
        emulated = EmulatedInt8("shuffled", path=path, large=large, splits=splits)
        check(emulated, shape, dtype, mode, "gelu")


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS, ids=NAMES)
@pytest.mark.parametrize("mode", ["none", "peft", "by_rank", "bank", "fp32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_forward(dtype: torch.dtype, mode: str, plan: tuple[str, int, int, int]) -> None:
    path, large, splits, most = plan
    expect_made(dtype, large)
    activations = itertools.cycle(["none", "gelu", "silu"])
    shapes = STAYING_SHAPES if large > 128 else WGMMA_SHAPES if large > 1 else SHAPES
    for index, (shape, order) in enumerate(zip(shapes, itertools.cycle(ORDERS))):
        if shape[0] <= most:
            emulated = EmulatedInt8(
                *order, path=path, large=large, splits=splits, staged=(2, 0, 1)[index % 3]
            )
            check(emulated, shape, dtype, mode, next(activations), static=index % 3 == 0)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_calls_together_have_the_bits_of_each_alone(dtype: torch.dtype, blocks: int) -> None:
    """q, k and v of a layer: one x and one size, each its own weight, bias and adapters."""
    k = 1100 if blocks > 1 else 136  # every warp of a cluster has a step
    x = torch.randn(5, k).to(dtype)
    norm = (torch.rand(k) + 0.5, torch.randn(k), 1e-5)
    calls = []
    for staged, mode in enumerate(("none", "peft", "bank")):
        operands = bank(mode, 5, k, 70, dtype)
        calls.append((staged, weight_of(k, 70)[2], torch.randn(70).to(dtype), operands))

    def run(emulated: EmulatedInt8) -> list[torch.Tensor]:
        made = []
        for emulated.staged, packed, bias, operands in calls:
            made.append(emulated.forward(x, packed, 70, bias, norm=norm, **operands))
        return made

    for order in ORDERS:
        emulated = EmulatedInt8(*order, path="fused", splits=blocks)
        alone = run(emulated)
        with emulated.together():
            made = run(emulated)
        assert all(map(torch.equal, made, alone))


@pytest.mark.parametrize(("path", "large"), WAYS)
def test_no_order_of_threads_changes_a_bit(path: str, large: int) -> None:
    _, _, packed = weight_of(200, 70)
    x, operands = torch.randn(14, 200).half(), bank("bank", 14, 200, 70, torch.float16)
    seen = [
        EmulatedInt8(*order, path=path, large=large).forward(x, packed, 70, **operands)
        for order in ORDERS
    ]
    assert all(torch.equal(y, seen[0]) for y in seen)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_tiles_by_wgmma_have_the_bits_of_those_by_mma(dtype: torch.dtype) -> None:
    """Integer sums are exact, and the branch adds the same products in the same order."""
    library().emulated_boxes()
    for rows, k, n, added in [(140, 1016, 72, True), (330, 333, 600, False)]:
        _, _, packed = weight_of(k, n)
        x, bias = torch.randn(rows, k).to(dtype), torch.randn(n).to(dtype)
        operands = bank("bank", rows, k, n, dtype)
        if added:
            operands["residual"] = torch.randn(rows, n).to(dtype)
        want = EmulatedInt8(path="tiled").forward(x, packed, n, bias, **operands)
        assert library().emulated_boxes() == 0
        # Tiles come in pairs: one below the other, or of blocks that stay one beside the other.
        for tall, below, beside in ((128, 256, 128), (256, 256, 256), (320, 320, 256)):
            emulated = EmulatedInt8("shuffled", path="tiled", large=tall)
            assert torch.equal(emulated.forward(x, packed, n, bias, **operands), want)
            tiles = 2 * -(-rows // below) * -(-n // beside)
            assert library().emulated_boxes() == 2 * tiles * -(-k // 128)  # of q and w, each step


@pytest.mark.parametrize("large", [256, 320])
def test_blocks_that_stay_leave_a_residual_between_words_to_small_tiles(large: int) -> None:
    _, _, packed = weight_of(200, 260)
    x, whole = torch.randn(9, 200).half(), torch.randn(9 * 260 + 1).half()
    between = whole[1:].view(9, 260)
    assert between.data_ptr() % 4 == 2
    for residual, pairs in ((between.clone(), 2), (between, 3)):
        library().emulated_boxes()
        got = EmulatedInt8(path="tiled", large=large).forward(x, packed, 260, residual=residual)
        assert library().emulated_boxes() == 2 * 2 * pairs * 2
        want = EmulatedInt8(path="tiled").forward(x, packed, 260, residual=residual)
        assert torch.equal(got, want)


@pytest.mark.parametrize("large", [256, 320])
def test_blocks_that_stay_end_with_the_last_of_eight_tiles_of_rows(large: int) -> None:
    """Eight are taken one below the other before the next beside them, of which there is none."""
    _, _, packed = weight_of(16, 2)
    x = torch.randn(8 * large, 16).half()
    got = EmulatedInt8(path="tiled", large=large).forward(x, packed, 2)
    assert torch.equal(got, EmulatedInt8(path="tiled").forward(x, packed, 2))


def test_where_no_tensor_map_can_be_made_mma_takes_the_place_of_wgmma() -> None:
    packed = ops.int8_pack(torch.zeros(9, 0, dtype=torch.int8), torch.ones(9))
    bias = torch.randn(9)
    got = EmulatedInt8(path="tiled", large=256).forward(torch.zeros(5, 0), packed, 9, bias)
    assert torch.equal(got, bias.expand(5, 9))


def test_integer_sums_are_those_of_the_cpu() -> None:
    """With scales of 1 and small integers in x, y is the sums themselves, in every plan."""
    q = torch.randint(-127, 128, (70, 203), dtype=torch.int8)
    packed = ops.int8_pack(q, torch.ones(70))
    x = torch.randint(-127, 128, (14, 203)).float()
    want = reference.int8_accumulators(x.to(torch.int8), q)
    for path, large, splits, _ in PLANS:
        if large > 128:
            continue  # of 16 bits, which has the bits of the others by a test of its own
        emulated = EmulatedInt8("shuffled", path=path, large=large, splits=splits)
        got = emulated.forward(x, packed, 70, x_scale=torch.ones(1))
        assert torch.equal(got.long(), want), emulated.plan


@pytest.mark.parametrize(("path", "large"), WAYS)
def test_norm(path: str, large: int) -> None:
    """Sums of LayerNorm are in another order than torch's: a value may round to its neighbour."""
    for dtype, rows, norm_type in itertools.product(DTYPES, (1, 9), (torch.float32, None)):
        q, scales, packed = weight_of(333, 40)
        x = (3 * torch.randn(rows, 333) + 1).to(dtype)
        # Its bias begins at no multiple of sixteen bytes where x has nine rows.
        norm = (torch.rand(333) + 0.5, torch.randn(340)[rows // 9 :][:333], 1e-5)
        norm = (norm[0].to(norm_type or dtype), norm[1].to(norm_type or dtype), norm[2])
        operands = bank("peft", rows, 333, 40, dtype)
        emulated = EmulatedInt8("shuffled", path=path, large=large)
        got = emulated.forward(x, packed, 40, norm=norm, **operands)
        exact = reference.int8_lora_linear(x, q, scales, norm=norm, **operands)
        step = 127 * scales.max() / 127 * 4 / exact.abs().max()
        assert_close(got, exact, rounded(exact, dtype), extra=2 * step.item(), what=path)


def test_a_norm_of_rows_far_from_zero() -> None:
    """A mean of a thousand deviations takes three digits from x, and no more from q."""
    k = 1000
    q, scales, packed = weight_of(k, 40)
    x = torch.randn(3, k) + torch.tensor([[0.0], [1e3], [-1e3]])
    norm = (torch.ones(k), torch.zeros(k), 1e-5)
    exact = reference.int8_lora_linear(x.double(), q, scales, norm=norm)
    for staged in (0, 2):
        emulated = EmulatedInt8("shuffled", path="fused", staged=staged)
        got = emulated.forward(x, packed, 40, norm=norm)
        assert (got - exact).abs().max() < 4 * scales.max()


def test_a_bank_of_more_adapters_than_have_their_places_in_shared_memory() -> None:
    torch.manual_seed(3)
    ranks = torch.randint(0, 4, (300,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int32), ranks.cumsum(0).int()])
    total = int(offsets[-1])
    q, scales, packed = weight_of(130, 70)
    x, a, b = torch.randn(9, 130), torch.randn(total, 130) / 8, torch.randn(total, 70)
    for count in (300, 127, 128):
        operands = {
            "lora_a": a, "lora_b": b, "offsets": offsets[: count + 1], "scales": torch.rand(count),
            "adapter_ids": torch.randint(-1, count, (9,), dtype=torch.int32),
        }  # fmt: skip
        operands["adapter_ids"][4] = count - 1
        exact = reference.int8_lora_linear(x, q, scales, **operands)
        for path, splits in (("few_rows", 1), ("fused", 1), ("fused", 2)):
            emulated = EmulatedInt8("shuffled", path=path, splits=splits)
            got = emulated.forward(x, packed, 70, **operands)
            assert_close(got, exact, rounded(exact, torch.float32), what=f"{count} {path}")


def test_blocks_of_b_and_misaligned_x() -> None:
    q, scales, packed = weight_of(67, 130)
    x = torch.randn(20, 71).half()[:, 3:70]
    a, b = torch.randn(5, 67).half() / 8, torch.randn(5, 130).half()
    blocks = torch.nn.functional.pad(b, (0, 62)).view(5, 3, 64).transpose(0, 1).contiguous()
    for path, large in WAYS[:-1]:
        emulated = EmulatedInt8(path=path, large=large)
        got = emulated.forward(x, packed, 130, lora_a=a, lora_b=blocks)
        assert torch.equal(got, emulated.forward(x, packed, 130, lora_a=a, lora_b=b))
        exact = reference.int8_lora_linear(x, q, scales, lora_a=a, lora_b=b)
        assert_close(got, exact, rounded(exact, torch.float16))


@pytest.mark.parametrize(("path", "large"), WAYS)
def test_bad_values_stay_where_they_are(path: str, large: int) -> None:
    """NaN rows for what is not finite and for bad scales; unknown adapters are the base alone."""
    _, _, packed = weight_of(64, 40)
    x, operands = torch.randn(6, 64).half(), bank("bank", 6, 64, 40, torch.float16)
    emulated = EmulatedInt8(path=path, large=large)
    ids = torch.tensor([7, -9, 2, 2**31 - 1, -(2**31), 0], dtype=torch.int32)
    known = torch.tensor([-1, -1, 2, -1, -1, 0], dtype=torch.int32)
    got = emulated.forward(x, packed, 40, **(operands | {"adapter_ids": ids}))
    want = emulated.forward(x, packed, 40, **(operands | {"adapter_ids": known}))
    assert torch.equal(got, want)
    x[1, 3], x[4, 0], x[2] = float("inf"), float("nan"), 0
    got = emulated.forward(x, packed, 40)
    assert got.isnan().all(1).tolist() == [False, True, False, False, True, False]
    assert (got[2] == 0).all()
    for bad in (0.0, -1.0, float("inf"), float("nan"), 1e-45):
        got = emulated.forward(torch.randn(6, 64).half(), packed, 40, x_scale=torch.tensor([bad]))
        assert got.isnan().all()


@pytest.mark.parametrize("path", ["few_rows", "tiled"])
def test_topk(path: str) -> None:
    check_topk(path, torch.float32)


def check_topk(path: str, dtype: torch.dtype) -> None:
    """Values, the first column among equals, and the log of the sum, over parts of 2,048."""
    n, rows = 4200, 3
    q, scales, _ = weight_of(40, n)
    scales[7] = 2 * scales.max()
    q[4111], scales[4111] = q[7], scales[7]
    packed = ops.int8_pack(q, scales)
    x = torch.randn(rows, 40).to(dtype)
    x[0] = q[7].to(dtype)  # whose best column is there twice
    seen = [EmulatedInt8(*order, path=path).topk(x, packed, n, 5) for order in ORDERS[:3]]
    for other in seen:
        assert all(torch.equal(a, b) for a, b in zip(other, seen[0], strict=True))
    values, columns, sums = seen[0]
    assert columns[0, :2].tolist() == [7, 4111]
    exact = reference.int8_lora_linear(x, q, scales)
    # topk() leaves open which of two equals comes first; the two columns are equal in every row.
    order = exact.sort(dim=1, descending=True, stable=True)
    assert torch.allclose(values.double(), order.values[:, :5], rtol=1e-5)
    assert torch.equal(columns, order.indices[:, :5])
    assert torch.allclose(sums.double(), exact.logsumexp(1), rtol=1e-5)


def test_unpack() -> None:
    for n, k in [(1, 1), (70, 101), (64, 128), (130, 260)]:
        q, scales, packed = weight_of(k, n)
        weight, got = torch.full((n, k), -128, dtype=torch.int8), torch.zeros(n)
        pointers = [packed.data_ptr(), n, k, weight.data_ptr(), got.data_ptr()]
        function = library().emulated_int8_unpack
        function.argtypes = [
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            *[ctypes.c_void_p] * 2,
        ]
        assert function(*pointers) == 0
        assert torch.equal(weight, q)
        assert torch.equal(got, scales)


def test_no_bank_conflicts_and_heuristic_plans() -> None:
    library().emulated_bank_conflicts()
    for shape, words in [((1, 512, 256), "fused"), ((200, 128, 96), " tile=64x64")]:
        emulated = EmulatedInt8()
        check(emulated, shape, torch.float16, "peft")
        assert words in emulated.plan
    assert library().emulated_bank_conflicts() == 0


def test_refusals_name_every_reason() -> None:
    _, _, packed = weight_of(8, 8)
    x = torch.randn(4, 8).bfloat16()
    with pytest.raises(EmulationError, match=r"on sm_75 expected float16.*got bfloat16.*CPU"):
        EmulatedInt8(arch=75).forward(x, packed, 8)
    with pytest.raises(EmulationError, match=r"expected sm_75 or later.*got sm_61"):
        EmulatedInt8(arch=61).forward(x, packed, 8)

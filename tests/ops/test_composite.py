"""Composites give what their operators give one by one, on any number of threads."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from lora_kernels import ops, reference
from lora_kernels.implementations import describe, force_implementation

WIDTH, HEADS, CAPACITY = 128, 2, 24


class Layer:
    """A decoder layer in small: projections with adapters, self-attention, a feed-forward."""

    def __init__(self, rows: int) -> None:
        torch.manual_seed(3)
        self.rows = rows
        self.weights = {
            name: ops.int8_pack(*reference.quantize_weight(torch.randn(n, k) / k**0.5))
            for name, (n, k) in {
                "q": (WIDTH, WIDTH), "k": (WIDTH, WIDTH), "v": (WIDTH, WIDTH),
                "out": (WIDTH, WIDTH), "fc1": (4 * WIDTH, WIDTH), "fc2": (WIDTH, 4 * WIDTH),
                "words": (1000, WIDTH),
            }.items()
        }  # fmt: skip
        self.norm = (torch.rand(WIDTH) + 0.5, torch.randn(WIDTH), 1e-5)
        self.lora = {
            "lora_a": torch.randn(7, WIDTH) / WIDTH**0.5,
            "lora_b": torch.randn(7, WIDTH),
            "scales": torch.tensor([0.5, 1.5]),
            "offsets": torch.tensor([0, 3, 7], dtype=torch.int32),
            "adapter_ids": torch.arange(rows, dtype=torch.int32) % 3 - 1,
            "max_rank": 4,
        }
        self.caches = torch.zeros(2, rows, HEADS, CAPACITY, WIDTH // HEADS)
        self.lengths = torch.zeros(rows, dtype=torch.int32)

    def eager(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        w, shape = self.weights, (self.rows, 1, HEADS, WIDTH // HEADS)
        q, k, v = (
            ops.int8_lora_linear(x, w[name], WIDTH, norm=self.norm, **self.lora).view(shape)
            for name in "qkv"
        )
        y, _ = ops.kv_attention_step(q, k, v, *self.caches, self.lengths, scale=0.125)
        x = ops.int8_lora_linear(y.view(x.shape), w["out"], WIDTH, residual=x)
        h = ops.int8_lora_linear(x, w["fc1"], 4 * WIDTH, norm=self.norm, activation="gelu")
        x = ops.int8_lora_linear(h, w["fc2"], WIDTH, residual=x)
        _, best, log_sum = ops.int8_lora_topk(x, w["words"], 1000, 3, norm=self.norm, log_sum=True)
        return x, torch.cat([best.float(), log_sum[:, None]], 1)

    def record(self, x: torch.Tensor) -> tuple[ops.Composite, tuple[torch.Tensor, ...]]:
        w, shape = self.weights, (self.rows, 1, HEADS, WIDTH // HEADS)
        step = ops.Composite()
        q, k, v, y = (torch.empty_like(x) for _ in range(4))
        for name, out in zip("qkv", (q, k, v), strict=True):
            step.int8_lora_linear(x, w[name], WIDTH, norm=self.norm, out=out, **self.lora)
        step.kv_attention_step(
            q.view(shape), k.view(shape), v.view(shape), *self.caches, self.lengths,
            scale=0.125, out=y.view(shape),
        )  # fmt: skip
        step.int8_lora_linear(y, w["out"], WIDTH, residual=x, out=x)
        h = torch.empty(self.rows, 4 * WIDTH)
        step.int8_lora_linear(x, w["fc1"], 4 * WIDTH, norm=self.norm, activation="gelu", out=h)
        step.int8_lora_linear(h, w["fc2"], WIDTH, residual=x, out=x)
        best = torch.empty(self.rows, 3, dtype=torch.int64)
        log_sum = torch.empty(self.rows)
        step.int8_lora_topk(
            x, w["words"], 1000, norm=self.norm, values=torch.empty(self.rows, 3), columns=best,
            log_sum=log_sum,
        )  # fmt: skip
        return step, (best, log_sum)


@pytest.fixture(params=[1, 2, 4])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["generic", "avx2", "avx2_vnni", "avx512", "amx"])
@pytest.mark.parametrize("rows", [1, 5])
def test_equals_its_operators_bit_for_bit(name: str, rows: int, threads: int) -> None:
    available = {row.name for row in describe()[1] if row.available}
    if name not in available:
        pytest.skip(f"this CPU cannot run {name}")
    with torch.no_grad(), force_implementation(name):
        one, two = Layer(rows), Layer(rows)
        x = torch.empty(rows, WIDTH)
        step, (best, log_sum) = two.record(x)
        for position in range(CAPACITY):
            given = torch.randn(rows, WIDTH)
            one.lengths.fill_(position)
            two.lengths.fill_(position)
            x.copy_(given)
            expected, expected_best = one.eager(given)
            step.run()
            assert torch.equal(x, expected), position
            assert torch.equal(torch.cat([best.float(), log_sum[:, None]], 1), expected_best)
        assert torch.equal(one.caches, two.caches)


def test_runs_are_counted_once(threads: int) -> None:
    def runs() -> int:
        return sum(row.runs for row in describe()[1] if row.op == "int8_lora_linear")

    layer, x = Layer(2), torch.randn(2, WIDTH)
    step, _ = layer.record(x)
    before = runs()
    step.run()
    assert runs() - before == 7


def test_reads_what_was_written_since() -> None:
    layer, x = Layer(3), torch.zeros(3, WIDTH)
    step, _ = layer.record(x)
    seen = set()
    for ids in ([-1, -1, -1], [0, 1, -1], [1, 1, 1]):
        layer.lora["adapter_ids"].copy_(torch.tensor(ids, dtype=torch.int32))
        x.copy_(torch.linspace(-1, 1, 3 * WIDTH).view(3, WIDTH))
        step.run()
        seen.add(tuple(x.flatten().tolist()))
    assert len(seen) == 3


def test_keeps_its_tensors_alive_and_lets_them_go() -> None:
    layer, x = Layer(1), torch.ones(1, WIDTH)
    step, _ = layer.record(x)
    layer.weights.clear()
    gc.collect()
    step.run()
    handle = step._handle
    del step
    gc.collect()
    with pytest.raises(RuntimeError, match="handle: expected one that composite_new returned"):
        torch.ops.lora_kernels.composite_run(handle)


def test_a_failing_stage_is_named_and_threads_come_back(threads: int) -> None:
    layer, x = Layer(2), torch.ones(2, WIDTH)
    step, _ = layer.record(x)
    layer.lengths.fill_(CAPACITY)
    with pytest.raises(RuntimeError, match="kv_attention_step: lengths"):
        step.run()
    layer.lengths.fill_(0)
    step.run()


def test_several_python_threads_run_their_own_at_once(threads: int) -> None:
    inputs = [(Layer(2), torch.ones(2, WIDTH)) for _ in range(3)]
    steps = [layer.record(x)[0] for layer, x in inputs]
    workers = [threading.Thread(target=step.run) for step in steps]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(x, inputs[0][1]) for _, x in inputs)
    assert not torch.equal(inputs[0][1], torch.ones(2, WIDTH))


def test_operands_that_would_be_copied_are_refused() -> None:
    packed = ops.int8_pack(torch.ones(8, 4, dtype=torch.int8), torch.ones(8))
    step = ops.Composite()
    wide = torch.ones(4, 2).t()
    with pytest.raises(RuntimeError, match="x: expected a contiguous tensor, as it is read anew"):
        step.int8_lora_linear(wide, packed, 8, out=torch.empty(2, 8))
    with pytest.raises(RuntimeError, match="out: expected the 16 elements of the result"):
        step.int8_lora_linear(torch.ones(2, 4), packed, 8, out=torch.empty(2, 7))
    with pytest.raises(RuntimeError, match="columns: expected the 4 elements"):
        step.int8_lora_topk(
            torch.ones(2, 4), packed, 8, values=torch.empty(2, 2), columns=torch.empty(2, 2)
        )


def test_ranks_beyond_the_largest_are_refused() -> None:
    layer, x = Layer(2), torch.ones(2, WIDTH)
    lora, step = layer.lora | {"max_rank": 3}, ops.Composite()
    text = "max_rank: expected at least 4, the largest rank of offsets, got 3"
    with pytest.raises(RuntimeError, match=f"int8_lora_linear: {text}"):
        step.int8_lora_linear(x, layer.weights["q"], WIDTH, out=torch.empty(2, WIDTH), **lora)
    best = torch.empty(2, 1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=f"int8_lora_topk: {text}"):
        step.int8_lora_topk(
            x, layer.weights["q"], WIDTH, values=torch.empty(2, 1), columns=best, **lora
        )


def test_what_no_run_could_do_is_refused_at_once() -> None:
    packed = ops.int8_pack(torch.ones(4, 4, dtype=torch.int8), torch.ones(4))
    step = ops.Composite()
    x = torch.ones(2, 4)
    with pytest.raises(RuntimeError, match="out: expected memory apart from x"):
        step.int8_lora_linear(x, packed, 4, out=x)
    both = torch.ones(3, 4)
    with pytest.raises(RuntimeError, match="out: expected memory apart from x"):
        step.int8_lora_linear(both[:2], packed, 4, out=both[1:])
    with pytest.raises(RuntimeError, match="top_k: expected 1 to 4, got 5"):
        step.int8_lora_topk(
            x, packed, 4, values=torch.empty(2, 5), columns=torch.empty(2, 5, dtype=torch.int64)
        )
    with pytest.raises(RuntimeError, match="packed_weight: expected a contiguous tensor"):
        step.int8_lora_linear(x, torch.stack([packed, packed], 1)[:, 0], 4, out=torch.empty(2, 4))
    step.int8_lora_linear(x, packed, 4, residual=x.clone(), out=torch.empty(2, 4))
    step.run()


def test_says_what_it_will_run() -> None:
    layer, x = Layer(1), torch.ones(1, WIDTH)
    step, _ = layer.record(x)
    text = repr(step)
    assert text.startswith("composite threads=")
    assert text.count("int8_lora_linear") == 7
    assert text.count("kv_attention_step") == 1
    assert "top_k=3 log_sum" in text

"""``kv_pack``: fixed keys and values in int8, laid out for ``kv_attention_step``."""

from __future__ import annotations

import torch

from . import _library as _library

_op = torch.ops.lora_kernels.kv_pack.default

# csrc/include/lora_kernels/kv_packing.h: blocks of 64 positions of K, 4 channels or positions in a
# step, channels of V padded to 16
_BLOCK_POSITIONS = 64
_STEP = 4
_VALUE_CHANNELS = 16


def kv_pack(
    k: torch.Tensor, v: torch.Tensor, heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize keys and values per channel and lay them out in blocks, once per utterance.

    ``scale = amax / 127`` of each channel over all positions, ``q = clamp(rint(x * (127 / amax)),
    -127, 127)`` in fp32, rounding half to even. A channel of zeros gives 0 and the scale 0. One
    with a NaN or an infinity gives 0 and the scale NaN, which makes NaN of what attends to it: a
    channel of k of its utterance and head, a channel of v of itself alone.

    Parameters
    ----------
    k, v
        [S, C, H * D] in fp32, fp16 or bf16, as a projection leaves them; at most 131,072 positions.
        Slices of a fused projection are read in place.
    heads
        H, which the columns alone do not tell.

    Returns
    -------
    packed_k : torch.Tensor
        int8 [S, H, ceil(C / 64), ceil(D / 4), 64, 4]: position p, channel d of a head is at
        [p // 64, d // 4, p % 64, d % 4].
    packed_v : torch.Tensor
        int8 [S, H, ceil(C / 4), ceil(D / 16) * 16, 4]: it is at [p // 4, d, p % 4].
    k_scales, v_scales : torch.Tensor
        fp32 [S, H, 1, D].

    Raises
    ------
    RuntimeError
        If a shape, dtype or value does not fit; the text names the argument, what was expected,
        what came, and the fix.
    """
    return _op(k, v, heads)


@torch.library.register_fake("lora_kernels::kv_pack")
def _fake(
    k: torch.Tensor, v: torch.Tensor, heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, positions, columns = k.shape
    size = columns // heads

    def multiples(count: int, of: int) -> int:
        return (count + of - 1) // of

    keys = (multiples(positions, _BLOCK_POSITIONS), multiples(size, _STEP), _BLOCK_POSITIONS, _STEP)
    channels = multiples(size, _VALUE_CHANNELS) * _VALUE_CHANNELS
    values = (multiples(positions, _STEP), channels, _STEP)
    scales = (rows, heads, 1, size)
    return (
        k.new_empty((rows, heads, *keys), dtype=torch.int8),
        k.new_empty((rows, heads, *values), dtype=torch.int8),
        k.new_empty(scales, dtype=torch.float32),
        k.new_empty(scales, dtype=torch.float32),
    )

"""What each node of the domain ``lora_kernels`` computes, in standard ONNX operators (opset 18).

These functions are attached to an exported model, so that it runs where our kernels are not. They
repeat the formulas of :mod:`lora_kernels.reference`; the names of their inputs are prefixed because
some parsers do not keep a function's names apart from the graph's.
"""

# onnxscript reads this file's text: a statement is a node, an annotated parameter an attribute.
# What is absent from a call is a zero here, which broadcasts: a function cannot ask what it was
# given.
# mypy: ignore-errors
from __future__ import annotations

from onnx import TensorProto
from onnxscript import opset18 as op
from onnxscript import script
from onnxscript.values import Opset

DOMAIN = "lora_kernels"
VERSION = 1
OPSET = Opset(DOMAIN, VERSION)

FLOAT = TensorProto.FLOAT
INT64 = TensorProto.INT64
INT32 = TensorProto.INT32
UINT32 = TensorProto.UINT32
UINT8 = TensorProto.UINT8
INT8 = TensorProto.INT8
BOOL = TensorProto.BOOL


@script(OPSET, default_opset=op)
def LoraTerm(t_x, t_lora_a, t_lora_b, t_scales, t_offsets, t_adapter_ids):
    """``s (x At) B`` [..., N] with each group's own adapter out of the ragged bank."""
    # which adapter owns a rank row: the number of adapters that end at it or before it
    ranks = op.Shape(t_lora_a, start=0, end=1)
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    rank_rows = op.Cast(op.Range(zero, op.Squeeze(ranks), one), to=INT32)
    ends = op.Slice(t_offsets, [1], [2147483647], [0])
    ended = op.LessOrEqual(op.Unsqueeze(ends, [1]), op.Unsqueeze(rank_rows, [0]))
    owners = op.ReduceSum(op.Cast(ended, to=INT32), [0], keepdims=0)
    last = op.Sub(op.Size(t_scales), one)
    factors = op.Gather(t_scales, op.Min(op.Cast(owners, to=INT64), last))

    # x as [groups, rows of a group, K]
    shape = op.Shape(t_x)
    leading = op.Slice(shape, [0], [-1], [0])
    depth = op.Slice(shape, [-1], [2147483647], [0])
    rows = op.ReduceProd(leading, keepdims=0)
    groups = op.Size(t_adapter_ids)
    grouped = op.Concat(
        op.Unsqueeze(groups, [0]), op.Unsqueeze(op.Div(rows, groups), [0]), depth, axis=0
    )
    x = op.Reshape(t_x, grouped, allowzero=1)
    t = op.MatMul(x, op.Transpose(op.CastLike(t_lora_a, t_x), perm=[1, 0]))
    own = op.Equal(op.Unsqueeze(t_adapter_ids, [1, 2]), op.Unsqueeze(owners, [0, 1]))
    scaled = op.Mul(t, op.CastLike(factors, t_x))
    t = op.Where(own, scaled, op.CastLike(0.0, t_x))
    term = op.MatMul(t, op.CastLike(t_lora_b, t_x))
    out_features = op.Shape(t_lora_b, start=1, end=2)
    return op.Reshape(term, op.Concat(leading, out_features, axis=0), allowzero=1)


@script(OPSET, default_opset=op)
def LoraSum(s_x, s_base, s_bias, s_lora_a, s_lora_b, s_scales, s_offsets, s_adapter_ids):
    """Base product, bias and LoRA term, in the type of x."""
    term = LoraTerm(s_x, s_lora_a, s_lora_b, s_scales, s_offsets, s_adapter_ids)
    return op.Add(op.Add(s_base, op.CastLike(s_bias, s_x)), term)


@script(OPSET, default_opset=op)
def ErfGelu(g_x):
    """``x Phi(x)``, the form with the error function."""
    half = op.CastLike(0.5, g_x)
    one = op.CastLike(1.0, g_x)
    root = op.CastLike(0.7071067811865476, g_x)
    return op.Mul(op.Mul(half, g_x), op.Add(one, op.Erf(op.Mul(g_x, root))))


@script(OPSET, default_opset=op)
def LoraLinear(
    n_x, n_weight, n_bias, n_lora_a, n_lora_b, n_scales, n_offsets, n_adapter_ids, n_residual
):
    """``x Wt + bias + s (x At) B + residual``."""
    base = op.MatMul(n_x, op.Transpose(n_weight, perm=[1, 0]))
    y = LoraSum(n_x, base, n_bias, n_lora_a, n_lora_b, n_scales, n_offsets, n_adapter_ids)
    return op.Add(y, n_residual)


@script(OPSET, default_opset=op)
def LoraLinearGelu(
    n_x, n_weight, n_bias, n_lora_a, n_lora_b, n_scales, n_offsets, n_adapter_ids, n_residual
):
    """``gelu(x Wt + bias + s (x At) B) + residual``."""
    base = op.MatMul(n_x, op.Transpose(n_weight, perm=[1, 0]))
    y = LoraSum(n_x, base, n_bias, n_lora_a, n_lora_b, n_scales, n_offsets, n_adapter_ids)
    return op.Add(ErfGelu(y), n_residual)


@script(OPSET, default_opset=op)
def LoraLinearSilu(
    n_x, n_weight, n_bias, n_lora_a, n_lora_b, n_scales, n_offsets, n_adapter_ids, n_residual
):
    """``silu(x Wt + bias + s (x At) B) + residual``."""
    base = op.MatMul(n_x, op.Transpose(n_weight, perm=[1, 0]))
    y = LoraSum(n_x, base, n_bias, n_lora_a, n_lora_b, n_scales, n_offsets, n_adapter_ids)
    return op.Add(op.Mul(y, op.Sigmoid(y)), n_residual)


@script(OPSET, default_opset=op)
def Int8Weight(p_words, p_weight_scales, p_x):
    """The packed weight [N, K] as uint8 with zero point 128, transposed: [K, N].

    Only unsigned products are exact on every processor: some add signed ones in 16 bits.
    """
    channels = op.Shape(p_weight_scales)
    depth = op.Slice(op.Shape(p_x), [-1], [2147483647], [0])
    steps = op.Div(op.Add(depth, [3]), [4])
    blocks = op.Div(op.Add(channels, [63]), [64])
    # a block of 64 channels: [steps][64] words of 4 depths, then its scales and sums
    by_block = op.Reshape(p_words, op.Concat(blocks, [-1], axis=0))
    weights = op.Slice(by_block, [0], op.Mul(steps, [64]), [1])
    words = op.Reshape(weights, op.Concat(blocks, steps, [64], [1], axis=0), allowzero=1)
    words = op.Cast(words, to=UINT32)
    shifts = op.Cast(op.Constant(value_ints=[0, 8, 16, 24]), to=UINT32)
    low = op.Cast(op.Constant(value_int=255), to=UINT32)
    sign = op.Cast(op.Constant(value_int=128), to=UINT32)
    bytes_ = op.BitwiseAnd(op.BitShift(words, shifts, direction="RIGHT"), low)
    unsigned = op.Cast(op.BitwiseXor(bytes_, sign), to=UINT8)  # [blocks, steps, 64, 4]
    by_depth = op.Transpose(unsigned, perm=[1, 3, 0, 2])
    padded = op.Reshape(
        by_depth, op.Concat(op.Mul(steps, [4]), op.Mul(blocks, [64]), axis=0), allowzero=1
    )
    return op.Slice(padded, [0, 0], op.Concat(depth, channels, axis=0), [0, 1])


@script(OPSET, default_opset=op)
def Int8Base(b_x, b_words, b_weight_scales, b_x_scale):
    """``(q_x q_wt) (s_x s_w)`` in fp32, with x quantized per row.

    An x_scale above 0 is a calibrated scale; 0 means the row's own maximum.
    """
    one = op.Constant(value_float=1.0)
    zero = op.Constant(value_float=0.0)
    most = op.Constant(value_float=127.0)
    x = op.Cast(b_x, to=FLOAT)
    # 0 where the row is finite, NaN elsewhere: it goes into the scale, and so to the whole row
    poison = op.ReduceSum(op.Mul(x, zero), [-1], keepdims=1)
    amax = op.ReduceMax(op.Abs(x), [-1], keepdims=1)
    static = op.Greater(b_x_scale, zero)
    inverse = op.Where(static, op.Div(one, b_x_scale), op.Div(most, amax))
    scale = op.Where(static, b_x_scale, op.Div(amax, most))
    usable = op.And(op.Not(op.IsInf(inverse)), op.Equal(poison, zero))
    inverse = op.Where(usable, inverse, zero)
    scale = op.Add(op.Where(usable, scale, zero), poison)
    finite = op.Where(usable, x, zero)
    q = op.Clip(op.Round(op.Mul(finite, inverse)), -127.0, 127.0)
    unsigned = op.Cast(op.Add(q, 128.0), to=UINT8)
    weight = Int8Weight(b_words, b_weight_scales, b_x)
    offset = op.Cast(op.Constant(value_int=128), to=UINT8)
    sums = op.MatMulInteger(unsigned, weight, offset, offset)
    # An outer product: ONNX Runtime (1.32) takes a Mul here for one scale of all rows and fuses it.
    factor = op.MatMul(scale, op.Unsqueeze(b_weight_scales, [0]))
    return op.Mul(op.Cast(sums, to=FLOAT), factor)


@script(OPSET, default_opset=op)
def Int8LoraLinear(
    n_x,
    n_packed_weight,
    n_weight_scales,
    n_bias,
    n_lora_a,
    n_lora_b,
    n_scales,
    n_offsets,
    n_adapter_ids,
    n_residual,
    n_x_scale,
):
    """``(q_x q_wt) (s_x s_w) + bias + s (x At) B + residual``."""
    base = Int8Base(n_x, n_packed_weight, n_weight_scales, n_x_scale)
    x = op.Cast(n_x, to=FLOAT)
    y = LoraSum(x, base, n_bias, n_lora_a, n_lora_b, n_scales, n_offsets, n_adapter_ids)
    return op.CastLike(op.Add(y, op.Cast(n_residual, to=FLOAT)), n_x)


@script(OPSET, default_opset=op)
def Int8LoraLinearGelu(
    n_x,
    n_packed_weight,
    n_weight_scales,
    n_bias,
    n_lora_a,
    n_lora_b,
    n_scales,
    n_offsets,
    n_adapter_ids,
    n_residual,
    n_x_scale,
):
    """``gelu((q_x q_wt) (s_x s_w) + bias + s (x At) B) + residual``."""
    base = Int8Base(n_x, n_packed_weight, n_weight_scales, n_x_scale)
    x = op.Cast(n_x, to=FLOAT)
    y = LoraSum(x, base, n_bias, n_lora_a, n_lora_b, n_scales, n_offsets, n_adapter_ids)
    return op.CastLike(op.Add(ErfGelu(y), op.Cast(n_residual, to=FLOAT)), n_x)


@script(OPSET, default_opset=op)
def Int8LoraLinearSilu(
    n_x,
    n_packed_weight,
    n_weight_scales,
    n_bias,
    n_lora_a,
    n_lora_b,
    n_scales,
    n_offsets,
    n_adapter_ids,
    n_residual,
    n_x_scale,
):
    """``silu((q_x q_wt) (s_x s_w) + bias + s (x At) B) + residual``."""
    base = Int8Base(n_x, n_packed_weight, n_weight_scales, n_x_scale)
    x = op.Cast(n_x, to=FLOAT)
    y = LoraSum(x, base, n_bias, n_lora_a, n_lora_b, n_scales, n_offsets, n_adapter_ids)
    silu = op.Mul(y, op.Sigmoid(y))
    return op.CastLike(op.Add(silu, op.Cast(n_residual, to=FLOAT)), n_x)


@script(OPSET, default_opset=op)
def KvAppend(a_new, a_cache, a_lengths, a_slots):
    """The cache [S, H, C, D] with token t of row i at position ``lengths[i] + t``."""
    tokens = op.Squeeze(op.Shape(a_new, start=1, end=2))
    heads = op.Squeeze(op.Shape(a_new, start=2, end=3))
    capacity = op.Shape(a_cache, start=2, end=3)
    rows = op.Shape(a_new, start=0, end=1)
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    lengths = op.Unsqueeze(op.Cast(a_lengths, to=INT64), [1])
    positions = op.Add(lengths, op.Unsqueeze(op.Range(zero, tokens, one), [0]))  # [rows, T]
    table = op.Expand(op.Cast(a_slots, to=INT64), op.Concat(rows, capacity, axis=0))
    cache_rows = op.GatherElements(table, positions, axis=1)
    shape = op.Concat(op.Shape(a_new, end=3), [1], axis=0)  # [rows, T, H, 1]
    where = op.Concat(
        op.Expand(op.Unsqueeze(cache_rows, [2, 3]), shape),
        op.Expand(op.Unsqueeze(op.Range(zero, heads, one), [0, 1, 3]), shape),
        op.Expand(op.Unsqueeze(positions, [2, 3]), shape),
        axis=3,
    )
    return op.ScatterND(a_cache, where, op.CastLike(a_new, a_cache))


@script(OPSET, default_opset=op)
def KvRows(r_cache, r_slots):
    """[rows, H, C, D]: each row's positions, from the cache rows where they live."""
    positions = op.Shape(r_cache, start=2, end=3)
    rows = op.Shape(r_slots, start=0, end=1)
    table = op.Expand(op.Cast(r_slots, to=INT64), op.Concat(rows, positions, axis=0))
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    range_ = op.Unsqueeze(op.Range(zero, op.Squeeze(positions), one), [0])
    pairs = op.Concat(
        op.Unsqueeze(table, [2]), op.Unsqueeze(op.Expand(range_, op.Shape(table)), [2]), axis=2
    )
    by_position = op.Transpose(r_cache, perm=[0, 2, 1, 3])
    return op.Transpose(op.GatherND(by_position, pairs), perm=[0, 2, 1, 3])


@script(OPSET, default_opset=op)
def KvAttend(t_q, t_keys, t_values, t_first, t_each, t_scale):
    """``softmax(scale q Kt) V``: token t of row i sees ``first[i] + t each`` positions.

    q [rows, T, H, D]; keys and values [rows, H, C, D]; positions that no token sees may hold
    anything; 0 where there is nothing to see.
    """
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    tokens = op.Squeeze(op.Shape(t_q, start=1, end=2))
    capacity = op.Squeeze(op.Shape(t_keys, start=2, end=3))
    first = op.Unsqueeze(op.Cast(t_first, to=INT64), [1])
    visible = op.Add(first, op.Mul(op.Unsqueeze(op.Range(zero, tokens, one), [0]), t_each))
    position = op.Range(zero, capacity, one)
    seen = op.Less(op.Unsqueeze(position, [0, 1]), op.Unsqueeze(visible, [2]))  # [rows, T, C]
    seen = op.Unsqueeze(seen, [1])
    valid = op.ReduceMax(op.Cast(seen, to=INT32), [2], keepdims=0)  # [rows, 1, C]
    q = op.Transpose(t_q, perm=[0, 2, 1, 3])
    keys = op.CastLike(t_keys, t_q)
    values = op.CastLike(t_values, t_q)
    values = op.Where(op.Cast(op.Unsqueeze(valid, [3]), to=BOOL), values, op.CastLike(0.0, t_q))
    scores = op.Cast(op.MatMul(q, op.Transpose(keys, perm=[0, 1, 3, 2])), to=FLOAT)
    scores = op.Where(seen, op.Mul(scores, t_scale), -3.0e38)
    weights = op.Where(seen, op.Softmax(scores, axis=-1), 0.0)
    out = op.MatMul(op.CastLike(weights, t_q), values)
    return op.Transpose(out, perm=[0, 2, 1, 3])


@script(OPSET, default_opset=op)
def KvAttentionStep(n_q, n_k, n_v, n_k_cache, n_v_cache, n_lengths, n_slots, scale: float):
    """Append k and v, then attend; the caches with what was appended are outputs."""
    k_cache = KvAppend(n_k, n_k_cache, n_lengths, n_slots)
    v_cache = KvAppend(n_v, n_v_cache, n_lengths, n_slots)
    one = op.Constant(value_int=1)
    factor = op.Constant(value_float=scale)
    first = op.Add(op.Cast(n_lengths, to=INT64), one)
    keys = KvRows(k_cache, n_slots)
    values = KvRows(v_cache, n_slots)
    out = KvAttend(n_q, keys, values, first, one, factor)
    return out, k_cache, v_cache


@script(OPSET, default_opset=op)
def KvAttentionFixed(n_q, n_k_cache, n_v_cache, n_lengths, n_slots, scale: float):
    """Attend over a cache to which nothing is appended: one slot per row."""
    slots = op.Squeeze(n_slots, [1])
    keys = op.Gather(n_k_cache, slots, axis=0)
    values = op.Gather(n_v_cache, slots, axis=0)
    zero = op.Constant(value_int=0)
    factor = op.Constant(value_float=scale)
    return KvAttend(n_q, keys, values, n_lengths, zero, factor)


@script(OPSET, default_opset=op)
def KvQuantize(z_new):
    """int8 [rows, T, H, D] and fp32 scales [rows, T, H, 1], one per vector."""
    zero = op.Constant(value_float=0.0)
    most = op.Constant(value_float=127.0)
    x = op.Cast(z_new, to=FLOAT)
    poison = op.ReduceSum(op.Mul(x, zero), [-1], keepdims=1)
    amax = op.ReduceMax(op.Abs(x), [-1], keepdims=1)
    inverse = op.Div(most, amax)
    usable = op.And(op.Not(op.IsInf(inverse)), op.Equal(poison, zero))
    rounded = op.Round(op.Mul(op.Where(usable, x, zero), op.Where(usable, inverse, zero)))
    q = op.Cast(op.Clip(rounded, -127.0, 127.0), to=INT8)
    scale = op.Add(op.Where(usable, op.Div(amax, most), zero), poison)
    return q, scale


@script(OPSET, default_opset=op)
def KvAttentionStepInt8(
    n_q, n_k, n_v, n_k_cache, n_v_cache, n_k_scales, n_v_scales, n_lengths, n_slots, scale: float
):
    """:func:`KvAttentionStep` over int8 caches with a scale per position, [S, H, C, 1]."""
    q_k, s_k = KvQuantize(n_k)
    q_v, s_v = KvQuantize(n_v)
    k_cache = KvAppend(q_k, n_k_cache, n_lengths, n_slots)
    v_cache = KvAppend(q_v, n_v_cache, n_lengths, n_slots)
    k_scales = KvAppend(s_k, n_k_scales, n_lengths, n_slots)
    v_scales = KvAppend(s_v, n_v_scales, n_lengths, n_slots)
    one = op.Constant(value_int=1)
    factor = op.Constant(value_float=scale)
    first = op.Add(op.Cast(n_lengths, to=INT64), one)
    keys = op.Cast(KvRows(k_cache, n_slots), to=FLOAT)
    values = op.Cast(KvRows(v_cache, n_slots), to=FLOAT)
    keys = op.Mul(keys, KvRows(k_scales, n_slots))
    values = op.Mul(values, KvRows(v_scales, n_slots))
    out = KvAttend(n_q, keys, values, first, one, factor)
    return out, k_cache, v_cache, k_scales, v_scales


@script(OPSET, default_opset=op)
def KvAttentionFixedInt8(
    n_q, n_k_cache, n_v_cache, n_k_scales, n_v_scales, n_lengths, n_slots, scale: float
):
    """:func:`KvAttentionFixed` over int8 caches with scales per channel or position."""
    slots = op.Squeeze(n_slots, [1])
    zero = op.Constant(value_int=0)
    factor = op.Constant(value_float=scale)
    keys = op.Cast(op.Gather(n_k_cache, slots, axis=0), to=FLOAT)
    values = op.Cast(op.Gather(n_v_cache, slots, axis=0), to=FLOAT)
    keys = op.Mul(keys, op.Gather(n_k_scales, slots, axis=0))
    values = op.Mul(values, op.Gather(n_v_scales, slots, axis=0))
    return KvAttend(n_q, keys, values, n_lengths, zero, factor)

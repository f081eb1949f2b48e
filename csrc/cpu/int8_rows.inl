// Rows of x as int8_lora_linear multiplies them: INT8 with a scale per row (int8_lora_linear.h has the formulas). A row
// is read from memory once; the two passes of its quantization find it in the first cache.

// max |x| as bits: among the bits of magnitudes, infinities and NaNs are the largest, so they always win.
template <class T, class Ahead>
inline int32_t magnitude_bits(const T* x, int64_t depth, Ahead& ahead) {
  I most[4] = {set_int(0), set_int(0), set_int(0), set_int(0)};
  int64_t k = 0;
  for (; k + 4 * kLanes <= depth; k += 4 * kLanes, ahead.lines(4 * kAheadPerVector))
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) most[j] = max_int(most[j], bits_of(abs(load(x + k + j * kLanes))));
  for (; k < depth; k += kLanes) most[0] = max_int(most[0], bits_of(abs(load_at(x, k, depth))));
  return reduce_max_int(max_int(max_int(most[0], most[1]), max_int(most[2], most[3])));
}

// q[k] = clamp(round_half_even(x[k] * inverse), -127, 127), up to a multiple of 4 k; what follows K meets zero weights.
// k lies at q + k, or, a multiple of 4 vectors, at q + k * spread (tiles have the same 64 k of other rows in between).
template <class T, class Ahead>
inline void quantize_row(const T* x, int64_t depth, float inverse, uint8_t* q, int64_t spread, Ahead& ahead) {
  const F factor = set(inverse), low = set(-127.0f), high = set(127.0f);
  const auto quantized = [&](F v) { return to_int(min(max(v * factor, low), high)); };
  int64_t k = 0;
  for (; k + 4 * kLanes <= depth; k += 4 * kLanes, ahead.lines(4 * kAheadPerVector)) {
    const T* v = x + k;
    store_activations(q + k * spread, quantized(load(v)), quantized(load(v + kLanes)), quantized(load(v + 2 * kLanes)),
                      quantized(load(v + 3 * kLanes)));
  }
  if (k < depth) {
    alignas(64) uint8_t tail[4 * kLanes];
    store_activations(tail, quantized(load_at(x, k, depth)), quantized(load_at(x, k + kLanes, depth)),
                      quantized(load_at(x, k + 2 * kLanes, depth)), quantized(load_at(x, k + 3 * kLanes, depth)));
    memcpy(q + k * spread, tail, static_cast<size_t>(int8_padded_depth(depth) - k));
  }
}

// Quantizes a row and returns its scale; NaN for a row with a non-finite element, whose outputs are then NaN.
template <class T, class Ahead>
inline float quantize(const T* x, int64_t depth, const float* x_scale, uint8_t* q, Ahead& ahead, int64_t spread = 1) {
  const int32_t bits = magnitude_bits(x, depth, ahead);
  float most;
  memcpy(&most, &bits, sizeof most);
  const bool finite = bits < 0x7f800000;
  float inverse = x_scale ? 1.0f / *x_scale : 127.0f / most, scale = x_scale ? *x_scale : most / 127.0f;
  if (!finite) inverse = 0, scale = __builtin_nanf("");
  if (!__builtin_isfinite(inverse)) inverse = 0, scale = 0;  // zeros, or too small for 127 / most to be a float
  quantize_row(x, depth, inverse, q, spread, ahead);
  return scale;
}

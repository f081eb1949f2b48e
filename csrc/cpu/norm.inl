// LayerNorm of one row, in fp32, as the prologue of a product.
//   out = (x - mean) / sqrt(mean of (x - mean)^2 + eps) * weight + bias
// Three passes over a row that stays in the first cache. The squares are of centred values, so that nothing cancels;
// what rounding has left in the mean is found among the same values, and taken out with it.

template <class X, class W, class Ahead>
inline void normalize_row(const X* x, int64_t depth, const W* weight, const W* bias, float eps, float* out,
                          Ahead& ahead) {
  if (depth == 0) return;
  const float count = static_cast<float>(depth);
  const int64_t whole = depth - depth % kLanes;
  const int rest = static_cast<int>(depth - whole);
  F sum = zero();
  for (int64_t k = 0; k < whole; k += kLanes, ahead.lines(kAheadPerVector)) sum = sum + load(x + k);
  if (rest) sum = sum + load_n(x + whole, rest);
  const F mean = set(reduce_add(sum) / count);
  F left = zero(), squares = zero();
  const auto add = [&](F v) {
    left = left + v;
    squares = squares + v * v;
  };
  for (int64_t k = 0; k < whole; k += kLanes, ahead.lines(kAheadPerVector)) {
    const F v = load(x + k) - mean;
    store(out + k, v);
    add(v);
  }
  if (rest) {
    store_n(out + whole, load_n(x + whole, rest) - mean, rest);
    add(load_n(out + whole, rest));  // zero beyond the row, where x - mean is not
  }
  const float error = reduce_add(left) / count;
  const float variance = reduce_add(squares) / count - error * error;
  const F factor = set(1.0f / __builtin_sqrtf((variance > 0 ? variance : 0) + eps)), shift = set(error);
  for (int64_t k = 0; k < whole; k += kLanes, ahead.lines(kAheadPerVector))
    store(out + k, (load(out + k) - shift) * factor * load(weight + k) + load(bias + k));
  if (rest) {
    const F v = (load_n(out + whole, rest) - shift) * factor;
    store_n(out + whole, v * load_n(weight + whole, rest) + load_n(bias + whole, rest), rest);
  }
}

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
  // kSums sums side by side: one alone would wait for each addition before the next.
  constexpr int kSums = 4;
  const int64_t fours = depth - depth % (kSums * kLanes);
  F sum[kSums], left[kSums], squares[kSums];
  for (int j = 0; j < kSums; ++j) sum[j] = left[j] = squares[j] = zero();
  const auto total = [](const F* v) { return reduce_add((v[0] + v[1]) + (v[2] + v[3])); };
  for (int64_t k = 0; k < fours; k += kSums * kLanes, ahead.lines(kSums * kAheadPerVector))
#pragma GCC unroll 4
    for (int j = 0; j < kSums; ++j) sum[j] = sum[j] + load(x + k + j * kLanes);
  for (int64_t k = fours; k < whole; k += kLanes) sum[0] = sum[0] + load(x + k);
  if (rest) sum[0] = sum[0] + load_n(x + whole, rest);
  const F mean = set(total(sum) / count);
  const auto add = [&](F v, int j) {
    left[j] = left[j] + v;
    squares[j] = squares[j] + v * v;
  };
  const auto centre = [&](int64_t k, int j) {
    const F v = load(x + k) - mean;
    store(out + k, v);
    add(v, j);
  };
  for (int64_t k = 0; k < fours; k += kSums * kLanes, ahead.lines(kSums * kAheadPerVector))
#pragma GCC unroll 4
    for (int j = 0; j < kSums; ++j) centre(k + j * kLanes, j);
  for (int64_t k = fours; k < whole; k += kLanes) centre(k, 0);
  if (rest) {
    store_n(out + whole, load_n(x + whole, rest) - mean, rest);
    add(load_n(out + whole, rest), 0);  // zero beyond the row, where x - mean is not
  }
  const float error = total(left) / count;
  const float variance = total(squares) / count - error * error;
  const F factor = set(1.0f / __builtin_sqrtf((variance > 0 ? variance : 0) + eps)), shift = set(error);
  for (int64_t k = 0; k < whole; k += kLanes, ahead.lines(kAheadPerVector))
    store(out + k, (load(out + k) - shift) * factor * load(weight + k) + load(bias + k));
  if (rest) {
    const F v = (load_n(out + whole, rest) - shift) * factor;
    store_n(out + whole, v * load_n(weight + whole, rest) + load_n(bias + whole, rest), rest);
  }
}

// The epilogue that chooses instead of storing: the column of each row's largest output. Every lane keeps its own
// largest value, so that a block costs two comparisons per vector; lanes, and then tasks, are compared at the end.

// Instead of storing: keeps per lane the largest y of each row and its column. A NaN wins over numbers, as in torch.
inline void keep_best(float* best, int64_t column, int64_t columns, int64_t rows, const float* sums) {
  alignas(64) static constexpr float kCount[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const F count = load(kCount);
  for (int64_t i = 0; i < rows; ++i, best += 2 * kLanes, sums += kInt8BlockChannels) {
    F largest = load(best), where = load(best + kLanes);
    for (int64_t j = 0; j < columns; j += kLanes) {
      const F v = load(sums + j), at = count + set(static_cast<float>(column + j));
      const I inside = count < set(static_cast<float>(columns - j));
      const I better = inside & ((v > largest) | ((v != v) & (largest == largest)));
      largest = select(better, v, largest);
      where = select(better, at, where);
    }
    store(best, largest);
    store(best + kLanes, where);
  }
}

// The best of several: the first column among equals.
struct Best {
  float value = -__builtin_inff();
  float column = -1;
  void take(float v, float c) {
    const bool nan = v != v, have_nan = value != value;
    const bool better = column < 0 || (nan ? !have_nan : v > value);
    const bool equal = nan ? have_nan : v == value;
    if (better || (equal && c < column)) value = v, column = c;
  }
};

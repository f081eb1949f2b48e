// The epilogue that chooses instead of storing: the columns of each row's k largest outputs, and where asked the log of
// the sum of exponentials of all of them, as beam search wants them of a vocabulary.
//   A block of 64 columns is compared by its maximum with the k-th largest so far; only where it is larger, about
//   k ln(N / k) times in all, are its columns looked at one by one. Outputs never reach memory.
// Of equal values the first column is taken; a NaN counts as infinity. Tasks keep a list each, merged at the end:
// values and columns do not depend on the number of tasks, the log of the sum does in its last bits.

// The list of one row: k values, largest first, then their columns, how many there are, and per lane the largest value
// and the sum of exponentials relative to it.
struct TopList {
  float* values;
  int32_t *columns, *count;
  float* exponents;
  int64_t k;
  bool log_sum;

  static int64_t floats(int64_t k, bool log_sum) { return round_up(2 * k + 1, 16) + (log_sum ? 2 * kLanes : 0); }
  TopList(float* memory, int64_t k, bool log_sum)
      : values(memory),
        columns(reinterpret_cast<int32_t*>(memory + k)),
        count(columns + k),
        exponents(memory + round_up(2 * k + 1, 16)),
        k(k),
        log_sum(log_sum) {}

  void clear() {
    *count = 0;
    if (!log_sum) return;
    store(exponents, set(-3.0e38f));
    store(exponents + kLanes, zero());
  }

  bool accepts(float v) const { return *count < k || v > values[k - 1]; }

  void insert(float v, int32_t column) {
    int64_t at = *count < k ? (*count)++ : k - 1;
    for (; at > 0 && (v > values[at - 1] || (v == values[at - 1] && column < columns[at - 1])); --at) {
      values[at] = values[at - 1];
      columns[at] = columns[at - 1];
    }
    values[at] = v;
    columns[at] = column;
  }

  // sums[0 ... columns) are the outputs from `column` on; up to a vector behind them may be overwritten.
  void take(float* sums, int64_t column, int64_t columns) {
    const F infinity = set(__builtin_inff());
    for (int64_t j = columns; j < round_up(columns, kLanes); ++j) sums[j] = -__builtin_inff();
    F most = set(-__builtin_inff());
    for (int64_t j = 0; j < columns; j += kLanes) {
      const F v = load(sums + j), key = select(v != v, infinity, v);
      store(sums + j, key);
      most = max(most, key);
    }
    if (log_sum) add_exponentials(sums, columns, most);
    if (!accepts(reduce_max(most))) return;
    for (int64_t j = 0; j < columns; ++j)
      if (accepts(sums[j])) insert(sums[j], static_cast<int32_t>(column + j));
  }

  void add_exponentials(const float* sums, int64_t columns, F most) {
    const F before = load(exponents), now = max(before, most);
    F sum = load(exponents + kLanes) * exp(before - now);
    for (int64_t j = 0; j < columns; j += kLanes) sum = sum + exp(load(sums + j) - now);
    store(exponents, now);
    store(exponents + kLanes, sum);
  }

  // Lists of the same row that saw other columns.
  void merge(const TopList& other) {
    for (int32_t i = 0; i < *other.count; ++i) {
      const float v = other.values[i];
      const bool equal = *count == k && v == values[k - 1] && other.columns[i] < columns[k - 1];
      if (accepts(v) || equal) insert(v, other.columns[i]);
    }
    if (!log_sum) return;
    const F a = load(exponents), b = load(other.exponents), now = max(a, b);
    store(exponents + kLanes, load(exponents + kLanes) * exp(a - now) + load(other.exponents + kLanes) * exp(b - now));
    store(exponents, now);
  }

  float log_of_sum() const {
    const F lanes = load(exponents);
    const float most = reduce_max(lanes);
    return most + __builtin_logf(reduce_add(load(exponents + kLanes) * exp(lanes - set(most))));
  }
};

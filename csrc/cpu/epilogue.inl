// What follows the sums of one vector of outputs: bias, activation, residual, storage type.

struct Epilogue {
  const void* bias;
  DType bias_dtype;
  Activation activation;
  const void* residual;  // [M, N] contiguous, of the output's type
  void* y;
  DType dtype;
  int64_t out_features;
};

// n lanes of row m from column `column` on; n <= kLanes
inline void finish(const Epilogue& e, int64_t m, int64_t column, F v, int n) {
  if (e.bias)
    with_type(e.bias_dtype, e.bias,
              [&](auto* bias) { v = v + (n == kLanes ? load(bias + column) : load_n(bias + column, n)); });
  v = activate(v, e.activation);
  const int64_t at = m * e.out_features + column;
  with_type(e.dtype, e.y, [&](auto* out) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(out)>>;
    if (e.residual) {
      const T* residual = static_cast<const T*>(e.residual) + at;
      v = v + (n == kLanes ? load(residual) : load_n(residual, n));
    }
    T* y = const_cast<T*>(out) + at;
    n == kLanes ? store(y, v) : store_n(y, v, n);
  });
}

// All of a tile of whole vectors: types are looked up and the bias is read once per tile.
template <int MR, int NV>
inline void finish_whole(const Epilogue& e, int64_t m, int64_t column, const Tile<MR, NV>& c) {
  F bias[NV];
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) bias[j] = zero();
  if (e.bias)
    with_type(e.bias_dtype, e.bias, [&](auto* from) {
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) bias[j] = load(from + column + j * kLanes);
    });
  with_type(e.dtype, e.y, [&](auto* out) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(out)>>;
    for (int i = 0; i < MR; ++i) {
      const int64_t at = (m + i) * e.out_features + column;
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        F v = activate(c.sum[i][j] + bias[j], e.activation);
        if (e.residual) v = v + load(static_cast<const T*>(e.residual) + at + j * kLanes);
        store(const_cast<T*>(out) + at + j * kLanes, v);
      }
    }
  });
}

template <int MR, int NV>
inline void finish(const Epilogue& e, int64_t m, int64_t column, const Tile<MR, NV>& c) {
  if (e.out_features - column >= NV * kLanes) return finish_whole(e, m, column, c);
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) {
    const int64_t left = e.out_features - column - j * kLanes;
    if (left <= 0) return;
    for (int i = 0; i < MR; ++i)
      finish(e, m + i, column + j * kLanes, c.sum[i][j], left < kLanes ? static_cast<int>(left) : kLanes);
  }
}

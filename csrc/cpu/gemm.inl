// Dot products, panels and register tiles: the pieces every matrix product here is made of, in the vocabulary of
// simd/*.h.

constexpr int64_t kPanel = kTileVectors * kLanes;  // columns of a panel

// ---------- Reading ahead

// Memory that is read soon, asked for some lines at a time beside other work. A core that asks for all of it at once
// waits until memory has taken the questions; a loop that computes has room for a few in every pass.
class ReadAhead {
 public:
  // Rows of `bytes` bytes, `stride` bytes apart. What does not fit the list is left to the hardware.
  void add(const void* from, int64_t bytes, int64_t rows = 1, int64_t stride = 0) {
    if (count_ == kMost || bytes <= 0 || rows <= 0) return;
    if (bytes == stride) bytes *= rows, rows = 1;
    total_ += rows * ((bytes + 63) / 64);
    parts_[count_++] = {static_cast<const char*>(from), bytes, rows, stride};
  }
  // In cache lines, of all that was added.
  int64_t total() const { return total_; }
  void lines(int64_t count) {
    for (; count > 0 && next_ < count_; --count) {
      Part& part = parts_[next_];
      prefetch(part.from + done_);
      done_ += 64;
      if (done_ < part.bytes) continue;
      done_ = 0;
      part.from += part.stride;
      if (--part.rows == 0) ++next_;
    }
  }

 private:
  static constexpr int kMost = 17;  // the factors of eight adapters, and the weights
  struct Part {
    const char* from;
    int64_t bytes, rows, stride;
  };
  Part parts_[kMost];
  int count_ = 0, next_ = 0;
  int64_t done_ = 0, total_ = 0;
};
struct NothingAhead {
  void lines(int64_t) {}
};
// For passes over a row in the first cache, which take about a nanosecond per vector: what memory gives in that time.
constexpr int kAheadPerVector = 2;

// ---------- Dot products: both operands contiguous along k, as x and W lie in memory. For few rows.

// The rows of w behind those at hand: rows are too short for the hardware to have found the stream by itself.
struct NextRows {};

// out[i * out_stride + j] = x[i] . w[j] over k. While a block is computed the NR rows of w behind it are prefetched, or
// what `ahead` says.
template <int MR, int NR, class T, class Ahead>
LORA_KERNELS_APART void dot_block(const float* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t depth,
                                  float* out, int64_t out_stride, Ahead& ahead) {
  F sum[MR][NR];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NR; ++j) sum[i][j] = zero();
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) {
    F b[NR];
#pragma GCC unroll 8
    for (int j = 0; j < NR; ++j) {
      b[j] = load(w + j * w_stride + k);
      if constexpr (std::is_same_v<Ahead, NextRows>) prefetch(w + (j + NR) * w_stride + k);
    }
    // As many bytes as were just read.
    if constexpr (!std::is_same_v<Ahead, NextRows>) ahead.lines((NR * kLanes * static_cast<int>(sizeof(T)) + 63) / 64);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const F a = load(x + i * x_stride + k);
#pragma GCC unroll 8
      for (int j = 0; j < NR; ++j) fma_into(sum[i][j], a, b[j]);
    }
  }
  if (const int rest = static_cast<int>(depth - k)) {
    for (int j = 0; j < NR; ++j) {
      const F b = load_n(w + j * w_stride + k, rest);
      for (int i = 0; i < MR; ++i) sum[i][j] = sum[i][j] + load_n(x + i * x_stride + k, rest) * b;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NR; ++j) out[i * out_stride + j] = reduce_add(sum[i][j]);
}

template <int MR, class T, class Ahead>
inline void dot_columns(const float* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t columns, int64_t depth,
                        float* out, int64_t out_stride, Ahead& ahead) {
  // One row needs more columns at once, to have enough sums in flight and enough streams from memory.
  constexpr int NR = MR == 1 ? (kLanes == 16 ? 8 : 4) : (kLanes == 16 ? 4 : 2);
  NothingAhead nothing;
  int64_t j = 0;
  for (; j + NR <= columns; j += NR) {
    const T* rows = w + j * w_stride;
    if (std::is_same_v<Ahead, NextRows> && j + 2 * NR > columns)  // there are none
      dot_block<MR, NR>(x, x_stride, rows, w_stride, depth, out + j, out_stride, nothing);
    else
      dot_block<MR, NR>(x, x_stride, rows, w_stride, depth, out + j, out_stride, ahead);
  }
  for (; j < columns; ++j)
    dot_block<MR, 1>(x, x_stride, w + j * w_stride, w_stride, depth, out + j, out_stride, nothing);
}

// out[m, j] = x[m] . w[j] for all rows: w is read from memory once per call and stays in the first cache for the row
// blocks that follow, if `columns` is small.
template <class T, class Ahead>
inline void dots(const float* x, int64_t x_stride, int64_t rows, const T* w, int64_t w_stride, int64_t columns,
                 int64_t depth, float* out, int64_t out_stride, Ahead& ahead) {
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4)
    dot_columns<4>(x + m * x_stride, x_stride, w, w_stride, columns, depth, out + m * out_stride, out_stride, ahead);
  x += m * x_stride;
  out += m * out_stride;
  switch (rows - m) {
    case 3: return dot_columns<3>(x, x_stride, w, w_stride, columns, depth, out, out_stride, ahead);
    case 2: return dot_columns<2>(x, x_stride, w, w_stride, columns, depth, out, out_stride, ahead);
    case 1: return dot_columns<1>(x, x_stride, w, w_stride, columns, depth, out, out_stride, ahead);
    default: return;
  }
}

// ---------- Panels: [depth][width] fp32, so that a step over k reads consecutive memory and broadcasts one element of
// x.

// panel[k * width + j] = w[j * column_stride + k * k_stride]; columns beyond `columns` are zero. width is a multiple of
// kLanes.
template <class T>
inline void pack_panel(const T* w, int64_t column_stride, int64_t k_stride, int64_t columns, int64_t depth,
                       float* panel, int64_t width) {
  if (column_stride == 1) {  // consecutive columns: rows are copied
    for (int64_t k = 0; k < depth; ++k) {
      const T* row = w + k * k_stride;
      float* to = panel + k * width;
      for (int64_t j = 0; j < width; j += kLanes) {
        const int64_t left = columns - j;
        store(to + j, left >= kLanes ? load(row + j) : left > 0 ? load_n(row + j, static_cast<int>(left)) : zero());
      }
    }
    return;
  }
  for (int64_t j = 0; j < width; j += kLanes) {
    int64_t k = 0;
    if (k_stride == 1) {  // consecutive k: square blocks are transposed
      for (; k + kLanes <= depth; k += kLanes) {
        alignas(64) float block[kLanes * kLanes];
        const float* from = block;
        int64_t from_stride = kLanes;
        if (sizeof(T) == sizeof(float) && j + kLanes <= columns) {
          from = reinterpret_cast<const float*>(w + j * column_stride + k);
          from_stride = column_stride;
        } else {
          for (int i = 0; i < kLanes; ++i)
            store(block + i * kLanes, j + i < columns ? load(w + (j + i) * column_stride + k) : zero());
        }
        transpose_block(from, from_stride, panel + k * width + j, width);
      }
    }
    for (; k < depth; ++k)
      for (int i = 0; i < kLanes; ++i) {
        float value = 0;
        if (j + i < columns) store_n(&value, load_n(w + (j + i) * column_stride + k * k_stride, 1), 1);
        panel[k * width + j + i] = value;
      }
  }
}

// ---------- Register tiles: MR rows x NV vectors of sums.

template <int MR, int NV>
struct Tile {
  F sum[MR][NV];
};

template <int MR, int NV>
inline void clear(Tile<MR, NV>& c) {
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) c.sum[i][j] = zero();
}

// c[i] += sum over k of a[i * a_stride + k * k_stride] * panel[k]. Panel rows are panel_stride elements apart. With
// kPairs every "float" of a and panel is a pair of bf16. A function of its own: g++ unrolls loops completely only to a
// nesting of 8, which inlining into the callers' loops exceeds, and then keeps the sums in memory.
template <bool kPairs = false, int MR, int NV, class T>
LORA_KERNELS_APART void accumulate(Tile<MR, NV>& c, const float* a, int64_t a_stride, int64_t k_stride, const T* panel,
                                   int64_t panel_stride, int64_t depth) {
  // A local array whose indices are all constants after unrolling: only so does g++ keep the sums in registers.
  F sum[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) sum[i][j] = c.sum[i][j];
  for (int64_t k = 0; k < depth; ++k, a += k_stride, panel += panel_stride) {
    F b[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) b[j] = load(panel + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const F x = set(a[i * a_stride]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        if constexpr (kPairs)
          bf16_dot_into(sum[i][j], x, b[j]);
        else
          fma_into(sum[i][j], x, b[j]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) c.sum[i][j] = sum[i][j];
}

// One row of a tile alone, for rows that do not share a panel (each its own adapter).
template <bool kPairs = false, int MR, int NV, class T>
inline void accumulate_row(Tile<MR, NV>& c, int row, const float* a, const T* panel, int64_t panel_stride,
                           int64_t depth) {
  F sum[NV];
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) sum[j] = c.sum[row][j];
  for (int64_t k = 0; k < depth; ++k, panel += panel_stride) {
    const F x = set(a[k]);
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      if constexpr (kPairs)
        bf16_dot_into(sum[j], x, load(panel + j * kLanes));
      else
        fma_into(sum[j], x, load(panel + j * kLanes));
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) c.sum[row][j] = sum[j];
}

// Calls body(std::integral_constant<int, n>) for n = count in [1, Max].
template <int Max, class Body>
inline void with_rows(int64_t count, const Body& body) {
  if constexpr (Max > 0) {
    if (count == Max) return body(std::integral_constant<int, Max>());
    with_rows<Max - 1>(count, body);
  }
}

// Rows of the next tile: as equal as can be, never one row left alone behind full tiles.
inline int64_t tile_rows(int64_t rows_left, int64_t most) {
  const int64_t tiles = (rows_left + most - 1) / most;
  return (rows_left + tiles - 1) / tiles;
}

// out[m, j] (= or +=) sum over k of a[m * a_stride + k * k_stride] * panel[k, j], for one narrow panel (kLanes columns)
template <bool kPairs = false, class Store>
inline void narrow_product(const float* a, int64_t a_stride, int64_t k_stride, int64_t rows, const float* panel,
                           int64_t panel_stride, int64_t depth, const Store& keep) {
  for (int64_t m = 0; m < rows;) {
    const int64_t count = tile_rows(rows - m, kNarrowTileRows);
    with_rows<kNarrowTileRows>(count, [&](auto tag) {
      Tile<decltype(tag)::value, 1> c;
      clear(c);
      accumulate<kPairs>(c, a + m * a_stride, a_stride, k_stride, panel, panel_stride, depth);
      for (int i = 0; i < decltype(tag)::value; ++i) keep(m + i, c.sum[i][0]);
    });
    m += count;
  }
}

// ---------- Rows as fp32, dropout applied

// The vector at k of a row of `depth` elements; zero from its end on.
template <class T>
inline F load_at(const T* x, int64_t k, int64_t depth) {
  return k + kLanes <= depth ? load(x + k) : k < depth ? load_n(x + k, static_cast<int>(depth - k)) : zero();
}

template <class T>
inline void convert_row(const T* x, int64_t depth, float* out) {
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) store(out + k, load(x + k));
  if (k < depth) store_n(out + k, load_n(x + k, static_cast<int>(depth - k)), static_cast<int>(depth - k));
}

// As bf16 on its way into bf16_dot_into().
template <class T>
inline void round_for_dot(bf16* to, T v) {
  if constexpr (kHasBf16Dot) store_for_dot(to, v);
}
template <class T>
inline void convert_row_for_dot(const T* x, int64_t depth, bf16* out) {
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) round_for_dot(out + k, load(x + k));
  if (k < depth) store_n(out + k, load_n(x + k, static_cast<int>(depth - k)), static_cast<int>(depth - k));
}

struct Dropout {
  double p = 0;
  uint64_t seed = 0;
  explicit operator bool() const { return p > 0; }
};

// x[i] = kept(index + i) ? x[i] / (1 - p) : 0 (philox.h)
inline void drop(const Dropout& dropout, uint64_t index, int64_t count, float* x) {
  const uint32_t threshold = dropout_threshold(dropout.p);
  const float scale = static_cast<float>(1.0 / (1.0 - dropout.p));
  for (int64_t i = 0; i < count;) {
    const Philox4 numbers = philox(dropout.seed, index / 4);
    for (int lane = static_cast<int>(index % 4); lane < 4 && i < count; ++lane, ++i, ++index)
      x[i] = numbers.v[lane] >= threshold ? x[i] * scale : 0.0f;
  }
}

// Calls body with a pointer of the storage type.
template <class Body>
inline void with_type(DType type, const void* p, const Body& body) {
  switch (type) {
    case DType::kFloat32: return body(static_cast<const float*>(p));
    case DType::kFloat16: return body(static_cast<const fp16*>(p));
    case DType::kBFloat16: return body(static_cast<const bf16*>(p));
    case DType::kInt8: return;
  }
}

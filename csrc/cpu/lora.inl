// The LoRA branch of both linear operators: which adapter a row uses, t = s x At, and the panels of B.

struct AdapterRanks {
  int64_t begin = 0, rank = 0;  // rank rows begin ... begin + rank of the bank
  float scale = 0;
};

// One factor of the LoRA branch.
struct Factor {
  const void* data;
  int64_t rank_stride, k_stride;
  int64_t block_stride = 0;  // over 0: of blocks of kLoraBlockColumns k (LoraBank)

  // Of element (rank row r, k).
  int64_t at(int64_t r, int64_t k) const {
    return r * rank_stride +
           (block_stride ? k / kLoraBlockColumns * block_stride + k % kLoraBlockColumns : k * k_stride);
  }
};

// A view of one call's bank: the branch is t = s x downt, then t up. Forward: down is A, up is B; for dx the two change
// places.
struct Bank {
  LoraShape shape;
  LoraBank bank;
  int64_t rows;  // of x
  Factor down, up;
  bool pairs = false;  // x, the factors and t are bf16, multiplied two k or two rank rows at a time (vdpbf16ps)

  static Bank forward(const LoraShape& shape, const LoraBank& bank, int64_t rows) {
    return {shape,
            bank,
            rows,
            {bank.a, bank.a_stride, 1},
            {bank.b, bank.b_stride_rank, bank.b_stride_out, bank.b_stride_block}};
  }
  static Bank backward(const LoraShape& shape, const LoraBank& bank, int64_t rows) {
    return {shape, bank, rows, {bank.b, bank.b_stride_rank, bank.b_stride_out}, {bank.a, bank.a_stride, 1}};
  }

  bool present() const { return shape.present(); }

  int64_t adapter_of(int64_t row) const {
    if (shape.groups == 0) return 0;
    return bank.adapter_ids[row / (rows / shape.groups)];
  }

  // First row after `row`, at most `end`, with another adapter.
  int64_t run_end(int64_t row, int64_t end) const {
    if (shape.groups == 0) return end;
    const int64_t per_group = rows / shape.groups, adapter = adapter_of(row);
    int64_t next = (row / per_group + 1) * per_group;
    while (next < end && bank.adapter_ids[next / per_group] == adapter) next += per_group;
    return next < end ? next : end;
  }

  AdapterRanks ranks(int64_t adapter) const {
    if (adapter < 0) return {};
    const float scale = bank.scales ? bank.scales[adapter] : 1.0f;
    if (!bank.offsets) return {0, shape.total_rank, scale};
    return {bank.offsets[adapter], bank.offsets[adapter + 1] - bank.offsets[adapter], scale};
  }
};

// Up to so many rows A and B are read as they lie, also where they are stored in 16 bits: packing pays for itself only
// when many rows come back to a panel.
constexpr int64_t kRowsAsItLies = 8;

inline int64_t padded_rank(const LoraShape& shape) { return round_up(shape.max_rank, kLanes); }

// Floats of scratch that down_rows() needs.
inline int64_t down_scratch(const LoraShape& shape, int64_t depth) { return depth * padded_rank(shape); }

// t[m - begin, :] = scale * x[m] . down rows of m's adapter, for rows [begin, end); zero where a row has none. x is
// fp32, x + m * x_stride is row m. t has rows of padded_rank floats. Few rows: dot products; many: panels. `packed`
// (optional, -1 at first) remembers whose panel the scratch holds, for callers that come back with more rows. `ahead`
// is what few rows ask for meanwhile.
template <class Ahead>
inline void down_rows(const Bank& bank, const float* x, int64_t x_stride, int64_t begin, int64_t end, int64_t depth,
                      float* t, float* scratch, int64_t* packed, Ahead& ahead) {
  const int64_t width = padded_rank(bank.shape);
  for (int64_t m = begin; m < end;) {
    const int64_t stop = bank.run_end(m, end);
    const AdapterRanks adapter = bank.ranks(bank.adapter_of(m));
    float* rows = t + (m - begin) * width;
    memset(rows, 0, static_cast<size_t>((stop - m) * width) * sizeof(float));
    if (adapter.rank > 0) {
      const Factor& down = bank.down;
      // By the size of a group rather than of this run, which may be cut short by tasks and chunks: the path, and with
      // it the order of the sums, is the same for any number of threads.
      const int64_t together = bank.shape.groups > 0 ? bank.rows / bank.shape.groups : bank.rows;
      with_type(bank.shape.dtype, down.data, [&](auto* a) {
        a += adapter.begin * down.rank_stride;
        if ((together <= 4 || bank.rows <= kRowsAsItLies) && down.k_stride == 1) {
          dots(x + m * x_stride, x_stride, stop - m, a, down.rank_stride, adapter.rank, depth, rows, width, ahead);
          for (int64_t i = 0; i < (stop - m) * width; i += kLanes) store(rows + i, load(rows + i) * set(adapter.scale));
        } else {
          const int64_t columns = round_up(adapter.rank, kLanes);
          const int64_t id = bank.adapter_of(m);
          if (!packed || *packed != id)
            pack_panel(a, down.rank_stride, down.k_stride, adapter.rank, depth, scratch, columns);
          if (packed) *packed = id;
          for (int64_t j = 0; j < columns; j += kLanes)
            narrow_product(x + m * x_stride, x_stride, 1, stop - m, scratch + j, columns, depth,
                           [&](int64_t i, F v) { store(rows + i * width + j, v * set(adapter.scale)); });
        }
      });
    }
    m = stop;
  }
}
inline void down_rows(const Bank& bank, const float* x, int64_t x_stride, int64_t begin, int64_t end, int64_t depth,
                      float* t, float* scratch) {
  NextRows ahead;
  down_rows(bank, x, x_stride, begin, end, depth, t, scratch, nullptr, ahead);
}

// The same with pairs: x, A and t are bf16, depth is even, and so are the strides of x and A.
inline void down_pairs(const Bank& bank, const bf16* x, int64_t x_stride, int64_t begin, int64_t end, int64_t depth,
                       bf16* t, float* scratch, int64_t* packed) {
  const int64_t width = padded_rank(bank.shape);
  for (int64_t m = begin; m < end;) {
    const int64_t stop = bank.run_end(m, end), id = bank.adapter_of(m);
    const AdapterRanks adapter = bank.ranks(id);
    const int64_t columns = round_up(adapter.rank, kLanes), stride = bank.down.rank_stride / 2;
    if (adapter.rank > 0 && *packed != id) {
      const float* a = static_cast<const float*>(bank.down.data) + adapter.begin * stride;
      pack_panel(a, stride, 1, adapter.rank, depth / 2, scratch, columns);
      *packed = id;
    }
    bf16* rows = t + (m - begin) * width;
    const float* pairs = reinterpret_cast<const float*>(x + m * x_stride);
    for (int64_t j = 0; j < columns; j += kLanes)
      narrow_product<kHasBf16Dot>(pairs, x_stride / 2, 1, stop - m, scratch + j, columns, depth / 2,
                                  [&](int64_t i, F v) { round_for_dot(rows + i * width + j, v * set(adapter.scale)); });
    m = stop;
  }
}

// A panel of pairs: out[i][j] = rank rows 2 i and 2 i + 1 of column j, bf16 from element `first` of a factor on; what
// is beyond `rank` rows or `columns` is zero.
inline void pair_rank_rows(const Factor& up, int64_t first, int64_t rank, int64_t columns, float* out) {
  const bf16* b = static_cast<const bf16*>(up.data) + first;
  const auto bits = [&](int64_t r, int64_t j) {  // as the upper halves of lanes
    const int64_t left = columns - j;
    if (r >= rank || left <= 0) return set_int(0);
    const bf16* row = b + r * up.rank_stride;
    if (up.k_stride == 1) return bits_of(left >= kLanes ? load(row + j) : load_n(row + j, static_cast<int>(left)));
    bf16 lanes[kLanes];
    const int count = static_cast<int>(left < kLanes ? left : kLanes);
    for (int i = 0; i < count; ++i) lanes[i] = row[(j + i) * up.k_stride];
    return bits_of(load_n(lanes, count));
  };
  for (int64_t r = 0; r < rank; r += 2, out += kPanel)
    for (int64_t j = 0; j < kPanel; j += kLanes)
      store(out + j, from_bits(((bits(r, j) >> 16) & 0xffff) | bits(r + 1, j)));
}

// The panel of columns [n, n + columns) of an adapter's up factor: its own memory where that can be read as it lies,
// else packed into scratch [rank][kPanel] as fp32, or as pairs.
struct UpPanel {
  const void* data = nullptr;
  int64_t stride = 0;
  DType dtype = DType::kFloat32;
};
inline UpPanel up_panel(const Bank& bank, const AdapterRanks& adapter, int64_t n, int64_t columns, float* scratch) {
  const Factor& up = bank.up;
  const int64_t first = up.at(adapter.begin, n);
  const DType dtype = bank.shape.dtype;
  UpPanel panel{scratch, kPanel, DType::kFloat32};
  if (bank.pairs) {
    pair_rank_rows(up, first, adapter.rank, columns, scratch);
    return panel;
  }
  with_type(dtype, up.data, [&](auto* b) {
    if (up.k_stride == 1 && columns == kPanel && (dtype == DType::kFloat32 || bank.rows <= kRowsAsItLies))
      panel = {b + first, up.rank_stride, dtype};
    else
      pack_panel(b + first, up.k_stride, up.rank_stride, columns, adapter.rank, scratch, kPanel);
  });
  return panel;
}

// What rows [begin, end), few, will read of the down factors ...
inline void add_down(const Bank& bank, int64_t begin, int64_t end, int64_t depth, ReadAhead* ahead) {
  if (bank.down.k_stride != 1) return;
  const auto size = static_cast<int64_t>(size_of(bank.shape.dtype));
  const int64_t stride = bank.down.rank_stride * size;
  for (int64_t m = begin; m < end; m = bank.run_end(m, end)) {
    const AdapterRanks adapter = bank.ranks(bank.adapter_of(m));
    ahead->add(static_cast<const char*>(bank.down.data) + adapter.begin * stride, depth * size, adapter.rank, stride);
  }
}

// ... and up_panel() of the block of columns from n on, of out_features, of the up factors, which lie as
// [rank][columns] or, as PEFT has it, [columns][rank].
inline void add_up(const Bank& bank, int64_t begin, int64_t end, int64_t n, int64_t out_features, ReadAhead* ahead) {
  const int64_t left = out_features - n, columns = left < kLoraBlockColumns ? left : kLoraBlockColumns;
  if (columns <= 0) return;
  const Factor& up = bank.up;
  const auto size = static_cast<int64_t>(size_of(bank.shape.dtype));
  for (int64_t m = begin; m < end; m = bank.run_end(m, end)) {
    const AdapterRanks adapter = bank.ranks(bank.adapter_of(m));
    const char* from = static_cast<const char*>(up.data) + up.at(adapter.begin, n) * size;
    if (up.k_stride == 1)
      ahead->add(from, columns * size, adapter.rank, up.rank_stride * size);
    else if (up.rank_stride == 1)
      ahead->add(from, adapter.rank * size, columns, up.k_stride * size);
  }
}

// Adds t up of MR rows from row m on to a tile; `t` is the row of t of row m, fp32, or bf16 with pairs. Rows that share
// an adapter share its panel; `last` remembers whose panel the scratch holds.
template <int MR, class T>
inline void add_lora(Tile<MR, kTileVectors>& c, const Bank& bank, int64_t m, const T* t, int64_t n, int64_t columns,
                     float* scratch, int64_t* last, UpPanel* panel) {
  constexpr bool kPairs = kHasBf16Dot && std::is_same_v<T, bf16>;
  const int64_t width = padded_rank(bank.shape), stride = kPairs ? width / 2 : width;
  const auto* rows = reinterpret_cast<const float*>(t);
  const int64_t first_adapter = bank.adapter_of(m);
  if (bank.run_end(m, m + MR) == m + MR) {
    const AdapterRanks adapter = bank.ranks(first_adapter);
    if (adapter.rank == 0) return;
    if (*last != first_adapter) *panel = up_panel(bank, adapter, n, columns, scratch), *last = first_adapter;
    if constexpr (kPairs)
      accumulate<true>(c, rows, stride, 1, static_cast<const float*>(panel->data), kPanel, (adapter.rank + 1) / 2);
    else
      with_type(panel->dtype, panel->data,
                [&](auto* up) { accumulate(c, rows, stride, 1, up, panel->stride, adapter.rank); });
    return;
  }
  for (int i = 0; i < MR; ++i) {
    const int64_t id = bank.adapter_of(m + i);
    const AdapterRanks adapter = bank.ranks(id);
    if (adapter.rank == 0) continue;
    if (*last != id) *panel = up_panel(bank, adapter, n, columns, scratch), *last = id;
    if constexpr (kPairs)
      accumulate_row<true>(c, i, rows + i * stride, static_cast<const float*>(panel->data), kPanel,
                           (adapter.rank + 1) / 2);
    else
      with_type(panel->dtype, panel->data,
                [&](auto* up) { accumulate_row(c, i, rows + i * stride, up, panel->stride, adapter.rank); });
  }
}

// kv_pack on a CPU: each channel's scale is amax / 127 over the positions, and clamp(rint(x * (127 / amax))) goes to
// the blocks of kv_packing.h.
//   A dozen instructions per vector; bytes: x twice, the second time from cache, and its int8 once: bound by memory.
//
// A unit of work is one head of k or of v of one utterance: one pass over its columns for the largest magnitudes, and
// one that quantizes them, which finds them in the second cache (384 KB for 1,500 positions of 64 channels in fp32).
// The rows of one head are H * D elements apart, on a page of their own every few, where the hardware's prefetcher
// stops: the first pass asks for memory kRowsAhead rows early.
// K goes through a transposition of dwords of four channels each; V takes four positions into each dword.
//
// Measured (one core with AVX-512, 1,500 positions, 384 to 1,280 columns in fp32, cold): 52 to 65 % of a plain read of
// k and v, which is 2 to 7 % of the time of the projection that makes them.

constexpr int64_t kRowsAhead = 16;          // latency times the bandwidth of one core, in rows of 256 bytes
constexpr int64_t kPackTaskBytes = 100000;  // read by one core in the time of a fork and join

// The columns of one head of one utterance.
template <class T>
struct Columns {
  const T* base;
  int64_t stride;  // elements between positions
  int64_t positions;
  int64_t head_size;
  const T* at(int64_t p) const { return base + p * stride; }
  F load_from(int64_t p, int64_t d) const { return p < positions ? load_at(at(p), d, head_size) : zero(); }
  void ahead(int64_t p) const {
    if (p + kRowsAhead >= positions) return;
    const char* row = reinterpret_cast<const char*>(at(p + kRowsAhead));
    for (int64_t i = 0; i < head_size * static_cast<int64_t>(sizeof(T)); i += 64) prefetch(row + i);
  }
};

// Scratch of one task; one description serves the size and the pointers.
struct PackScratch {
  int64_t columns;  // head_size rounded up to four vectors, and to kLanes dwords of bytes
  float* inverse;   // [columns] 127 / amax, 0 where nothing is to be kept
  float* tile;      // [kLanes][columns / 4]: the bytes of K at kLanes positions
  int64_t floats;

  PackScratch(float* memory, int64_t head_size) {
    columns = round_up(head_size, 4 * kLanes);
    inverse = memory;
    tile = inverse + round_up(columns, 16);
    floats = tile + round_up(kLanes * columns / 4, 16) - memory;
  }
};

// The scales of all channels, and their inverses.
template <class T>
inline void channel_scales(const Columns<T>& x, const PackScratch& s, float* scales) {
  for (int64_t d = 0; d < s.columns; d += 4 * kLanes) {
    I most[4] = {set_int(0), set_int(0), set_int(0), set_int(0)};
    for (int64_t p = 0; p < x.positions; ++p) {
      if (d == 0) x.ahead(p);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j)  // as bits: infinities and NaNs are the largest of magnitudes, so they always win
        most[j] = max_int(most[j], bits_of(abs(x.load_from(p, d + j * kLanes))));
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) store(s.inverse + d + j * kLanes, from_bits(most[j]));
  }
  const float largest = 3.4028235e38f;
  for (int64_t d = 0; d < s.columns; ++d) {
    const float amax = s.inverse[d], inverse = 127.0f / amax;
    const bool finite = amax <= largest, usable = finite && inverse <= largest;
    s.inverse[d] = usable ? inverse : 0.0f;
    if (d < x.head_size) scales[d] = usable ? amax / 127.0f : finite ? 0.0f : __builtin_nanf("");
  }
}

// kLanes channels from d on at position p, as integers. Where the inverse is 0, x may be anything.
template <class T>
inline I quantized(const Columns<T>& x, const PackScratch& s, int64_t p, int64_t d) {
  const F inverse = load(s.inverse + d);
  const F v = min(max(x.load_from(p, d) * inverse, set(-127.0f)), set(127.0f));
  return to_int(select(inverse > zero(), v, zero()));
}

template <class T>
inline void pack_keys(const Columns<T>& x, const PackScratch& s, int8_t* packed) {
  const int64_t steps = kv_key_steps(x.head_size), tile_stride = s.columns / 4;
  const int64_t row = kKvBlockPositions;  // dwords of a step
  for (int64_t p = 0; p < round_up(x.positions, kKvBlockPositions); p += kLanes) {
    for (int i = 0; i < kLanes; ++i)
      for (int64_t d = 0; d < s.columns; d += kLanes)
        store_bytes(reinterpret_cast<uint8_t*>(s.tile + i * tile_stride) + d, quantized(x, s, p + i, d));
    float* to = reinterpret_cast<float*>(packed) + p / kKvBlockPositions * steps * row + p % kKvBlockPositions;
    for (int64_t step = 0; step < steps; step += kLanes) {
      if (step + kLanes <= steps) {
        transpose_block(s.tile + step, tile_stride, to + step * row, row);
      } else {
        float turned[kLanes * kLanes];
        transpose_block(s.tile + step, tile_stride, turned, kLanes);
        for (int64_t i = step; i < steps; ++i) memcpy(to + i * row, turned + (i - step) * kLanes, 4 * kLanes);
      }
    }
  }
}

template <class T>
inline void pack_values(const Columns<T>& x, const PackScratch& s, int8_t* packed) {
  const int64_t channels = kv_value_channels(x.head_size);
  for (int64_t p = 0; p < x.positions; p += kKvStep, packed += channels * kKvStep)
    for (int64_t d = 0; d < channels; d += kLanes) {
      I dwords = quantized(x, s, p, d) & 255;
      dwords |= (quantized(x, s, p + 1, d) & 255) << 8;
      dwords |= (quantized(x, s, p + 2, d) & 255) << 16;
      dwords |= quantized(x, s, p + 3, d) << 24;
      store(reinterpret_cast<float*>(packed) + d, from_bits(dwords));
    }
}

inline void configure(const DeviceInfo& device, KvPackPlan* plan) {
  const KvPackProblem& p = plan->problem;
  const int64_t units = 2 * p.cache_rows * p.heads;
  int64_t tasks = units * p.positions * p.head_size * static_cast<int64_t>(size_of(p.dtype)) / kPackTaskBytes + 1;
  if (tasks > units) tasks = units;
  if (tasks > device.threads) tasks = device.threads;
  plan->tasks = static_cast<int>(tasks < 1 ? 1 : tasks);
  plan->workspace = plan->tasks * PackScratch(nullptr, p.head_size).floats * static_cast<int64_t>(sizeof(float));
}

inline void run_pack(const KvPackPlan& plan, const KvPackArgs& args, const Executor& executor) {
  const KvPackProblem& p = plan.problem;
  const int64_t vectors = p.cache_rows * p.heads, units = 2 * vectors;
  const int64_t key_bytes = kv_key_bytes(p.positions, p.head_size);
  const int64_t value_bytes = kv_value_bytes(p.positions, p.head_size);
  for_each_task(executor, plan.tasks, [&](int64_t task) {
    float* memory = static_cast<float*>(args.workspace);
    const PackScratch s(memory + task * PackScratch(memory, p.head_size).floats, p.head_size);
    for (int64_t unit = units * task / plan.tasks; unit < units * (task + 1) / plan.tasks; ++unit) {
      const bool keys = unit < vectors;
      const int64_t at = keys ? unit : unit - vectors, row = at / p.heads, head = at % p.heads;
      const int64_t offset = row * (keys ? args.k_row_stride : args.v_row_stride) + head * p.head_size;
      float* scales = (keys ? args.k_scales : args.v_scales) + at * p.head_size;
      with_type(p.dtype, keys ? args.k : args.v, [&](auto* from) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(from)>>;
        const Columns<T> x{from + offset, keys ? args.k_stride : args.v_stride, p.positions, p.head_size};
        channel_scales(x, s, scales);
        keys ? pack_keys(x, s, args.packed_k + at * key_bytes) : pack_values(x, s, args.packed_v + at * value_bytes);
      });
    }
  });
}

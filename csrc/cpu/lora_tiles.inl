// The LoRA branch in tiles: t = s x At, then t B beside the sums of the base, both as products of bf16.
// bf16 adapters are multiplied as they are, x and t rounded to bf16 (LoraPlanes 1). Others, and x and t beside them,
// are cut into three bf16 whose sum they are: 8 bits of the significand each. Of the nine products of parts the six
// largest are summed, smallest first; the rest is below what fp32 rounds off. In tiles six products take 3/8 of the
// time of one fp32 multiply-add of vectors, at least.
//
// Operands of tiles, all of 1 KB: x as [k / 32][16 rows][32], A as [k / 32][ranks / 16][16 pairs of k][16 ranks][2]. t
// and B have the products of parts behind each other in depth, so that ranks of 16 leave no half of a tile empty: t as
// [depth / 32][16 rows][32], B of a block as [depth / 2][64 columns][2].

constexpr int kMostPlanes = 3;
// Which part of the left is multiplied with which of the right.
struct PlaneProduct {
  int left, right;
};
constexpr PlaneProduct kPlaneProducts[6] = {{0, 2}, {2, 0}, {1, 1}, {1, 0}, {0, 1}, {0, 0}};

// How an adapter is multiplied.
struct LoraPlanes {
  int count;  // of parts: 1 or 3

  int products() const { return count == 1 ? 1 : 6; }
  const PlaneProduct* begin() const { return kPlaneProducts + (6 - products()); }
  const PlaneProduct* end() const { return kPlaneProducts + 6; }
  // Of t and B: rank rows are padded to whole vectors, the sum of the products to whole tiles.
  int64_t depth(int64_t rank) const { return round_up(products() * round_up(rank, kTileSide), kTileDepthBf16); }
};

constexpr uint8_t kCounting[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                   16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};

// The parts of v as the upper halves of lanes: 8 bits of its significand each, exactly v together.
template <int kPlanes>
inline void cut_planes(F v, I parts[kPlanes]) {
  const I upper = set_int(static_cast<int32_t>(0xffff0000u));
#pragma GCC unroll 4
  for (int i = 0; i < kPlanes; ++i) {
    parts[i] = bits_of(v) & upper;
    v = v - from_bits(parts[i]);
  }
}
inline void store_upper_halves(bf16* to, I v) {
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)v, 16)));
}
// v, or its parts, to the same place of each of `planes.count` operands.
inline void store_planes(const LoraPlanes& planes, F v, bf16* to, int64_t plane_stride) {
  if (planes.count == 1) return store_for_dot(to, v);
  I parts[kMostPlanes];
  cut_planes<kMostPlanes>(v, parts);
  for (int i = 0; i < kMostPlanes; ++i) store_upper_halves(to + i * plane_stride, parts[i]);
}

// The three parts of a and of b behind it, 32 bf16 each: half of the operations of two times one vector.
inline void cut_two(F a, F b, bf16* to, int64_t plane_stride) {
  const I upper = set_int(static_cast<int32_t>(0xffff0000u));
  const __m512i odd = _mm512_add_epi16(
      _mm512_set1_epi16(1), _mm512_slli_epi16(_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)kCounting)), 1));
#pragma GCC unroll 4
  for (int i = 0; i < kMostPlanes; ++i, to += plane_stride) {
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16((__m512i)a, odd, (__m512i)b));
    a = a - from_bits(bits_of(a) & upper);
    b = b - from_bits(bits_of(b) & upper);
  }
}

// A row of x as row `row` of the tiles of its planes, `depth` rounded up to whole tiles with zeros.
template <class T>
inline void store_tile_row(const LoraPlanes& planes, const T* x, int64_t depth, int64_t row, bf16* tiles,
                           int64_t plane_stride) {
  tiles += row * kTileDepthBf16;
  int64_t k = 0;
  if (planes.count > 1)
    for (; k + kTileDepthBf16 <= depth; k += kTileDepthBf16, tiles += kTileBytes / 2)
      cut_two(load(x + k), load(x + k + kLanes), tiles, plane_stride);
  for (; k < round_up(depth, kTileDepthBf16); k += kTileDepthBf16, tiles += kTileBytes / 2)
    for (int64_t j = 0; j < kTileDepthBf16; j += kLanes)
      store_planes(planes, load_at(x, k + j, depth), tiles + j, plane_stride);
}

inline int64_t down_tiles(int64_t rank, int64_t depth) {
  return round_up(rank, kTileSide) / kTileSide * (round_up(depth, kTileDepthBf16) / kTileDepthBf16);
}

// The down factor of an adapter as tiles: [k / 32][ranks / 16], 512 bf16 each, plane by plane.
inline void pack_down_tiles(const LoraPlanes& planes, const Bank& bank, const AdapterRanks& adapter, int64_t depth,
                            bf16* tiles) {
  const int64_t plane_stride = down_tiles(adapter.rank, depth) * 512;
  with_type(bank.shape.dtype, bank.down.data, [&](auto* a) {
    a += adapter.begin * bank.down.rank_stride;
    for (int64_t k = 0; k < depth; k += kTileDepthBf16)
      for (int64_t r = 0; r < adapter.rank; r += kTileSide, tiles += 512) {
        alignas(64) bf16 rows[kMostPlanes][kTileSide * kTileDepthBf16];
        for (int64_t i = 0; i < kTileSide; ++i)
          for (int64_t j = 0; j < kTileDepthBf16; j += kLanes)
            store_planes(planes,
                         r + i < adapter.rank ? load_at(a + (r + i) * bank.down.rank_stride, k + j, depth) : zero(),
                         rows[0] + i * kTileDepthBf16 + j, kTileSide * kTileDepthBf16);
        for (int p = 0; p < planes.count; ++p)
          transpose_block(reinterpret_cast<const float*>(rows[p]), kTileSide,
                          reinterpret_cast<float*>(tiles + p * plane_stride), kTileSide);
      }
  });
}

// Where t goes besides, as fp32: `rows` of 16 rows, a whole vector for every 16 ranks.
struct KeptRows {
  float* t = nullptr;
  int64_t stride = 0, rows = 0;
};

// t of 16 rows, times the adapter's scale, into their tiles of t. `x` are their tiles, plane by plane. Four sums side
// by side: one alone would wait for each product before the next.
inline void down_tile_rows(const LoraPlanes& planes, const AdapterRanks& adapter, const bf16* x, int64_t x_stride,
                           const bf16* down, int64_t depth, bf16* t, const KeptRows& kept = {}) {
  const int64_t steps = round_up(depth, kTileDepthBf16) / kTileDepthBf16;
  const int64_t rank_tiles = round_up(adapter.rank, kTileSide) / kTileSide, plane_stride = steps * rank_tiles * 512;
  alignas(64) float sums[4][kTileSide * kTileSide];
  for (int64_t r = 0; r < rank_tiles; ++r) {
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    for (const PlaneProduct& product : planes) {
      const bf16* a = x + product.left * x_stride;
      const bf16* b = down + product.right * plane_stride + r * 512;
      int64_t step = 0;
      const auto load = [&](auto left, auto right) {
        tile_load<decltype(left)::value>(a + step * 512, kTileRowBytes);
        tile_load<decltype(right)::value>(b + step * rank_tiles * 512, kTileRowBytes);
        ++step;
      };
      constexpr std::integral_constant<int, 4> four{};
      constexpr std::integral_constant<int, 5> five{};
      constexpr std::integral_constant<int, 6> six{};
      constexpr std::integral_constant<int, 7> seven{};
      while (step + 4 <= steps) {
        load(four, six), tile_dot_bf16<0, 4, 6>();
        load(five, seven), tile_dot_bf16<1, 5, 7>();
        load(four, six), tile_dot_bf16<2, 4, 6>();
        load(five, seven), tile_dot_bf16<3, 5, 7>();
      }
      if (step < steps) load(four, six), tile_dot_bf16<0, 4, 6>();
      if (step < steps) load(five, seven), tile_dot_bf16<1, 5, 7>();
      if (step < steps) load(four, six), tile_dot_bf16<2, 4, 6>();
    }
    tile_store<0>(sums[0], kTileRowBytes), tile_store<1>(sums[1], kTileRowBytes);
    tile_store<2>(sums[2], kTileRowBytes), tile_store<3>(sums[3], kTileRowBytes);
    const int64_t ranks = rank_tiles * kTileSide;
    for (int64_t i = 0; i < kTileSide; ++i) {
      const int64_t at = i * kTileSide;
      const F v =
          ((load(sums[0] + at) + load(sums[1] + at)) + (load(sums[2] + at) + load(sums[3] + at))) * set(adapter.scale);
      if (i < kept.rows) store(kept.t + i * kept.stride + r * kTileSide, v);
      alignas(64) bf16 parts[kMostPlanes][kTileSide];
      store_planes(planes, v, parts[0], kTileSide);
      int64_t d = r * kTileSide;
      for (const PlaneProduct& product : planes) {
        memcpy(t + d / 32 * 512 + i * 32 + d % 32, parts[product.left], sizeof parts[0]);
        d += ranks;
      }
      // The empty half of the last tile: what meets zeros in B must be finite.
      if (r == 0 && planes.products() * ranks % kTileDepthBf16) {
        const int64_t end = planes.products() * ranks;
        memset(t + end / 32 * 512 + i * 32 + end % 32, 0, sizeof parts[0]);
      }
    }
  }
}

// The up factor of an adapter for the block of 64 columns from n on, of which `columns` exist, as [depth / 2][64][2].
inline void pack_up_tiles(const LoraPlanes& planes, const Bank& bank, const AdapterRanks& adapter, int64_t n,
                          int64_t columns, bf16* out) {
  const Factor& up = bank.up;
  const int64_t ranks = round_up(adapter.rank, kTileSide), depth = planes.depth(adapter.rank);
  auto* pairs = reinterpret_cast<float*>(out);
  memset(out, 0, static_cast<size_t>(depth * kLoraBlockColumns) * sizeof(bf16));
  with_type(bank.shape.dtype, up.data, [&](auto* b) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(b)>>;
    b += up.at(adapter.begin, n);
    const auto read = [&](int64_t r, int64_t j) {
      const int64_t left = columns - j;
      if (r >= adapter.rank || left <= 0) return zero();
      const T* row = b + r * up.rank_stride;
      const int count = static_cast<int>(left < kLanes ? left : kLanes);
      if (up.k_stride == 1) return left >= kLanes ? load(row + j) : load_n(row + j, count);
      T lanes[kLanes];
      for (int i = 0; i < count; ++i) lanes[i] = row[(j + i) * up.k_stride];
      return load_n(lanes, count);
    };
    for (int64_t r = 0; r < adapter.rank; r += 2)
      for (int64_t j = 0; j < kLoraBlockColumns; j += kLanes) {
        I even[kMostPlanes], odd[kMostPlanes];
        cut_planes<kMostPlanes>(read(r, j), even);
        cut_planes<kMostPlanes>(read(r + 1, j), odd);
        int64_t d = r;
        for (const PlaneProduct& product : planes) {
          store(pairs + d / 2 * kLoraBlockColumns + j,
                from_bits(((even[product.right] >> 16) & 0xffff) | odd[product.right]));
          d += ranks;
        }
      }
  });
}

// t B of 32 rows and 32 columns, fp32 [32][32]; of one group of 16 rows where kGroups is 1.
template <int kGroups>
inline void up_tiles(const bf16* t, int64_t group_stride, const bf16* up, int64_t depth, float* out) {
  tile_zero<0>(), tile_zero<1>();
  if constexpr (kGroups == 2) tile_zero<2>(), tile_zero<3>();
  for (int64_t d = 0; d < depth; d += kTileDepthBf16) {
    const bf16* b = up + d * kLoraBlockColumns;
    tile_load<4>(t + d * kTileSide, kTileRowBytes);
    tile_load<6>(b, kLoraBlockColumns * 4);
    tile_load<7>(b + 2 * kTileSide, kLoraBlockColumns * 4);
    tile_dot_bf16<0, 4, 6>();
    tile_dot_bf16<1, 4, 7>();
    if constexpr (kGroups == 2) {
      tile_load<5>(t + group_stride + d * kTileSide, kTileRowBytes);
      tile_dot_bf16<2, 5, 6>();
      tile_dot_bf16<3, 5, 7>();
    }
  }
  tile_store<0>(out, 128);
  tile_store<1>(out + kTileSide, 128);
  if constexpr (kGroups == 2) {
    tile_store<2>(out + kTileSide * 32, 128);
    tile_store<3>(out + kTileSide * 32 + kTileSide, 128);
  }
}

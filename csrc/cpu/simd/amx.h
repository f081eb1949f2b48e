// Tiles: 8 registers of 16 rows of 64 bytes each, beside the vectors of simd/avx512.h. A product of two of them adds 16
// x 16 sums of 64 INT8 or 32 bf16 products each to a third: A has a row per row of x, B four (two) k of 16 columns in
// each of its rows, which is the layout of packed weights.
//
// As instructions: the compiler's intrinsics take numbers of registers as macros, and the sets of a target region that
// older compilers do not know.

constexpr int64_t kTileSide = 16;       // rows of a tile, and its columns of 32 bits
constexpr int64_t kTileRowBytes = 64;   // 64 k of INT8, 32 k of bf16
constexpr int64_t kTileDepth = 64;      // k of an INT8 product
constexpr int64_t kTileDepthBf16 = 32;  // k of a bf16 product
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kMacroRows = 32, kMacroColumns = 32;  // of 2 x 2 sums, which leave room for 2 + 2 operands

// The tile registers of this thread, for as long as this lives. They are given back clean: other users of the thread
// bring their own shapes, and a core that has none in use need not save them.
class TileRegisters {
 public:
  TileRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    for (int i = 0; i < 8; ++i) shapes.row_bytes[i] = kTileRowBytes, shapes.rows[i] = kTileSide;
    asm volatile("ldtilecfg %0" ::"m"(shapes));
  }
  ~TileRegisters() { asm volatile("tilerelease"); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// Asks for a line that is written soon. Every CPU with tiles has the instruction.
inline void prefetch_to_write(const void* p) { asm volatile("prefetchw (%0)" ::"r"(p)); }

template <int kTile>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
// Rows `stride` bytes apart.
template <int kTile>
inline void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}
// Sums of unsigned A times signed B, int32; of both signed; and of bf16 A times bf16 B, fp32.
template <int kSum, int kA, int kB>
inline void tile_dot_int8() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
}
template <int kSum, int kA, int kB>
inline void tile_dot_signed() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
}
template <int kSum, int kA, int kB>
inline void tile_dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
}

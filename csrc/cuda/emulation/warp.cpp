// What a warp computes together, by the fragment layouts of the PTX ISA (sections on mma.m16n8k8, m16n8k16, m16n8k32
// and ldmatrix). Kernels and this file rest on the same reading of it: a first run on a GPU has to compare both sides
// on random registers (tests/gpu). Sums are in another order than the device's, so floating-point results agree within
// rounding and not to the bit.
#include <cstring>
#include <vector>

#include "cuda/emulation/emulation.h"

namespace lora_kernels::emulation {
namespace {

float float_of(uint32_t bits) {
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

uint32_t bits_of(float f) {
  uint32_t bits;
  memcpy(&bits, &f, sizeof bits);
  return bits;
}

void expect_all(uint32_t lanes, const char* what) {
  if (lanes != ~0u) refuse(std::string(what) + " needs all 32 lanes of a warp");
}

// The eight rows of a matrix are read at once if they lie in eight different groups of four banks.
void count_bank_conflicts(const Slot* slots) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    int rows_in[8] = {}, most = 0;
    for (int row = 0; row < 8; ++row) {
      MatrixRow r;
      memcpy(&r, slots[matrix * 8 + row].in, sizeof r);
      const int in_group = ++rows_in[r.address / 16 % 8];
      if (in_group > most) most = in_group;
    }
    bank_conflicts += static_cast<uint64_t>(most - 1);
  }
}

// D[16][8] += A[16][K] B[K][8] on registers a[K/4 words of 2 or 1 elements], b, c in this order. `a_value(registers,
// e)` is element e of a lane's A, and so on.
template <int K, class Value>
void multiply(Slot* slots, const Value& a_value, const Value& b_value, int a_words, int b_words, int per_word) {
  float a[16][K], b[K][8], c[16][8];
  const int step = per_word == 2 ? 2 : 1;  // consecutive k of one lane
  for (int lane = 0; lane < 32; ++lane) {
    const uint32_t* in = slots[lane].in;
    const int group = lane / 4, column = lane % 4 * step;
    for (int word = 0; word < a_words; ++word)
      for (int e = 0; e < per_word; ++e)
        a[group + word % 2 * 8][column + e + word / 2 * 4 * step] = a_value(in[word], e);
    for (int word = 0; word < b_words; ++word)
      for (int e = 0; e < per_word; ++e) b[column + e + word * 4 * step][group] = b_value(in[a_words + word], e);
    for (int e = 0; e < 4; ++e) c[group + e / 2 * 8][lane % 4 * 2 + e % 2] = float_of(in[a_words + b_words + e]);
  }
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < K; ++k)
      for (int n = 0; n < 8; ++n) c[m][n] += a[m][k] * b[k][n];
  for (int lane = 0; lane < 32; ++lane)
    for (int e = 0; e < 4; ++e) slots[lane].out[e] = bits_of(c[lane / 4 + e / 2 * 8][lane % 4 * 2 + e % 2]);
}

using Value = float (*)(uint32_t, int);
float half_value(uint32_t word, int e) { return half_values()[word >> 16 * e & 0xFFFF]; }
float bf16_value(uint32_t word, int e) { return float_of((word >> 16 * e & 0xFFFF) << 16); }
float tf32_value(uint32_t word, int) { return float_of(word & 0xFFFFE000u); }  // the low 13 bits are not looked at

}  // namespace

const float* half_values() {
  static const std::vector<float> values = [] {
    std::vector<float> v(65536);
    for (unsigned i = 0; i < 65536; ++i) {
      __half_raw raw;
      raw.x = static_cast<unsigned short>(i);
      v[i] = __half2float(__half(raw));
    }
    return v;
  }();
  return values.data();
}

void same_operands(Slot* slots, uint32_t lanes) {
  expect_all(lanes, "wgmma");
  for (int lane = 1; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)  // not memcmp, which ThreadSanitizer would watch in the engine too
      if (slots[lane].in[i] != slots[0].in[i]) refuse("wgmma: the lanes of a warp name different operands");
}

void shuffle(Slot* slots, uint32_t lanes) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    Shuffle me, from;
    memcpy(&me, slots[lane].in, sizeof me);
    if (!(lanes >> me.from & 1)) refuse("a shuffle reads a lane outside its mask");
    memcpy(&from, slots[me.from].in, sizeof from);
    memcpy(slots[lane].out, &from.value, sizeof from.value);
  }
}

void ballot(Slot* slots, uint32_t lanes) {
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; ++lane)
    if ((lanes >> lane & 1) && slots[lane].in[0]) votes |= 1u << lane;
  for (int lane = 0; lane < 32; ++lane)
    if (lanes >> lane & 1) slots[lane].out[0] = votes;
}

void ldmatrix(Slot* slots, uint32_t lanes) {
  expect_all(lanes, "ldmatrix");
  count_bank_conflicts(slots);
  for (int lane = 0; lane < 32; ++lane)
    for (int matrix = 0; matrix < 4; ++matrix) slots[lane].out[matrix] = slots[matrix * 8 + lane / 4].in[lane % 4];
}

void ldmatrix_trans(Slot* slots, uint32_t lanes) {
  expect_all(lanes, "ldmatrix.trans");
  count_bank_conflicts(slots);
  const auto element = [&](int matrix, int row, int column) {
    return slots[matrix * 8 + row].in[column / 2] >> column % 2 * 16 & 0xFFFF;
  };
  for (int lane = 0; lane < 32; ++lane)
    for (int matrix = 0; matrix < 4; ++matrix)
      slots[lane].out[matrix] = element(matrix, lane % 4 * 2, lane / 4) | element(matrix, lane % 4 * 2 + 1, lane / 4)
                                                                              << 16;
}

void mma_m16n8k16_f16(Slot* slots, uint32_t lanes) {
  expect_all(lanes, "mma");
  multiply<16, Value>(slots, half_value, half_value, 4, 2, 2);
}
void mma_m16n8k16_bf16(Slot* slots, uint32_t lanes) {
  expect_all(lanes, "mma");
  multiply<16, Value>(slots, bf16_value, bf16_value, 4, 2, 2);
}
void mma_m16n8k8_f16(Slot* slots, uint32_t lanes) {
  expect_all(lanes, "mma");
  multiply<8, Value>(slots, half_value, half_value, 2, 1, 2);
}
void mma_m16n8k8_tf32(Slot* slots, uint32_t lanes) {
  expect_all(lanes, "mma");
  multiply<8, Value>(slots, tf32_value, tf32_value, 4, 2, 1);
}

void mma_m8n8k16_s8(Slot* slots, uint32_t lanes) {
  expect_all(lanes, "mma");
  int8_t a[8][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane)
    for (int e = 0; e < 4; ++e) {
      a[lane / 4][lane % 4 * 4 + e] = static_cast<int8_t>(slots[lane].in[0] >> e * 8);
      b[lane % 4 * 4 + e][lane / 4] = static_cast<int8_t>(slots[lane].in[1] >> e * 8);
    }
  for (int lane = 0; lane < 32; ++lane)
    for (int e = 0; e < 2; ++e) {
      int32_t sum = static_cast<int32_t>(slots[lane].in[2 + e]);
      for (int k = 0; k < 16; ++k) sum += a[lane / 4][k] * b[k][lane % 4 * 2 + e];
      slots[lane].out[e] = static_cast<uint32_t>(sum);
    }
}

void mma_m16n8k32_s8(Slot* slots, uint32_t lanes) {
  expect_all(lanes, "mma");
  int8_t a[16][32], b[32][8];
  int32_t c[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const uint32_t* in = slots[lane].in;
    const int group = lane / 4, column = lane % 4 * 4;
    for (int e = 0; e < 16; ++e)
      a[group + e / 4 % 2 * 8][column + e % 4 + e / 8 * 16] = static_cast<int8_t>(in[e / 4] >> e % 4 * 8);
    for (int e = 0; e < 8; ++e) b[column + e % 4 + e / 4 * 16][group] = static_cast<int8_t>(in[4 + e / 4] >> e % 4 * 8);
    for (int e = 0; e < 4; ++e) c[group + e / 2 * 8][lane % 4 * 2 + e % 2] = static_cast<int32_t>(in[6 + e]);
  }
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 32; ++k)
      for (int n = 0; n < 8; ++n) c[m][n] += a[m][k] * b[k][n];
  for (int lane = 0; lane < 32; ++lane)
    for (int e = 0; e < 4; ++e)
      slots[lane].out[e] = static_cast<uint32_t>(c[lane / 4 + e / 2 * 8][lane % 4 * 2 + e % 2]);
}

}  // namespace lora_kernels::emulation

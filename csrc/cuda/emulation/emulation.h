// Runs CUDA kernels on the CPU: one fiber per thread, the blocks of a grid one after the other, those of a cluster
// together. Fibers switch only where CUDA threads may wait for each other (barriers, collectives of a warp), in an
// order that Options choose. What CUDA leaves undefined is refused: an Error names the kernel's line and what the
// block's threads were doing.
//
// This header is the engine's interface; names.h has CUDA's own names over it, and primitives/*.h what kernels use.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/emulation/types.h"

namespace lora_kernels::emulation {

// The order in which threads that could run do run, and blocks: by index, from the last, or drawn anew at every step.
// It also says when asynchronous copies land: at their wait, at once, or drawn.
enum class Order { kForward, kReverse, kShuffled };

struct Options {
  Order order = Order::kForward;
  uint64_t seed = 1;  // of kShuffled
};
extern Options options;

// Passes over shared memory that ldmatrix took beyond the first for each matrix, because rows share banks; counted
// until the caller sets it back.
extern uint64_t bank_conflicts;

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Leaves the block; launch() throws Error with this text, the block, and what its threads were doing.
[[noreturn]] void refuse(const std::string& why);

// What a lane brings to a collective, and what it takes from it.
struct Slot {
  alignas(16) uint32_t in[16];
  uint32_t out[20];
};

// The running thread.
struct Self {
  uint3 thread, block;
  dim3 block_size, grid_size;
};
const Self& self();

// `lanes` of the warp are present; their slots hold what they brought.
using Compute = void (*)(Slot* slots, uint32_t lanes);

struct Call {
  const char* what;
  const char* file;
  int line;
};

// Waits until every lane of `mask` has come to the same call; the last to arrive computes for all of them.
Slot& collective(uint32_t mask, const Call& call, const void* in, size_t in_bytes, Compute compute, bool orders_memory);
void barrier(const Call& call);

// The part of the block's shared memory behind `used` bytes, and `gaps` bytes between what was opened before. Under
// AddressSanitizer what was not opened is out of bounds, and `gap` bytes stay so behind it. Everything begins as 0xFF:
// NaN in every type.
void* open_shared(size_t used, size_t gaps, size_t bytes, size_t* gap);

// Refuses if these 4 bytes of shared memory still are what they began as.
void expect_written(const void* word, const char* what);

using Copy = void (*)(void* to, const void* from, int bytes, int valid);
void start_copy(void* to, const void* from, int bytes, int valid, Copy copy);
void commit_copies();
void wait_copies(int newest);  // all but the newest groups have landed

// The asynchronous proxy, through which wgmma reads shared memory. A chunk of 16 bytes that a thread wrote is invisible
// to it until that thread has called fence_proxy().
void wrote(const void* chunk);
void fence_proxy();
void expect_visible(const void* chunk);
uint32_t shared_offset(const void* p);  // within the block's shared memory, as descriptors have it
const void* shared_at(uint32_t offset);

// A thread's part of a warpgroup's product. It is made at its wait, at once, or by chance, as copies land.
using Multiply = void (*)(void* registers, uint64_t a, uint64_t b);
void fence_products();
void start_product(void* registers, uint64_t a, uint64_t b, Multiply multiply);
// The same with four registers `a` of each thread as the left operand, which are read when the product is made: in all
// lanes of a warp at once, and by each its own. `multiply` gets those of the four lanes of a row, in their order.
using MultiplyRegisters = void (*)(void* registers, const uint32_t (&a)[16], uint64_t b);
void start_product(void* registers, const uint32_t (&a)[4], uint64_t b, MultiplyRegisters multiply, const Call& call);
void commit_products();
void wait_products(int newest);

// A box of planes of rows in global memory, in bytes but for planes and rows, and barriers that count its bytes and the
// arrivals of threads. A box lands when somebody waits for it, at once, or by chance. Who waits for a phase that
// nothing on its way can end is refused; in a cluster, once no thread of it can go on.
struct Box {
  const char* data;
  int64_t planes, rows, row_bytes, plane_stride, stride;
  int box_planes, box_rows, plane, row, column;
};
extern uint64_t boxes;  // that were loaded; counted until the caller sets it back
void init_arrivals(const void* barrier, int count);
void expect_bytes(const void* barrier, int bytes);
void load_box(void* to, const Box& box, const void* barrier);
void wait_for_phase(const void* barrier, int parity);
// To the same places of all blocks of the cluster, so many, each of which its own barrier tells.
void share_box(void* to, const Box& box, const void* barrier, int blocks);
// To the same place of one of them. The bytes land as boxes do.
void send16(void* to, const uint32_t (&words)[4], const void* barrier, int block);
void arrive(const void* barrier, int block);  // at the barrier in the same place of a block of the cluster
void arrive_in_cluster();
void wait_for_cluster();  // until every thread of every block has arrived

struct Launched {
  const char* kernel;
  dim3 grid, block;
  size_t shared_bytes;
  bool early;        // may start before the kernel before has finished
  unsigned cluster;  // neighbouring blocks that run together
  void (*body)(const void*);
  const void* arg;
  size_t arg_bytes;
};
// Runs the grid; while there are holds, only once the next launch is there, or the last hold has finished: a block of a
// kernel that may start early then runs before the kernel before it, as far as to wait_for_kernel_before(), and refuses
// to end there. What it reads too soon has not been written yet. Errors are thrown by whatever runs a grid.
void launch(const Launched& launched);
void hold();
void finish();
void wait_for_kernel_before(const Call& call);

template <class Out, class In>
Out meet(uint32_t mask, const Call& call, const In& in, Compute compute) {
  static_assert(sizeof(In) <= sizeof(Slot::in) && sizeof(Out) <= sizeof(Slot::out), "a slot holds no more");
  Out out;
  __builtin_memcpy(&out, collective(mask, call, &in, sizeof in, compute, false).out, sizeof out);
  return out;
}

// What warps compute (warp.cpp), by the fragment layouts of the PTX ISA.
struct Shuffle {
  uint64_t value;
  int32_t from;  // every lane names the lane it reads
};
void shuffle(Slot* slots, uint32_t lanes);
void ballot(Slot* slots, uint32_t lanes);
// Slots hold a row of 16 bytes and the address that it came from.
struct MatrixRow {
  uint32_t words[4];
  uint64_t address;
};
void ldmatrix(Slot* slots, uint32_t lanes);
void ldmatrix_trans(Slot* slots, uint32_t lanes);
void mma_m16n8k16_f16(Slot* slots, uint32_t lanes);
void mma_m16n8k16_bf16(Slot* slots, uint32_t lanes);
void mma_m16n8k8_f16(Slot* slots, uint32_t lanes);
void mma_m16n8k8_tf32(Slot* slots, uint32_t lanes);
void mma_m8n8k16_s8(Slot* slots, uint32_t lanes);
void mma_m16n8k32_s8(Slot* slots, uint32_t lanes);
void same_operands(Slot* slots, uint32_t lanes);  // of wgmma

const float* half_values();  // fp16 by its bits

}  // namespace lora_kernels::emulation

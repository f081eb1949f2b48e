// Asynchronous copies, products and boxes, and the proxy that reads shared memory for them.
#include "cuda/emulation/asynchronous.h"

#include <cstring>

#if defined(LORA_KERNELS_EMULATION_TSAN)
extern "C" void __tsan_ignore_thread_begin();
extern "C" void __tsan_ignore_thread_end();
extern "C" void __tsan_acquire(void*);
extern "C" void __tsan_release(void*);
#endif

namespace lora_kernels::emulation {

uint64_t boxes = 0;

namespace {

// What threads share here is the engine's own, and boxes are written by no thread: ThreadSanitizer, which sees what is
// allocated and copied even where it watches nothing else, is to look away.
struct Unwatched {
#if defined(LORA_KERNELS_EMULATION_TSAN)
  Unwatched() { __tsan_ignore_thread_begin(); }
  ~Unwatched() { __tsan_ignore_thread_end(); }
#else
  Unwatched() {}
#endif
  Unwatched(const Unwatched&) = delete;
};

// What a thread did before it arrived at a barrier has happened for those that have waited for the phase.
void happened([[maybe_unused]] Memory& memory, [[maybe_unused]] uint32_t barrier) {
#if defined(LORA_KERNELS_EMULATION_TSAN)
  __tsan_release(memory.shared + barrier);
#endif
}
void see_what_happened([[maybe_unused]] Memory& memory, [[maybe_unused]] uint32_t barrier) {
#if defined(LORA_KERNELS_EMULATION_TSAN)
  __tsan_acquire(memory.shared + barrier);
#endif
}

// Whether what is started now happens now: no kernel may rely on either.
bool at_once() { return options.order == Order::kReverse || (options.order == Order::kShuffled && draw(2)); }

void land(const PendingCopy& c) {
  c.copy(c.to, c.from, c.bytes, c.valid);
  wrote(c.to);
}

constexpr int kBoxWidth = 128;  // bytes

std::string writer_of(const Memory& memory, uint32_t chunk) {
  const uint16_t writer = memory.writers[chunk];
  if (writer == kAnotherBlock) return "another block sent and no thread has fenced for its proxy";
  return "thread " + std::to_string(writer - 1) + " wrote and has not fenced for its proxy";
}

// Puts them where they belong and returns how many bytes they are.
int put(const Box& box, uint32_t to, Memory& memory) {
  for (int r = 0; r < box.box_planes * box.box_rows; ++r)
    for (int chunk = 0; chunk < kBoxWidth / 16; ++chunk) {
      uint32_t at = to + static_cast<uint32_t>(r * kBoxWidth + chunk * 16);
      at ^= (at >> 7 & 7) << 4;
      const int64_t plane = box.plane + r / box.box_rows, row = box.row + r % box.box_rows;
      const int64_t column = box.column + chunk * 16;
      int64_t inside = plane < box.planes && row < box.rows ? box.row_bytes - column : 0;
      inside = inside < 0 ? 0 : inside > 16 ? 16 : inside;
      memset(memory.shared + at, 0, 16);
      if (inside)
        memcpy(memory.shared + at, box.data + plane * box.plane_stride + row * box.stride + column,
               static_cast<size_t>(inside));
      if (memory.writers[at / 16]) refuse("a box over what " + writer_of(memory, at / 16));
    }
  return box.box_planes * box.box_rows * kBoxWidth;
}

// As a store of the generic proxy, which a thread that has waited may fence in the sender's place.
int put(const Sent& sent, uint32_t to, Memory& memory) {
  memcpy(memory.shared + to, sent.words, sizeof sent.words);
  memory.writers[to / 16] = kAnotherBlock;
  memory.sent.push_back(to / 16);
  return sizeof sent.words;
}

void land(const PendingBytes& p, Memory& memory) {
  const int bytes = std::visit([&](const auto& what) { return put(what, p.to, memory); }, p.what);
  Arrivals& a = memory.arrivals[p.barrier];
  a.bytes -= bytes;
  a.look();
}

// What a lane brings to a product whose left operand is in registers, and what it takes: those of its row's lanes.
struct OwnRegisters {
  uint32_t words[4];
  uint64_t b;
  uint32_t idle;  // has no product under way
};
struct RowRegisters {
  uint32_t words[16];
  uint32_t now;  // the product is made at once
};

void exchange(Slot* slots, uint32_t now) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 16; ++i) slots[lane].out[i] = slots[lane / 4 * 4 + i / 4].in[i % 4];
    slots[lane].out[16] = now;
  }
}

// All lanes of a warp together decide when the product is made, as all of them bring registers to it.
void start_together(Slot* slots, uint32_t lanes) {
  if (lanes != ~0u) refuse("wgmma needs all 32 lanes of a warp");
  bool idle = true;
  uint64_t first = 0;
  for (int lane = 0; lane < 32; ++lane) {
    OwnRegisters own;
    memcpy(&own, slots[lane].in, sizeof own);
    if (lane == 0) first = own.b;
    if (own.b != first) refuse("wgmma: the lanes of a warp name different operands");
    idle = idle && own.idle;
  }
  exchange(slots, idle && at_once());
}

void read_together(Slot* slots, uint32_t) { exchange(slots, 1); }

void make(const PendingProduct& p) {
  if (!p.words) {
    p.multiply(p.registers, p.a, p.b);
    return;
  }
  OwnRegisters own{};
  memcpy(own.words, p.words, sizeof own.words);
  const auto row = meet<RowRegisters>(~0u, p.call, own, read_together);
  p.multiply_registers(p.registers, row.words, p.b);
}

Arrivals& arrivals_at(Memory& memory, uint32_t place) {
  if (memory.gone) refuse("uses shared memory of a block that has ended");
  const auto found = memory.arrivals.find(place);
  if (found == memory.arrivals.end()) refuse("a barrier of bytes that nobody has made");
  return found->second;
}

void bring(const PendingBytes& p, Memory& memory) {
  arrivals_at(memory, p.barrier);
  if (at_once())
    land(p, memory);
  else
    memory.coming.push_back(p);
}

PendingBytes pending(void* to, const Box& box, const void* barrier) {
  const PendingBytes p{shared_offset(to), box, shared_offset(barrier)};
  if (p.to % 128) refuse("a box to an address that is no multiple of 128");
  ++boxes;
  return p;
}

void arrive(Memory& memory, uint32_t place) {
  Arrivals& a = arrivals_at(memory, place);
  if (a.arrived == a.expected) refuse("one arrival more in a phase of a barrier than it counts");
  happened(memory, place);
  ++a.arrived;
  a.look();
}

}  // namespace

void land_copies() {
  for (const PendingCopy& c : running.started->copies) land(c);
}

void start_copy(void* to, const void* from, int bytes, int valid, Copy copy) {
  const PendingCopy c{to, from, bytes, valid, running.started->group, copy};
  if (at_once())
    land(c);
  else
    running.started->copies.push_back(c);
}

void commit_copies() { ++running.started->group; }

void wait_copies(int newest) {
  std::vector<PendingCopy>& copies = running.started->copies;
  size_t i = 0;
  for (; i < copies.size() && copies[i].group < running.started->group - newest; ++i) land(copies[i]);
  copies.erase(copies.begin(), copies.begin() + static_cast<ptrdiff_t>(i));
}

void wrote(const void* chunk) {
  const char* at = static_cast<const char*>(chunk);
  if (at < running.memory->shared || at >= running.memory->shared + running.memory->capacity) return;
  const auto i = static_cast<uint32_t>((at - running.memory->shared) / 16);
  const auto me = static_cast<uint16_t>(running.thread + 1);
  if (running.memory->writers[i] == me) return;
  running.memory->writers[i] = me;
  running.started->unfenced.push_back(i);
}

void fence_proxy() {
  for (uint32_t i : running.started->unfenced)
    if (running.memory->writers[i] == running.thread + 1) running.memory->writers[i] = 0;
  running.started->unfenced.clear();
  for (uint32_t i : running.memory->sent)
    if (running.memory->writers[i] == kAnotherBlock) running.memory->writers[i] = 0;
  running.memory->sent.clear();
}

void expect_visible(const void* chunk) {
  const auto i = static_cast<uint32_t>((static_cast<const char*>(chunk) - running.memory->shared) / 16);
  if (running.memory->writers[i]) refuse("wgmma reads shared memory that " + writer_of(*running.memory, i));
}

uint32_t shared_offset(const void* p) {
  const char* at = static_cast<const char*>(p);
  if (at < running.memory->shared || at >= running.memory->shared + running.memory->capacity)
    refuse("names a place outside shared memory");
  return static_cast<uint32_t>(at - running.memory->shared);
}

const void* shared_at(uint32_t offset) {
  if (offset + 16 > running.memory->capacity) refuse("wgmma reads beyond shared memory");
  return running.memory->shared + offset;
}

void fence_products() { running.started->registers_fenced = true; }

void start_product(void* registers, uint64_t a, uint64_t b, Multiply multiply) {
  Started& started = *running.started;
  if (!started.registers_fenced) refuse("wgmma without wgmma_fence() before the first of a group");
  // In order: a product is not made while an earlier one is pending.
  if (started.products.empty() && at_once())
    multiply(registers, a, b);
  else
    started.products.push_back({registers, a, b, started.product_group, multiply, nullptr, nullptr, {}});
}

void start_product(void* registers, const uint32_t (&a)[4], uint64_t b, MultiplyRegisters multiply, const Call& call) {
  Started& started = *running.started;
  if (!started.registers_fenced) refuse("wgmma without wgmma_fence() before the first of a group");
  OwnRegisters own{{a[0], a[1], a[2], a[3]}, b, started.products.empty()};
  const auto row = meet<RowRegisters>(~0u, call, own, start_together);
  if (row.now)
    multiply(registers, row.words, b);
  else
    started.products.push_back({registers, 0, b, started.product_group, nullptr, a, multiply, call});
}

void commit_products() {
  ++running.started->product_group;
  running.started->registers_fenced = false;
}

void wait_products(int newest) {
  Started& started = *running.started;
  size_t i = 0;
  for (; i < started.products.size() && started.products[i].group < started.product_group - newest; ++i)
    make(started.products[i]);
  started.products.erase(started.products.begin(), started.products.begin() + static_cast<ptrdiff_t>(i));
}

void init_arrivals(const void* barrier, int count) {
  const Unwatched here;
  running.memory->arrivals[shared_offset(barrier)] = {count, 0, 0, 0};
}

void expect_bytes(const void* barrier, int bytes) {
  const uint32_t place = shared_offset(barrier);
  arrivals_at(*running.memory, place).bytes += bytes;
  arrive(*running.memory, place);
  if (running.cluster->count > 1) wake_cluster();  // all of them may have come before
}

void load_box(void* to, const Box& box, const void* barrier) {
  const Unwatched here;
  bring(pending(to, box, barrier), *running.memory);
  if (running.cluster->count > 1) wake_cluster();
}

void wait_for_phase(const void* barrier, int parity) {
  const Unwatched here;
  const uint32_t place = shared_offset(barrier);
  Memory& memory = *running.memory;
  Arrivals& a = arrivals_at(memory, place);
  while (true) {
    for (size_t i = 0; i < memory.coming.size() && (a.phase & 1) == parity;) {
      if (memory.coming[i].barrier != place) {
        ++i;
        continue;
      }
      const PendingBytes p = memory.coming[i];
      memory.coming.erase(memory.coming.begin() + static_cast<ptrdiff_t>(i));
      land(p, memory);
    }
    if ((a.phase & 1) != parity) {
      see_what_happened(memory, place);
      return;
    }
    if (running.cluster->count == 1) refuse("waits for bytes that nothing on its way brings");
    wait_in_cluster({"wait_for_phase", __FILE__, __LINE__});
  }
}

void share_box(void* to, const Box& box, const void* barrier, int blocks) {
  const Unwatched here;
  if (running.cluster->count != blocks) refuse("a box for " + std::to_string(blocks) + " blocks in another cluster");
  const PendingBytes p = pending(to, box, barrier);
  for (int i = 0; i < running.cluster->count; ++i) bring(p, *running.cluster->blocks[i]);
  wake_cluster();
}

void send16(void* to, const uint32_t (&words)[4], const void* barrier, int block) {
  const Unwatched here;
  if (block < 0 || block >= running.cluster->count) refuse("sends to a block that is not of its cluster");
  Memory& memory = *running.cluster->blocks[block];
  if (memory.gone) refuse("sends to a block that has ended");
  const PendingBytes p{shared_offset(to), Sent{{words[0], words[1], words[2], words[3]}}, shared_offset(barrier)};
  if (p.to % 16) refuse("sends to an address that is no multiple of 16");
  bring(p, memory);
  wake_cluster();
}

void arrive(const void* barrier, int block) {
  if (block < 0 || block >= running.cluster->count) refuse("arrives in a block that is not of its cluster");
  arrive(*running.cluster->blocks[block], shared_offset(barrier));
  wake_cluster();
}

void arrive_in_cluster() {
  Cluster& cluster = *running.cluster;
  if (running.started->cluster_phase >= 0) refuse("arrives in its cluster again before it has waited");
  running.started->cluster_phase = cluster.phase;
  if (++cluster.arrived < cluster.threads) return;
  ++cluster.phase;
  cluster.arrived = 0;
  wake_cluster();
}

void wait_for_cluster() {
  const int phase = running.started->cluster_phase;
  if (phase < 0) refuse("waits for its cluster before it has arrived");
  while (running.cluster->phase == phase) wait_in_cluster({"wait_for_cluster", __FILE__, __LINE__});
  running.started->cluster_phase = -1;
}

void end_block() {
  if (!running.memory->coming.empty())
    refuse("ends while boxes, or bytes of another block, are on their way to its shared memory");
  for (const auto& [place, a] : running.memory->arrivals)
    if (a.bytes < 0) refuse("ends with more bytes in its shared memory than its barriers expected");
  running.memory->gone = true;
}

}  // namespace lora_kernels::emulation

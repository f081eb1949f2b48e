// Races, for ThreadSanitizer: built with LORA_KERNELS_SANITIZE=thread. "kernels" runs every path of the linear
// operators, and attention with what belongs to it, in drawn order and is expected to be silent; "race" runs a kernel
// whose threads write the same value to the same word, which changes no result and which nothing but the sanitizer
// sees.
#include <cstdlib>
#include <cstring>

#include "check.h"
#include "cuda/emulation/emulation.h"
#include "cuda/int8_lora_linear.h"
#include "cuda/kv_attention_step.h"
#include "cuda/kv_pack.h"
#include "cuda/kv_relative_step.h"
#include "cuda/lora_linear.h"
#include "cuda/primitives/launch.h"
#include "cuda/primitives/shared.h"
#include "lora_kernels/kv_packing.h"

namespace lora_kernels {
std::string to_string(const LoraLinearPlan& plan) { return to_string(plan.cuda); }
std::string to_string(const LoraLinearBackwardPlan& plan) { return to_string(plan.cuda); }
std::string to_string(const Int8LoraLinearPlan& plan) { return to_string(plan.cuda); }
std::string to_string(const KvAttentionStepPlan& plan) { return to_string(plan.cuda); }
std::string to_string(const KvPackPlan& plan) { return to_string(plan.cuda); }
std::string to_string(const KvRelativeStepPlan& plan) { return to_string(plan.cuda); }
}  // namespace lora_kernels

using namespace lora_kernels;

namespace {

struct Nothing {};

template <bool kBarrier>
__global__ void meeting_kernel(const Nothing) {
  cuda::Shared shared;
  uint32_t* word = shared.take<uint32_t>(1);
  if (!kBarrier || threadIdx.x == 0) *word = 7;
  if (kBarrier) {
    __syncthreads();
    if (threadIdx.x == 33) *word = 7;
  }
}

int run_race(bool barrier) {
  const cuda::Launch l{"meeting", dim3(1, 1, 1), dim3(64, 1, 1), 64, nullptr};
  const Status status =
      barrier ? cuda::launch<&meeting_kernel<true>>(l, Nothing()) : cuda::launch<&meeting_kernel<false>>(l, Nothing());
  check(status.ok(), status.text);
  return failures;
}

Buffer<uint16_t> halves(int64_t count) {
  Buffer<uint16_t> b = Buffer<uint16_t>::aligned(count);
  for (int64_t i = 0; i < count; ++i)  // fp16 of magnitude 0.03 to 2, either sign
    b[i] = static_cast<uint16_t>((generator()() & 0x8000) | (0x2800 + generator()() % 0x1800));
  return b;
}

// What a call works in, of the size that its plan has after it was changed by hand.
class Memory {
 public:
  template <class Of, class Plan>
  static Memory of(const Plan& plan) {
    cuda::Workspace size;
    Of(size, plan);
    return Memory(size.used);
  }
  explicit Memory(int64_t bytes) : bytes_(Buffer<char>::aligned(bytes + 256)) {}
  void* get() { return reinterpret_cast<void*>(round_up(reinterpret_cast<int64_t>(bytes_.get()), 256)); }

 private:
  Buffer<char> bytes_;
};

constexpr int64_t kRank = 5;

// Two adapters of ranks 2 and 3, and rows that mix them with the base, three of a kind after another.
struct Adapters {
  Buffer<uint16_t> a, b;
  Buffer<int32_t> ids, offsets;

  Adapters(int64_t rows, int64_t k, int64_t n) : a(halves(kRank * k)), b(halves(kRank * n)), ids(rows), offsets(3) {
    for (int64_t m = 0; m < rows; ++m) ids[m] = static_cast<int32_t>(m / 3 % 3) - 1;
    offsets[0] = 0, offsets[1] = 2, offsets[2] = kRank;
  }

  LoraBank bank(int64_t k, int64_t n) {
    LoraBank bank;
    bank.a = a.get();
    bank.a_stride = k;
    bank.b = b.get();
    bank.b_stride_rank = n;
    bank.b_stride_out = 1;
    bank.offsets = offsets.get();
    bank.adapter_ids = ids.get();
    return bank;
  }
};

void run_kernels() {
  DeviceInfo device;
  cuda_device(0, &device);
  const int64_t M = 70, K = 104, N = 72;
  Buffer<uint16_t> x = halves(M * K), w = halves(N * K), y = halves(M * N), dx = halves(M * K);
  Adapters adapters(M, K, N);
  LoraLinearPlan plan;
  LoraLinearProblem& p = plan.problem;
  p.in_features = K;
  p.out_features = N;
  p.dtype = p.lora.dtype = DType::kFloat16;
  p.lora.total_rank = p.lora.max_rank = kRank;
  LoraLinearArgs args;
  args.x = x.get();
  args.x_stride = args.weight_stride = K;
  args.weight = w.get();
  args.y = y.get();
  const struct {
    CudaLoraLinearPath path;
    bool t_in_blocks;
    int wgmma_columns = 0;
  } ways[] = {{CudaLoraLinearPath::kTwoSteps, false},
              {CudaLoraLinearPath::kTwoSteps, false, 128},
              {CudaLoraLinearPath::kInTile, false},
              {CudaLoraLinearPath::kFewRows, false},
              {CudaLoraLinearPath::kFewRows, true}};
  for (const auto& [path, t_in_blocks, wgmma_columns] : ways) {
    p.rows = path == CudaLoraLinearPath::kFewRows ? 9 : M;
    const bool routed = path != CudaLoraLinearPath::kInTile && !t_in_blocks;
    p.lora.adapters = routed ? 2 : 1;
    p.lora.groups = routed ? p.rows : 0;
    args.lora = adapters.bank(K, N);
    if (!routed) args.lora.offsets = args.lora.adapter_ids = nullptr;
    cuda::configure(device, &plan);
    plan.cuda.path = path;
    plan.cuda.t_in_blocks = t_in_blocks;
    plan.cuda.wgmma_columns = wgmma_columns;
    plan.cuda.t_blocks = wgmma_columns ? 2 : 0;
    plan.cuda.splits = path == CudaLoraLinearPath::kFewRows && !t_in_blocks ? 2 : 1;
    Memory workspace = Memory::of<cuda::ForwardWorkspace>(plan);
    args.workspace = workspace.get();
    const Status status = cuda::launch(plan, args, Executor());
    check(status.ok(), status.text);
  }
  p.lora.adapters = 2;
  LoraLinearBackwardPlan back;
  back.problem.forward = p;
  back.problem.forward.rows = back.problem.forward.lora.groups = M;
  back.problem.forward.lora.adapters = 2;
  back.problem.forward.dropout_p = 0.5;
  back.problem.needs_dx = back.problem.needs_dlora = back.problem.needs_dweight = back.problem.needs_dbias = true;
  cuda::configure_backward(device, &back);
  Buffer<float> dw(N * K), dbias(N), da(kRank * K), db(kRank * N);
  Memory workspace(back.workspace);
  LoraLinearBackwardArgs g;
  g.dy = y.get();
  g.x = x.get();
  g.x_stride = g.weight_stride = K;
  g.weight = w.get();
  g.lora = adapters.bank(K, N);
  g.dx = dx.get();
  g.dweight = dw.get();
  g.dbias = dbias.get();
  g.dlora_a = da.get();
  g.dlora_b = db.get();
  g.workspace = workspace.get();
  Status status;
  for (const int columns : {0, 128}) {  // dx by mma.sync, and by wgmma
    back.cuda.wgmma_columns = columns;
    status = cuda::launch_backward(back, g, Executor());
    check(status.ok(), status.text);
  }
  // One adapter, u and dB from one reading of dy.
  back.problem.forward.lora.adapters = 1;
  cuda::configure_backward(device, &back);
  back.cuda.dy_once = true;
  back.cuda.row_splits = back.cuda.column_splits = 1;
  back.cuda.row_tiles = 2;
  Memory more = Memory::of<cuda::BackwardWorkspace>(back);
  g.workspace = more.get();
  g.lora.offsets = nullptr;
  status = cuda::launch_backward(back, g, Executor());
  check(status.ok(), status.text);
}

// Every path over one packed weight of random bytes, whose scales are those of 1 / 128.
void run_int8() {
  DeviceInfo device;
  cuda_device(0, &device);
  const int64_t M = 330, K = 600, N = 72;  // two tiles of blocks that stay
  Buffer<uint16_t> x = halves(M * K), y = halves(M * N);
  Adapters adapters(M, K, N);
  Buffer<uint8_t> packed = Buffer<uint8_t>::aligned(int8_packed_bytes(N, K));
  for (int64_t i = 0; i < packed.size(); ++i) packed[i] = static_cast<uint8_t>(generator()() % 255 - 127);
  const float scale = 1.0f / 128;
  for (int64_t n = 0; n < round_up(N, kInt8BlockChannels); ++n)
    std::memcpy(packed.get() + n / kInt8BlockChannels * int8_block_bytes(K) +
                    kInt8BlockChannels * int8_padded_depth(K) + n % kInt8BlockChannels * 4,
                &scale, 4);
  Int8LoraLinearPlan plan;
  Int8LoraLinearProblem& p = plan.problem;
  p.in_features = K;
  p.out_features = N;
  p.dtype = p.lora.dtype = DType::kFloat16;
  p.activation = Activation::kSilu;
  p.lora.adapters = 2;
  p.lora.total_rank = p.lora.max_rank = kRank;
  Int8LoraLinearArgs args;
  args.x = x.get();
  args.x_stride = K;
  args.packed_weight = packed.get();
  args.lora = adapters.bank(K, N);
  args.y = y.get();
  using Path = CudaInt8LoraLinearPath;
  const struct {
    Path path;
    int wgmma_rows, splits;
  } ways[] = {{Path::kTiled, 0, 1},   {Path::kTiled, 128, 1}, {Path::kTiled, 256, 1},
              {Path::kTiled, 320, 1}, {Path::kFewRows, 0, 2}, {Path::kFused, 0, 1}};
  for (const auto& [path, wgmma_rows, splits] : ways) {
    p.rows = p.lora.groups = path == Path::kTiled ? M : 9;
    cuda::configure(device, &plan);
    plan.cuda.path = path;
    plan.cuda.large_tiles = false;
    plan.cuda.wgmma_rows = wgmma_rows;
    plan.cuda.resident = 2;
    plan.cuda.splits = splits;
    Memory workspace = Memory::of<cuda::Int8Workspace>(plan);
    args.workspace = workspace.get();
    const Status status = cuda::launch(plan, args, Executor());
    check(status.ok(), status.text);
  }
}

// A step of self-attention whose rows name each other's new tokens, and one of cross-attention over what was packed.
void run_attention() {
  DeviceInfo device;
  cuda_device(0, &device);
  const int64_t kRows = 3, kHeads = 2, D = 40, C = 150;
  Buffer<uint16_t> q = halves(kRows * kHeads * D), k = halves(kRows * kHeads * D), v = halves(kRows * kHeads * D);
  Buffer<uint16_t> k_cache = halves(kRows * kHeads * C * D), v_cache = halves(kRows * kHeads * C * D);
  Buffer<uint16_t> out = halves(kRows * kHeads * D);
  Buffer<int32_t> lengths(kRows), slots(kRows * C);
  Buffer<float> weights(kRows * C);
  for (int64_t i = 0; i < kRows; ++i) {
    lengths[i] = static_cast<int32_t>(60 + 30 * i);
    for (int64_t p = 0; p < C; ++p) slots[i * C + p] = static_cast<int32_t>(p < lengths[i] ? p % kRows : i);
  }
  const int64_t head = 1;
  KvAttentionStepPlan plan;
  KvAttentionStepProblem& p = plan.problem;
  p.rows = p.cache_rows = kRows;
  p.heads = kHeads;
  p.head_size = D;
  p.capacity = C;
  p.dtype = p.cache_dtype = DType::kFloat16;
  p.slots = KvSlots::kPerPosition;
  p.append = true;
  p.weight_heads = 1;
  KvAttentionStepArgs args;
  args.q = q.get();
  args.k = k.get();
  args.v = v.get();
  args.k_cache = k_cache.get();
  args.v_cache = v_cache.get();
  args.lengths = lengths.get();
  args.slots = slots.get();
  args.scale = 0.15f;
  args.weight_heads = &head;
  args.weights = weights.get();
  args.out = out.get();
  const auto launch = [&] {
    cuda::configure(device, &plan);
    plan.cuda.splits = 2;
    plan.cuda.split_positions = 128;
    for (const int cluster : {1, 2}) {
      plan.cuda.cluster = cluster;
      Memory workspace = Memory::of<cuda::KvWorkspace>(plan);
      args.workspace = workspace.get();
      const Status status = cuda::launch(plan, args, Executor());
      check(status.ok(), status.text);
    }
  };
  launch();

  KvPackPlan packing;
  KvPackProblem& packed = packing.problem;
  packed.cache_rows = kRows;
  packed.positions = C;
  packed.heads = kHeads;
  packed.head_size = D;
  packed.dtype = DType::kFloat16;
  const int64_t key_bytes = kRows * kHeads * kv_key_bytes(C, D), value_bytes = kRows * kHeads * kv_value_bytes(C, D);
  Buffer<char> keys = Buffer<char>::aligned(key_bytes), values = Buffer<char>::aligned(value_bytes);
  Buffer<float> k_scales(kRows * kHeads * D), v_scales(kRows * kHeads * D);
  KvPackArgs pack;
  pack.k = k_cache.get();
  pack.v = v_cache.get();
  pack.k_stride = pack.v_stride = kHeads * D;
  pack.k_row_stride = pack.v_row_stride = C * kHeads * D;
  pack.packed_k = reinterpret_cast<int8_t*>(keys.get());
  pack.packed_v = reinterpret_cast<int8_t*>(values.get());
  pack.k_scales = k_scales.get();
  pack.v_scales = v_scales.get();
  cuda::configure(device, &packing);
  const Status status = cuda::launch(packing, pack, Executor());
  check(status.ok(), status.text);

  p.append = false;
  p.slots = KvSlots::kPerRow;
  p.cache_dtype = DType::kInt8;
  p.scales = KvScales::kPerChannel;
  p.layout = KvLayout::kBlocked;
  for (int64_t i = 0; i < kRows; ++i) slots[i] = static_cast<int32_t>(i / 2);
  args.k_cache = keys.get();
  args.v_cache = values.get();
  args.k_scales = k_scales.get();
  args.v_scales = v_scales.get();
  launch();
}

// A chunk of two blocks of queries whose ring goes around; heads of one group of channels and of two.
void run_relative_attention() {
  DeviceInfo device;
  cuda_device(0, &device);
  for (const int64_t D : {40, 72}) {
    const int64_t kRows = 2, kHeads = 2, T = 20, kLeft = 50, C = kLeft + T;
    const int64_t chunk = kRows * T * kHeads * D, ring = kRows * kHeads * C * D;
    Buffer<uint16_t> q = halves(chunk), k = halves(chunk), v = halves(chunk), out = halves(chunk);
    Buffer<uint16_t> k_cache = halves(ring), v_cache = halves(ring),
                     positions = halves((kLeft + 2 * T - 1) * kHeads * D);
    Buffer<uint16_t> bias_u = halves(kHeads * D), bias_v = halves(kHeads * D);
    Buffer<int32_t> lengths(kRows);
    lengths[0] = 7, lengths[1] = 123;
    KvRelativeStepPlan plan;
    KvRelativeStepProblem& p = plan.problem;
    p.rows = p.cache_rows = kRows;
    p.tokens = T;
    p.heads = kHeads;
    p.head_size = D;
    p.capacity = C;
    p.left = kLeft;
    p.dtype = p.cache_dtype = DType::kFloat16;
    KvRelativeStepArgs args;
    args.q = q.get();
    args.k = k.get();
    args.v = v.get();
    args.k_cache = k_cache.get();
    args.v_cache = v_cache.get();
    args.positions = positions.get();
    args.bias_u = bias_u.get();
    args.bias_v = bias_v.get();
    args.lengths = lengths.get();
    args.scale = 0.15f;
    args.out = out.get();
    cuda::configure(device, &plan);
    for (const int chunks : {2, 1}) {
      plan.cuda.chunks = chunks;
      const Status status = cuda::launch(plan, args, Executor());
      check(status.ok(), status.text);
    }
  }
}

}  // namespace

int main(int count, char** words) {
  const std::string what = count > 1 ? words[1] : "kernels";
  emulation::options = {emulation::Order::kShuffled, 3};
  if (what == "kernels")
    run_kernels(), run_int8(), run_attention(), run_relative_attention();
  else
    run_race(what == "ordered");
  if (!failures) std::printf("all checks passed\n");
  return failures != 0;
}

// The core without Python or torch: plans are pure and printable, refusals list every reason, and every implementation
// stays inside its buffers (this program is built with AddressSanitizer and UndefinedBehaviorSanitizer).
#include <algorithm>
#include <cerrno>
#include <vector>

#include "check.h"
#include "core_attention.h"
#include "cpu/int8_lora_linear.h"
#include "lora_kernels/implementations.h"
#include "lora_kernels/int8_lora_linear.h"
#include "lora_kernels/lora_linear.h"

using namespace lora_kernels;

namespace {

constexpr uint32_t kAll = kIsaAvx2 | kIsaAvx512 | kIsaAvx512Vnni | kIsaAvx512Bf16;

DeviceInfo device_with(uint32_t isa, int threads = 1) {
  DeviceInfo device;
  device.isa = isa;
  device.threads = threads;
  return device;
}

LoraLinearProblem linear_problem(int64_t rows, int64_t in, int64_t out, int64_t rank) {
  LoraLinearProblem p;
  p.rows = rows;
  p.in_features = in;
  p.out_features = out;
  p.has_bias = true;
  p.lora.adapters = rank > 0 ? 1 : 0;
  p.lora.total_rank = p.lora.max_rank = rank;
  return p;
}

// A plan's sizes are chosen by the implementation's own machine code, so that of another CPU cannot be made everywhere.
bool runs_avx512() { return host_device().isa & kIsaAvx512; }

void test_plans() {
  LoraLinearPlan chosen, again;
  const LoraLinearProblem p = linear_problem(1500, 512, 512, 16);
  for (uint32_t isa : {uint32_t{0}, uint32_t{kIsaAvx2}, kAll}) {
    if (isa == kAll && !runs_avx512()) continue;
    check(plan(p, device_with(isa), &chosen).ok(), "a plan for isa " + isa_names(isa));
    const char* expected = isa == 0 ? "generic" : isa == kAll ? "avx512" : "avx2";
    check(contains(to_string(chosen), expected), to_string(chosen) + " should use " + expected);
    plan(p, device_with(isa), &again);
    check(to_string(chosen) == to_string(again), "the same problem and device give the same plan");
  }
  check(contains(to_string(p), "rows=1500") && contains(to_string(p), "rank=16"), to_string(p));
}

void test_plans_of_avx512() {
  LoraLinearPlan chosen, again;
  const LoraLinearProblem p = linear_problem(1500, 512, 512, 16);
  plan(p, device_with(kAll, 16), &chosen);
  plan(linear_problem(1, 64, 64, 0), device_with(kAll, 16), &again);
  check(chosen.tasks == 16, "a large product uses every thread: " + to_string(chosen));
  check(again.tasks == 1, "a tiny product does not fork: " + to_string(again));

  // Tiles come first where the CPU has them and the operating system gives them, for many rows.
  const uint32_t with_tiles = kAll | kIsaAmxInt8 | kIsaAmxBf16;
  DeviceInfo tiles = device_with(with_tiles), refused = device_with(with_tiles);
  refused.tile_refusal = EPERM;
  Int8LoraLinearProblem many;
  many.rows = many.in_features = many.out_features = 512;
  Int8LoraLinearPlan int8;
  plan(many, tiles, &int8);
  check(int8.tiles && contains(to_string(int8), "amx tiles"), to_string(int8) + ": many rows are multiplied in tiles");
  many.rows = 47;
  plan(many, tiles, &int8);
  check(!int8.tiles, to_string(int8) + ": few rows are not");
  plan(many, refused, &int8);
  check(contains(to_string(int8), "avx512"), to_string(int8) + ": tiles that are refused are passed over");
  force_implementation("amx");
  const Status why = plan(many, refused, &int8);
  force_implementation("");
  check(contains(why.text, "amx: the operating system refuses this process"), "the refusal is a reason: " + why.text);

  LoraLinearProblem half = p;
  half.dtype = DType::kBFloat16;
  DeviceInfo amd = device_with(kAll), intel = device_with(kAll);
  amd.fast_bf16_dot = true;
  plan(half, amd, &chosen);
  plan(half, intel, &again);
  check(chosen.bf16_dot && !again.bf16_dot, "bf16 dot products only where they are the faster ones");
}

void test_refusals() {
  LoraLinearPlan chosen;
  LoraLinearProblem p = linear_problem(4, 8, 8, 0);
  p.dropout_p = 1.5;
  check(contains(plan(p, device_with(kAll), &chosen).text, "dropout_p: expected"), "a bad probability is named");
  p = linear_problem(10, 8, 8, 2);
  p.lora.groups = 3;
  check(contains(plan(p, device_with(kAll), &chosen).text, "adapter_ids"), "groups that do not divide are named");

  force_implementation("avx512");
  const Status refused = plan(linear_problem(1, 8, 8, 0), device_with(kIsaAvx2), &chosen);
  force_implementation("");
  check(refused.code == StatusCode::kUnsupported, "a forced implementation that cannot run is an error");
  for (const char* part : {"avx512: this CPU lacks avx512", "avx2: not the forced one", "generic: not the forced one"})
    check(contains(refused.text, part), "every reason is listed (" + std::string(part) + "): " + refused.text);
  check(!force_implementation("sse2").ok(), "an unknown name is an error");
}

// y = x Wt + bias + 0.5 (x At) B at odd sizes, in a bank of two adapters
void run_lora_linear(const DeviceInfo& device, DType dtype, int64_t rows, int64_t in, int64_t out) {
  const int64_t ranks[2] = {3, 5}, total = 8;
  LoraLinearProblem p = linear_problem(rows, in, out, total);
  p.dtype = dtype;
  p.lora.adapters = 2;
  p.lora.max_rank = 5;
  p.lora.groups = rows;
  Buffer<float> bias(out), a(total * in), b(total * out), scales(2);
  Buffer<int32_t> offsets(3), ids(rows);
  std::vector<float> x(rows * in), w(out * in);
  const auto fill = [](float* v, int64_t n, float s) {
    for (int64_t i = 0; i < n; ++i) v[i] = from_bf16_bits(bf16_bits(normal() * s));
  };
  fill(x.data(), rows * in, 1);
  fill(w.data(), out * in, 0.1f);
  fill(bias.get(), out, 1);
  fill(a.get(), total * in, 0.1f);
  fill(b.get(), total * out, 1);
  scales[0] = 0.5f, scales[1] = 2;
  offsets[0] = 0, offsets[1] = 3, offsets[2] = 8;
  for (int64_t m = 0; m < rows; ++m) ids[m] = static_cast<int32_t>(m % 3) - 1;
  Buffer<uint16_t> x16(rows * in), w16(out * in), y16(rows * out);
  Buffer<float> x32(rows * in), w32(out * in), y32(rows * out);
  for (int64_t i = 0; i < rows * in; ++i) x16[i] = bf16_bits(x[i]), x32[i] = x[i];
  for (int64_t i = 0; i < out * in; ++i) w16[i] = bf16_bits(w[i]), w32[i] = w[i];

  LoraLinearPlan chosen;
  check(plan(p, device, &chosen).ok(), "a plan");
  Buffer<char> workspace = Buffer<char>::aligned(workspace_bytes(chosen));
  LoraLinearArgs args;
  const bool wide = dtype == DType::kFloat32;
  args.x = wide ? static_cast<void*>(x32.get()) : x16.get();
  args.weight = wide ? static_cast<void*>(w32.get()) : w16.get();
  args.y = wide ? static_cast<void*>(y32.get()) : y16.get();
  args.x_stride = args.weight_stride = in;
  args.bias = bias.get();
  args.lora.a = a.get();
  args.lora.a_stride = in;
  args.lora.b = b.get();
  args.lora.b_stride_rank = out;
  args.lora.b_stride_out = 1;
  args.lora.scales = scales.get();
  args.lora.offsets = offsets.get();
  args.lora.adapter_ids = ids.get();
  args.workspace = workspace.get();
  const Status status = run(chosen, args, serial_executor());
  check(status.ok(), status.text);
  double worst = 0, largest = 1e-9;
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t n = 0; n < out; ++n) {
      double y = bias[n];
      for (int64_t k = 0; k < in; ++k) y += double{x[m * in + k]} * w[n * in + k];
      for (int64_t r = 0; ids[m] >= 0 && r < ranks[ids[m]]; ++r) {
        double t = 0;
        for (int64_t k = 0; k < in; ++k) t += double{x[m * in + k]} * a[(offsets[ids[m]] + r) * in + k];
        y += scales[ids[m]] * t * b[(offsets[ids[m]] + r) * out + n];
      }
      const double got = wide ? y32[m * out + n] : from_bf16_bits(y16[m * out + n]);
      worst = std::fmax(worst, std::fabs(got - y));
      largest = std::fmax(largest, std::fabs(y));
    }
  check(worst / largest < (wide ? 3e-6 : 1e-2), to_string(chosen) + ": error " + std::to_string(worst / largest));
}

// With a rank: rank row r of A picks column r of x, so that t is exact in bf16 too.
void run_int8(const DeviceInfo& device, int64_t rows, int64_t in, int64_t out, int64_t rank = 0) {
  Buffer<int8_t> w(out * in);
  Buffer<float> x(rows * in), scales(out), y(rows * out), bias(out);
  for (int64_t i = 0; i < out * in; ++i) w[i] = static_cast<int8_t>(static_cast<int>(generator()() % 255) - 127);
  for (int64_t n = 0; n < out; ++n) scales[n] = 1, bias[n] = static_cast<float>(n);
  // integer rows that quantize to themselves: the result is the integer sum
  for (int64_t i = 0; i < rows * in; ++i) x[i] = static_cast<float>(static_cast<int>(generator()() % 255) - 127);
  for (int64_t m = 0; m < rows; ++m) x[m * in] = 127;
  Buffer<uint8_t> packed = Buffer<uint8_t>::aligned(int8_packed_bytes(out, in));
  int8_pack(w.get(), scales.get(), out, in, packed.get());
  Int8LoraLinearProblem p;
  p.rows = rows;
  p.in_features = in;
  p.out_features = out;
  p.has_bias = true;
  const int64_t blocks = round_up(out, kLoraBlockColumns) / kLoraBlockColumns;
  Buffer<uint16_t> a(rank * in), b(blocks * rank * kLoraBlockColumns);
  const uint16_t bf16_integers[] = {0xc000, 0xbf80, 0, 0x3f80, 0x4000};  // -2 ... 2
  const auto picked = [&](int64_t r, int64_t n) { return (3 * r + n) % 5 - 2; };
  for (int64_t i = 0; i < rank * in; ++i) a[i] = i % in == i / in ? 0x3f80 : 0;
  for (int64_t n = 0; n < blocks * kLoraBlockColumns; ++n)
    for (int64_t r = 0; r < rank; ++r)
      b[(n / kLoraBlockColumns * rank + r) * kLoraBlockColumns + n % kLoraBlockColumns] =
          bf16_integers[picked(r, n) + 2];
  if (rank > 0) p.lora = {1, rank, rank, 0, DType::kBFloat16};
  Int8LoraLinearPlan chosen;
  check(plan(p, device, &chosen).ok(), "a plan");
  if (rank > 0 && device.fast_bf16_dot && std::string(chosen.implementation->name) == "avx512")
    check(chosen.bf16_dot == (rows >= 48 && in % 2 == 0), to_string(chosen) + ": pairs of bf16");
  Buffer<char> workspace = Buffer<char>::aligned(workspace_bytes(chosen));
  Int8LoraLinearArgs args;
  args.x = x.get();
  args.x_stride = in;
  args.packed_weight = packed.get();
  args.bias = bias.get();
  args.y = y.get();
  args.lora.a = a.get();
  args.lora.a_stride = in;
  args.lora.b = b.get();
  args.lora.b_stride_rank = kLoraBlockColumns;
  args.lora.b_stride_out = 1;
  args.lora.b_stride_block = rank * kLoraBlockColumns;
  args.workspace = workspace.get();
  const Status status = run(chosen, args, serial_executor());
  check(status.ok(), status.text);
  int64_t wrong = 0;
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t n = 0; n < out; ++n) {
      int64_t sum = n;
      for (int64_t k = 0; k < in; ++k) sum += static_cast<int64_t>(x[m * in + k]) * w[n * in + k];
      for (int64_t r = 0; r < rank; ++r) sum += static_cast<int64_t>(x[m * in + r]) * picked(r, n);
      wrong += static_cast<float>(sum) != y[m * out + n];
    }
  check(wrong == 0, to_string(chosen) + ": " + std::to_string(wrong) + " integer sums differ");
}

}  // namespace

int main() {
  test_plans();
  if (runs_avx512())
    test_plans_of_avx512();
  else
    std::printf("plans of avx512 and amx: not made on this CPU\n");
  test_refusals();
  DeviceInfo host = host_device();
  for (const char* name : {"generic", "avx2", "avx2_vnni", "avx512", "amx"}) {
    LoraLinearPlan probe;
    Int8LoraLinearProblem smallest;
    smallest.rows = smallest.in_features = smallest.out_features = 1;
    Int8LoraLinearPlan int8_probe;
    force_implementation(name);
    if (!plan(linear_problem(1, 1, 1, 0), host, &probe).ok() || !plan(smallest, host, &int8_probe).ok()) {
      std::printf("%s: not available on this CPU\n", name);
      continue;
    }
    for (int threads : {1, 3}) {
      host.threads = threads;
      for (const auto& s : {std::vector<int64_t>{1, 1, 1}, {1, 33, 65}, {5, 70, 130}, {13, 96, 67}, {50, 130, 129}}) {
        run_lora_linear(host, DType::kFloat32, s[0], s[1], s[2]);
        run_lora_linear(host, DType::kBFloat16, s[0], s[1], s[2]);
        run_int8(host, s[0], s[1], s[2]);
        run_int8(host, s[0], s[1], s[2], std::min<int64_t>(s[1], 7));
        run_attention(host, s[0], 3, s[1], 1 + s[2] % 37);
        run_relative(host, s[0], 3, s[1], s[2] % 37);
        run_blocked_attention(host, s[1], 3, 1 + s[2] % 37);
      }
    }
    if (std::string(name) == "avx512" && (host.isa & kIsaAvx512Bf16)) {
      DeviceInfo fast = host;
      fast.fast_bf16_dot = true;
      run_lora_linear(fast, DType::kBFloat16, 50, 130, 129);
      run_lora_linear(fast, DType::kBFloat16, 13, 96, 67);
      for (int64_t rank : {1, 5, 16, 40}) run_int8(fast, 97, 96, 131, rank);
    }
    if (std::string(name) == "amx")
      for (int64_t rank : {0, 5, 16, 40}) run_int8(host, 97, 70, 131, rank);
    std::printf("%s: done\n", name);
  }
  force_implementation("");
  std::printf(failures ? "%d checks failed\n" : "all checks passed\n", failures);
  return failures ? 1 : 0;
}

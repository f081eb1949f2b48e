// int8_lora_linear's CUDA plans.
#include <cmath>
#include <utility>
#include <vector>

#include "cuda_devices.h"

using namespace lora_kernels;

namespace {

Int8LoraLinearPlan int8_plan(const Int8LoraLinearProblem& p, const CudaDevice& device) {
  Int8LoraLinearPlan chosen;
  const Status status = plan(p, on_cuda(device), &chosen);
  check(status.ok(), status.text);
  return chosen;
}

void test_int8_paths() {
  using Path = CudaInt8LoraLinearPath;
  CudaDevice unknown;
  unknown.arch = 130;
  for (const CudaDevice& d : {kT4, kA100, kL4, kH200, unknown}) {
    for (int64_t rows : {1, 8, 16}) {
      const Int8LoraLinearPlan few = int8_plan(int8_problem(rows, 1280, 1280, 16, 4), d);
      check(few.cuda.path != Path::kTiled, "few rows stream w: " + to_string(few));
    }
    check(int8_plan(int8_problem(24, 1280, 5120, 16), d).cuda.path == Path::kFewRows, "up to 32 of them");
    const Int8LoraLinearPlan many = int8_plan(int8_problem(4096, 1280, 5120, 16), d);
    check(many.cuda.path == Path::kTiled && many.cuda.large_tiles, "a large product is tiled: " + to_string(many));
    check(!int8_plan(int8_problem(100, 256, 256, 16), d).cuda.large_tiles, "a small one has small tiles");
    check(many.cuda.early_start == (d.arch >= 90), "products start early from sm_90 on: " + to_string(many));
    check(to_string(many) == to_string(int8_plan(int8_problem(4096, 1280, 5120, 16), d)), "a plan is a function");
    check(std::isfinite(many.cuda.predicted_us) && many.cuda.predicted_us > 0, to_string(many));
    // A whole vocabulary: rows are quantized once, and not by 1,621 blocks.
    Int8LoraLinearProblem p = int8_problem(1, 1280, 51865, 0);
    p.top_k = 5;
    p.has_screen = true;
    const Int8LoraLinearPlan vocabulary = int8_plan(p, d);
    check(vocabulary.cuda.path == Path::kFewRows && vocabulary.cuda.splits == 1, to_string(vocabulary));
    check(workspace_bytes(vocabulary) >= 51865 * 4, "with room for the outputs to choose from");
  }
  // Without an early start the kernel that is saved costs more than rows quantized in every block.
  check(int8_plan(int8_problem(1, 1280, 1280, 16), kA100).cuda.path == Path::kFused, "A100: one kernel at one row");
  check(workspace_bytes(int8_plan(int8_problem(1, 1280, 1280, 16), kA100)) == 0, "which needs no memory");
  check(int8_plan(int8_problem(32, 16384, 64, 16), kH200).cuda.splits > 1, "a narrow deep layer is split");
  check(int8_plan(int8_problem(4096, 1280, 1280, 16), kH200).cuda.staged_bytes > 0, "rows that fit are read once");
  check(int8_plan(int8_problem(4096, 65536, 1280, 16), kH200).cuda.staged_bytes == 0, "those that do not, from L2");
  Int8LoraLinearProblem p = int8_problem(64, 1280, 1280, 16);
  p.dtype = DType::kBFloat16;
  check(int8_plan(p, kL4).cuda.convert_a, "factors of another type than x are converted first");

  Int8LoraLinearPlan chosen;
  Status s = plan(p, on_cuda(kT4), &chosen);
  check(s.code == StatusCode::kUnsupported && contains(s.text, "dtype of x: on sm_75 expected float16"), s.text);
  p.rows = int64_t{1} << 40;
  p.lora.groups = 0;
  s = plan(p, on_cuda(device_of(70, 80, 1.4, 900)), &chosen);
  check(contains(s.text, "expected sm_75") && contains(s.text, "rows of x: expected at most"), s.text);
  check(plan(int8_problem(4, 8, 8, 2), DeviceInfo(), &chosen).ok() && !contains(to_string(chosen), "cuda"),
        "a CPU problem stays on the CPU");

  p = int8_problem(4, 64, 64, 2);
  p.static_scale = true;
  check(plan(p, on_cuda(kH200), &chosen).ok(), "static scales have a plan");
  for (float scale : {0.0f, -1.0f, NAN, INFINITY}) {
    Int8LoraLinearArgs args;
    args.host_x_scale = scale;
    s = run(chosen, args, serial_executor());
    check(s.code == StatusCode::kInvalidArgument && contains(s.text, "x_scale: expected a positive finite scale, got"),
          "a bad scale is refused before anything is launched: " + s.text);
  }
  Int8LoraLinearArgs args;
  args.host_x_scale = 1;
  s = run(chosen, args, serial_executor());
  check(s.code == StatusCode::kUnsupported && contains(s.text, "LORA_KERNELS_CUDA=ON"), s.text);
}

void test_int8_wgmma() {
  using Path = CudaInt8LoraLinearPath;
  const CudaDevice with = with_wgmma(kH200);
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32})
    for (const int64_t rank : {0, 16}) {
      Int8LoraLinearProblem p = int8_problem(4096, 1280, 5120, rank);
      p.dtype = p.lora.dtype = dtype;
      const Int8LoraLinearPlan mma = int8_plan(p, kH200), wgmma = int8_plan(p, with);
      check(mma.cuda.wgmma_rows == 0 && !contains(to_string(mma), "wgmma"),
            "without machine code for sm_90a there is none: " + to_string(mma));
      check(wgmma.cuda.path == Path::kTiled && wgmma.cuda.wgmma_rows > 0 &&
                wgmma.cuda.predicted_us < 0.85 * mma.cuda.predicted_us,
            "a large product is predicted to be clearly faster: " + to_string(wgmma) + ", " + to_string(mma));
      check(contains(to_string(wgmma), "wgmma tile=" + std::to_string(wgmma.cuda.wgmma_rows) + "x128"),
            to_string(wgmma));
      check(wgmma.cuda.early_start && workspace_bytes(wgmma) == workspace_bytes(mma),
            "which needs no other memory: " + to_string(wgmma));
    }
  // Blocks that stay read less of shared memory and multiply beside their ends; two small tiles hide what a residual
  // waits for, and divide better into few.
  const auto rows_of = [&](const Int8LoraLinearProblem& p) { return int8_plan(p, with).cuda.wgmma_rows; };
  Int8LoraLinearProblem large = int8_problem(4096, 1280, 5120, 16);
  check(rows_of(large) == 256 && int8_plan(large, with).cuda.resident == 132, "a large product: blocks that stay");
  large.has_residual = true;
  check(rows_of(large) == 128, "a residual is waited for, beside the products of another block");
  large.rows = 12000;
  large.in_features = 5120;
  check(rows_of(large) == 256, "which much depth outweighs");
  large = int8_problem(4096, 1280, 5120, 16);
  check(rows_of(int8_problem(1500, 1280, 1280, 16)) == 128,
        "120 small tiles are on as many multiprocessors, 60 large ones on half of them");
  check(rows_of(int8_problem(4096, 5120, 1280, 16)) == 320,
        "130 tiles of 320 rows are one for each multiprocessor, 160 of 256 rows two for some");
  check(rows_of(int8_problem(4096, 1280, 5119, 16)) == 128, "pairs of channels");
  large.lora.groups = 512;
  large.lora.adapters = 64;
  check(rows_of(large) == 128, "33 adapters in a tile would be brought one behind the other");
  large.lora.groups = 4;
  check(rows_of(large) == 256, "not if most tiles have one");
  large.dtype = DType::kFloat32;
  check(rows_of(large) == 128, "of 16 bits");
  Int8LoraLinearProblem gelu = int8_problem(4096, 1280, 5120, 16);
  gelu.activation = Activation::kGelu;
  check(rows_of(gelu) == 256, "an activation too is made beside products");
  gelu = int8_problem(4096, 1280, 5120, 16);
  gelu.dtype = gelu.lora.dtype = DType::kFloat32;  // of which blocks that stay make none
  const double plain_us = int8_plan(gelu, with).cuda.predicted_us, mma_us = int8_plan(gelu, kH200).cuda.predicted_us;
  gelu.activation = Activation::kGelu;
  check(int8_plan(gelu, with).cuda.predicted_us < 1.05 * plain_us &&
            int8_plan(gelu, kH200).cuda.predicted_us > 1.1 * mma_us,
        "an activation is hidden where two blocks share a multiprocessor, and is not where one is alone");
  for (const int64_t rows : {1, 32, 100})
    check(int8_plan(int8_problem(rows, 1280, 1280, 16), with).cuda.wgmma_rows == 0, "few rows are bound by memory");
  Int8LoraLinearProblem p = int8_problem(4096, 1280, 51865, 0);
  p.top_k = 5;
  check(int8_plan(p, with).cuda.wgmma_rows == 0, "outputs that are chosen among are fp32, which it does not store");
  p = int8_problem(4096, 0, 5120, 0);
  check(int8_plan(p, with).cuda.wgmma_rows == 0, "nor is there a map of no columns");

  p = int8_problem(4096, 1280, 5120, 16);
  check(force_implementation("cuda_mma").ok(), "it can be left out by name");
  const Int8LoraLinearPlan forced = int8_plan(p, with);
  Int8LoraLinearPlan refused;
  const Status on_cpu = plan(p, DeviceInfo(), &refused);
  const Status launched = run(forced, Int8LoraLinearArgs(), serial_executor());
  force_implementation("");
  check(forced.cuda.wgmma_rows == 0 && to_string(forced) == to_string(int8_plan(p, kH200)), to_string(forced));
  check(contains(on_cpu.text, "cuda_mma: it runs on a CUDA device"), "and a CPU refuses: " + on_cpu.text);
  check(contains(launched.text, "LORA_KERNELS_CUDA=ON"), "it is launched as a CUDA kernel is: " + launched.text);
}

// Blocks that share out depth, where there are such; what blocks have in shared memory from the beginning.
void test_int8_clusters() {
  using Path = CudaInt8LoraLinearPath;
  const CudaDevice with = with_clusters(kH200);
  const Int8LoraLinearProblem deep = int8_problem(1, 5120, 1280, 16);
  const Int8LoraLinearPlan alone = int8_plan(deep, kH200), together = int8_plan(deep, with);
  check(alone.cuda.cluster == 1 && together.cuda.cluster > 1 && together.cuda.path == Path::kFused,
        "40 blocks of 5,120 channels are few: " + to_string(alone) + ", " + to_string(together));
  check(together.cuda.predicted_us < 0.7 * alone.cuda.predicted_us && workspace_bytes(together) == 0,
        "which takes less time and no memory: " + to_string(together));
  check(contains(to_string(together), "cluster=" + std::to_string(together.cuda.cluster)), to_string(together));
  const Int8LoraLinearPlan rows = int8_plan(int8_problem(16, 5120, 1280, 16), with);
  check(rows.cuda.path == Path::kFewRows && rows.cuda.cluster > 1 && rows.cuda.splits == 1,
        "16 rows are made once, by a block each, before a cluster reads them: " + to_string(rows));
  check(rows.cuda.rows_of_block == 1 && rows.cuda.staged_a_bytes > 0, to_string(rows));
  check(int8_plan(int8_problem(4096, 1280, 5120, 16), with).cuda.rows_of_block == 16, "many rows are sixteen a block");
  check(int8_plan(int8_problem(1, 1280, 5120, 16), with).cuda.cluster == 1, "160 blocks are enough");
  check(int8_plan(deep, kA100).cuda.cluster == 1, "and before sm_90 there are none");
  CudaDevice part = with;  // of a device: a group of its multiprocessors may not have room for eight blocks
  for (part.multiprocessors = 132; part.multiprocessors > 0; part.multiprocessors -= 6)
    for (const int64_t out : {64, 512, 1280}) {
      const int cluster = int8_plan(int8_problem(1, 20480, out, 16), part).cuda.cluster;
      check(cluster <= (part.multiprocessors >= 64   ? 8
                        : part.multiprocessors >= 16 ? 4
                                                     : 1),
            "clusters of a small device are small: " + std::to_string(cluster));
    }

  const Int8LoraLinearPlan staged = int8_plan(int8_problem(1, 1280, 1280, 16), kH200);
  check(staged.cuda.staged_w && staged.cuda.staged_a_bytes > 0 && contains(to_string(staged), "staged_all"),
        "all that a block reads is asked for at once: " + to_string(staged));
  check(!int8_plan(int8_problem(1, 1280, 1280, 16), kT4).cuda.staged_w, "where it fits");
}

// Calls of a composite that one launch makes: as many from the first on as need nothing of each other.
void test_int8_together() {
  const Int8LoraLinearPlan one = int8_plan(int8_problem(1, 1280, 1280, 16), kH200);
  check(one.cuda.path == CudaInt8LoraLinearPath::kFused, to_string(one));
  char memory[8][1280 * 2];
  const auto args_of = [&](int x, int y) {
    Int8LoraLinearArgs args;
    args.x = memory[x];
    args.x_stride = 1280;
    args.y = memory[y];
    return args;
  };
  const auto count = [](const std::vector<Int8LoraLinearPlan>& plans, const std::vector<Int8LoraLinearArgs>& args) {
    std::vector<const Int8LoraLinearPlan*> all_plans;
    std::vector<const Int8LoraLinearArgs*> all_args;
    for (const Int8LoraLinearPlan& p : plans) all_plans.push_back(&p);
    for (const Int8LoraLinearArgs& a : args) all_args.push_back(&a);
    return together(all_plans.data(), all_args.data(), static_cast<int>(plans.size()));
  };
  check(count({one, one, one}, {args_of(0, 1), args_of(0, 2), args_of(0, 3)}) == 3, "q, k and v");
  check(count({one, one, one, one}, {args_of(0, 1), args_of(0, 2), args_of(0, 3), args_of(0, 4)}) == 3, "no more");
  check(count({one}, {args_of(0, 1)}) == 1, "one alone");
  check(count({one, one, one}, {args_of(0, 1), args_of(1, 2), args_of(0, 3)}) == 1, "one reads what another writes");
  check(count({one, one, one}, {args_of(0, 1), args_of(0, 2), args_of(0, 1)}) == 2, "two write one place");
  check(count({one, one}, {args_of(0, 1), args_of(0, 0)}) == 1, "one writes what another reads");
  Int8LoraLinearProblem p = int8_problem(1, 1280, 1280, 16);
  p.has_residual = true;
  const Int8LoraLinearPlan added = int8_plan(p, kH200);
  check(count({added, added}, {args_of(0, 1), args_of(0, 2)}) == 1, "a residual may be what another writes");
  const Int8LoraLinearPlan other = int8_plan(int8_problem(1, 1280, 640, 16), kH200);
  check(count({one, other}, {args_of(0, 1), args_of(0, 2)}) == 1, "of another size");
  const Int8LoraLinearPlan many = int8_plan(int8_problem(24, 1280, 640, 16), kH200);
  check(many.cuda.path == CudaInt8LoraLinearPath::kFewRows, to_string(many));
  check(count({many, many}, {args_of(0, 1), args_of(0, 2)}) == 1, "kernels that share a workspace");
  Int8LoraLinearPlan on_cpu;
  check(plan(int8_problem(1, 1280, 1280, 16), DeviceInfo(), &on_cpu).ok(), "a CPU's plan");
  check(count({on_cpu, on_cpu}, {args_of(0, 1), args_of(0, 2)}) == 1, "a CPU has no launches");

  const Int8LoraLinearPlan* plans[] = {&one, &one};
  const Int8LoraLinearArgs first = args_of(0, 1), second = args_of(0, 2);
  const Int8LoraLinearArgs* args[] = {&first, &second};
  check(contains(run(plans, args, 2, serial_executor()).text, "LORA_KERNELS_CUDA=ON"), "launched as one is");
}

// Two hundred adapters of rank 16, of which the caller knows the largest rank, or only the sum.
void test_int8_banks() {
  using Path = CudaInt8LoraLinearPath;
  const auto plans = [](int64_t rows) {
    Int8LoraLinearProblem p = int8_problem(rows, 5120, 1280, 16, 200);
    const Int8LoraLinearPlan known = int8_plan(p, kA100);
    p.lora.max_rank = p.lora.total_rank;
    return std::pair{known, int8_plan(p, kA100)};
  };
  const auto [one, one_of_sum] = plans(16);
  check(
      one.cuda.path == Path::kFused && one_of_sum.cuda.path != Path::kFused,
      "rows of t as wide as all ranks leave fused no shared memory: " + to_string(one) + ", " + to_string(one_of_sum));
  const auto [many, many_of_sum] = plans(4096);
  check(workspace_bytes(many_of_sum) - workspace_bytes(many) == 4096 * (3200 - 16) * 2,
        "and they are what memory holds: " + to_string(many_of_sum));
  check(many.cuda.predicted_us < many_of_sum.cuda.predicted_us, "tiles are predicted with one rank's depth");
}

}  // namespace

void test_int8_plans() {
  test_int8_together();
  test_int8_clusters();
  test_int8_paths();
  test_int8_banks();
  test_int8_wgmma();
}

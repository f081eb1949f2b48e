// What a plan says of CUDA devices that are not here: who is offered which implementation, which path it takes, and
// that every reason against is listed. Nothing is launched.
#include <cmath>
#include <set>

#include "check.h"
#include "lora_kernels/composite.h"
#include "lora_kernels/implementations.h"
#include "lora_kernels/int8_lora_linear.h"
#include "lora_kernels/lora_linear.h"

using namespace lora_kernels;

namespace {

CudaDevice device_of(int arch, int multiprocessors, double clock_ghz, double memory_gbs) {
  CudaDevice d;
  d.arch = arch;
  d.multiprocessors = multiprocessors;
  d.clock_hz = clock_ghz * 1e9;
  d.memory_bytes_per_second = memory_gbs * 1e9;
  d.shared_bytes = arch == 75 ? 64 << 10 : arch == 80 ? 163 << 10 : arch == 90 || arch == 100 ? 227 << 10 : 99 << 10;
  return d;
}

const CudaDevice kT4 = device_of(75, 40, 1.59, 320);
const CudaDevice kA100 = device_of(80, 108, 1.41, 1555);
const CudaDevice kA10 = device_of(86, 72, 1.7, 600);
const CudaDevice kL4 = device_of(89, 58, 2.04, 300);
const CudaDevice kH100 = device_of(90, 132, 1.755, 3350);
const CudaDevice kH200 = device_of(90, 132, 1.755, 4800);
const CudaDevice kB200 = device_of(100, 148, 1.85, 8000);
const CudaDevice k5090 = device_of(120, 170, 2.41, 1792);

LoraLinearProblem problem_of(int64_t rows, int64_t in, int64_t out, int64_t rank, int64_t adapters = 1) {
  LoraLinearProblem p;
  p.rows = rows;
  p.in_features = in;
  p.out_features = out;
  p.dtype = p.lora.dtype = DType::kFloat16;
  p.lora.adapters = rank > 0 ? adapters : 0;
  p.lora.max_rank = rank;
  p.lora.total_rank = rank * p.lora.adapters;
  if (adapters > 1) p.lora.groups = rows;
  return p;
}

LoraLinearPlan plan_of(const LoraLinearProblem& p, const CudaDevice& device) {
  LoraLinearPlan chosen;
  const Status status = plan(p, on_cuda(device), &chosen);
  check(status.ok(), status.text);
  return chosen;
}

void test_who_is_offered_what() {
  LoraLinearPlan chosen;
  const LoraLinearProblem p = problem_of(4096, 1280, 1280, 16);
  check(plan(p, DeviceInfo(), &chosen).ok() && contains(to_string(chosen), "generic"),
        "a CPU problem stays on the CPU");
  check(contains(to_string(plan_of(p, kH100)), "cuda sm_90"), "a CUDA problem goes to the CUDA row");
  for (const char* name : {"generic", "avx2"}) {
    force_implementation(name);
    const Status refused = plan(p, on_cuda(kH100), &chosen);
    force_implementation("");
    check(refused.code == StatusCode::kUnsupported && contains(refused.text, "cuda: not the forced one") &&
              contains(refused.text, std::string(name) + ": it runs on a CPU"),
          "forcing a CPU's name on a CUDA device is an error: " + refused.text);
  }
  check(force_implementation("cuda").ok(), "cuda is a name that can be forced");
  const Status refused = plan(p, DeviceInfo(), &chosen);
  check(plan(p, on_cuda(kA100), &chosen).ok(), "and is taken on a CUDA device");
  force_implementation("");
  check(contains(refused.text, "cuda: it runs on a CUDA device, and the operands are on a CPU"), refused.text);
  int selected = 0;
  for (const ImplementationReport& row : implementations(on_cuda(kH100)))
    if (row.op == "lora_linear" && row.selected) ++selected, check(row.name == "cuda", row.name + " is selected");
  check(selected == 1, "one row is selected on a CUDA device");
}

void test_paths() {
  for (const CudaDevice& d : {kT4, kA100, kA10, kL4, kH100, kB200, k5090}) {
    for (int64_t rows : {1, 8, 32}) {
      const LoraLinearPlan few = plan_of(problem_of(rows, 1280, 1280, 16, 4), d);
      check(few.cuda.path == CudaLoraLinearPath::kFewRows, "few rows stream W: " + to_string(few));
    }
    const LoraLinearPlan many = plan_of(problem_of(16384, 1280, 5120, 16), d);
    check(many.cuda.path == CudaLoraLinearPath::kTwoSteps || many.cuda.path == CudaLoraLinearPath::kInTile,
          to_string(many));
    check(many.cuda.large_tiles, "a large product has large tiles: " + to_string(many));
    check(!plan_of(problem_of(100, 256, 256, 16), d).cuda.large_tiles, "a small one has small tiles");
    check(to_string(many) == to_string(plan_of(problem_of(16384, 1280, 5120, 16), d)), "a plan is a function");
    check(many.cuda.early_start == (d.arch >= 90 && many.cuda.path == CudaLoraLinearPath::kTwoSteps),
          "kernels start early from sm_90 on: " + to_string(many));
  }
  // Narrow layers: the kernel that is saved costs more than t made again in every tile.
  const LoraLinearPlan narrow = plan_of(problem_of(1500, 384, 384, 16), kA100);
  check(narrow.cuda.path == CudaLoraLinearPath::kInTile, to_string(narrow));
  check(narrow.workspace == 0, "t stays in the tile: " + to_string(narrow));
  // Wide ones: t is made once.
  const LoraLinearPlan wide = plan_of(problem_of(16384, 1280, 5120, 32), kA100);
  check(wide.cuda.path == CudaLoraLinearPath::kTwoSteps, to_string(wide));
  // What a tile cannot make for itself.
  LoraLinearProblem p = problem_of(1500, 384, 384, 16);
  p.dropout_p = 0.1;
  check(plan_of(p, kA100).cuda.path == CudaLoraLinearPath::kTwoSteps, "dropout takes two steps");
  check(plan_of(problem_of(1500, 384, 384, 64), kA100).cuda.path == CudaLoraLinearPath::kTwoSteps, "so do large ranks");
  check(plan_of(problem_of(1500, 384, 384, 16, 3), kA100).cuda.path == CudaLoraLinearPath::kTwoSteps, "and banks");
  check(plan_of(problem_of(1500, 384, 384, 0), kA100).cuda.path == CudaLoraLinearPath::kBase, "no LoRA, one kernel");
  p = problem_of(1500, 384, 384, 16);
  p.lora.dtype = DType::kFloat32;
  check(plan_of(p, kA100).cuda.convert_a, "factors of another type are converted first");
  // K is split where too few blocks would leave memory idle, and not where there are enough.
  check(plan_of(problem_of(1, 16384, 64, 16), kH100).cuda.splits > 1, "a narrow deep layer is split");
  check(plan_of(problem_of(1, 1280, 5120, 16), kH100).cuda.splits == 1, "a wide one is not");
  // Without an early start another kernel costs more than t in every block, of few columns.
  check(plan_of(problem_of(1, 1280, 1280, 16), kA100).cuda.t_in_blocks, "A100: t in blocks");
  check(!plan_of(problem_of(1, 1280, 1280, 32), kA100).cuda.t_in_blocks, "not with more ranks than a product has rows");
  check(!plan_of(problem_of(8, 1280, 1280, 16, 4), kA100).cuda.t_in_blocks, "nor with several adapters");
  // More arithmetic for fp32 in three products than for one.
  p = problem_of(8192, 1280, 1280, 16);
  p.dtype = p.lora.dtype = DType::kFloat32;
  const double precise = plan_of(p, kA100).cuda.predicted_us;
  p.allow_tf32 = true;
  check(plan_of(p, kA100).cuda.predicted_us < precise, "tf32 is predicted to be faster than fp32");
}

void test_unknown_devices() {
  CudaDevice unknown;
  unknown.arch = 130;
  for (const LoraLinearProblem& p : {problem_of(1, 512, 512, 16), problem_of(4096, 1280, 1280, 16, 4)}) {
    const LoraLinearPlan chosen = plan_of(p, unknown);
    check(contains(to_string(chosen), "cuda sm_130"), "a device of which nothing is known gets a plan");
    check(std::isfinite(chosen.cuda.predicted_us) && chosen.cuda.predicted_us > 0, to_string(chosen));
  }
}

void test_workspaces() {
  const LoraLinearPlan two = plan_of(problem_of(4096, 1280, 5120, 64, 5), kH100);
  check(workspace_bytes(two) >= 4096 * 64 * 2, "the workspace has room for t: " + to_string(two));
  check(workspace_bytes(two) < 2 * 4096 * 64 * 2, "and not for much more");
  LoraLinearBackwardProblem b;
  b.forward = problem_of(4096, 1280, 1280, 16);
  b.needs_dx = b.needs_dlora = true;
  LoraLinearBackwardPlan chosen;
  check(plan(b, on_cuda(kH100), &chosen).ok(), "gradients have a plan");
  check(chosen.cuda.a_splits > 1, "rows are split where few tiles would leave the device idle: " + to_string(chosen));
  check(workspace_bytes(chosen) >= chosen.cuda.a_splits * 16 * 1280 * 4, to_string(chosen));
  check(contains(to_string(chosen), "dx dlora") && contains(to_string(chosen), "cuda sm_90"), to_string(chosen));
}

void test_one_reading_of_dy() {
  const auto plan_of_gradients = [](const LoraLinearProblem& p, const CudaDevice& device, bool has_t) {
    LoraLinearBackwardProblem b;
    b.forward = p;
    b.needs_dx = b.needs_dlora = true;
    b.has_t = has_t;
    LoraLinearBackwardPlan chosen;
    const Status status = plan(b, on_cuda(device), &chosen);
    check(status.ok(), status.text);
    return chosen;
  };
  for (const CudaDevice& d : {kT4, kA100, kL4, kH100, kB200, k5090}) {
    const LoraLinearProblem p = problem_of(12000, 1280, 5120, 16);
    const LoraLinearBackwardPlan made = plan_of_gradients(p, d, false), given = plan_of_gradients(p, d, true);
    check(made.cuda.dy_once && given.cuda.dy_once, "rank 16 is bound by memory: " + to_string(made));
    const int64_t tiles = (12000 + 63) / 64;
    check(int64_t{made.cuda.row_splits} * made.cuda.row_tiles >= tiles &&
              int64_t{made.cuda.row_splits - 1} * made.cuda.row_tiles < tiles,
          "every row is in a block: " + to_string(made));
    check(made.workspace - given.workspace == 12000 * 16 * 2, "a t that is handed over takes no room");
    check(given.cuda.predicted_us < made.cuda.predicted_us && contains(to_string(given), "from t"), to_string(given));
  }
  check(!plan_of_gradients(problem_of(4096, 1280, 1280, 64), kH100, false).cuda.dy_once, "not with many ranks");
  check(!plan_of_gradients(problem_of(4096, 1280, 1280, 16, 3), kH100, false).cuda.dy_once, "nor with a bank");
  CudaDevice cached = kA10;
  cached.l2_bytes = 50 << 20;
  check(!plan_of_gradients(problem_of(4096, 1280, 1280, 16), cached, false).cuda.dy_once &&
            plan_of_gradients(problem_of(4096, 1280, 1280, 16), kA10, false).cuda.dy_once,
        "nor where dy stays in L2, and parts are more than its second reading");
  CudaDevice unknown;
  unknown.arch = 130;
  check(!plan_of_gradients(problem_of(4096, 1280, 1280, 16), unknown, false).cuda.dy_once,
        "nor on a device that does not say how much shared memory it has");
  // A t for the gradients has to be in memory: it is made by a kernel of its own.
  LoraLinearProblem p = problem_of(1500, 384, 384, 16);
  p.keeps_t = true;
  check(plan_of(p, kA100).cuda.path == CudaLoraLinearPath::kTwoSteps, "t is not made in tiles");
  p.rows = 1;
  check(!plan_of(p, kA100).cuda.t_in_blocks, "nor in blocks");
  LoraLinearArgs args;
  const Status refused = run(plan_of(p, kA100), args, serial_executor());
  check(refused.code == StatusCode::kInvalidArgument && contains(refused.text, "t: expected the address"),
        refused.text);
}

void test_wgmma() {
  CudaDevice with = kH100;
  with.wgmma = true;
  for (const int64_t rank : {0, 16, 64}) {
    const LoraLinearProblem p = problem_of(12000, 1280, 5120, rank);
    const LoraLinearPlan mma = plan_of(p, kH100), wgmma = plan_of(p, with);
    check(mma.cuda.wgmma_columns == 0 && !contains(to_string(mma), "wgmma"),
          "without machine code for sm_90a there is none: " + to_string(mma));
    check(wgmma.cuda.wgmma_columns > 0 && wgmma.cuda.predicted_us < 0.85 * mma.cuda.predicted_us,
          "a large product is predicted to be clearly faster: " + to_string(wgmma));
    check(contains(to_string(wgmma), "wgmma tile=128x" + std::to_string(wgmma.cuda.wgmma_columns)), to_string(wgmma));
    check(wgmma.cuda.path == (rank ? CudaLoraLinearPath::kTwoSteps : CudaLoraLinearPath::kBase), to_string(wgmma));
  }
  for (const int64_t rows : {1, 32, 100})
    check(plan_of(problem_of(rows, 1280, 1280, 16), with).cuda.wgmma_columns == 0, "few rows are bound by memory");
  LoraLinearProblem p = problem_of(12000, 1280, 5120, 16);
  p.dtype = p.lora.dtype = DType::kFloat32;
  check(plan_of(p, with).cuda.wgmma_columns == 0, "fp32 keeps its precision, which wgmma has no products for");
  check(force_implementation("cuda_mma").ok(), "it can be left out by name");
  p = problem_of(12000, 1280, 5120, 16);
  const LoraLinearPlan forced = plan_of(p, with);
  Int8LoraLinearPlan other;
  Int8LoraLinearProblem int8;
  int8.rows = int8.in_features = int8.out_features = 64;
  int8.dtype = DType::kFloat16;
  check(plan(int8, on_cuda(with), &other).ok(), "which other operators take for their CUDA kernels");
  LoraLinearPlan refused;
  check(!plan(p, DeviceInfo(), &refused).ok(), "and a CPU refuses");
  force_implementation("");
  check(forced.cuda.wgmma_columns == 0 && to_string(forced) == to_string(plan_of(p, kH100)), to_string(forced));
}

// t beside the product: in blocks of which each multiprocessor has two, and the product's time is about the base's.
void test_t_beside_the_product() {
  CudaDevice device = kH200;
  device.wgmma = true;
  LoraLinearProblem p = problem_of(4096, 1280, 1280, 16);
  const LoraLinearPlan beside = plan_of(p, device), base = plan_of(problem_of(4096, 1280, 1280, 0), device);
  check(beside.cuda.t_blocks == 2 * 132 && beside.cuda.wgmma_columns == 128 && beside.cuda.early_start,
        to_string(beside));
  check(contains(to_string(beside), "t_blocks=264"), to_string(beside));
  check(beside.cuda.predicted_us < 1.06 * base.cuda.predicted_us, to_string(beside) + " over " + to_string(base));
  check(base.cuda.t_blocks == 0, "without LoRA there is no t");
  check(plan_of(p, kH200).cuda.t_blocks == 0, "tiles by mma.sync leave no room");
  check(plan_of(problem_of(4096, 1280, 1280, 16, 4), device).cuda.t_blocks > 0, "several adapters make no difference");
  check(plan_of(problem_of(4096, 1280, 1280, 32), device).cuda.t_blocks == 0, "more ranks need more registers");
  p.dropout_p = 0.1;
  check(plan_of(p, device).cuda.t_blocks == 0, "and so does dropout");
  check(plan_of(problem_of(8, 1280, 1280, 16, 4), device).cuda.t_blocks == 0, "few rows have no tiles");
}

// dx by the rule of the forward pass: where it is predicted to be clearly faster, and not of fp32.
void test_wgmma_of_gradients() {
  CudaDevice with = kH100;
  with.wgmma = true;
  LoraLinearBackwardProblem b;
  b.needs_dx = b.needs_dlora = true;
  const auto plan_on = [&](const CudaDevice& device) {
    LoraLinearBackwardPlan chosen;
    const Status status = plan(b, on_cuda(device), &chosen);
    check(status.ok(), status.text);
    return chosen;
  };
  for (const int64_t rank : {0, 16, 64}) {
    b.forward = problem_of(12000, 1280, 5120, rank);
    for (const double dropout : {0.0, 0.1}) {
      b.forward.dropout_p = dropout;
      const LoraLinearBackwardPlan mma = plan_on(kH100), wgmma = plan_on(with);
      check(mma.cuda.wgmma_columns == 0 && !contains(to_string(mma), "wgmma"),
            "without machine code for sm_90a there is none: " + to_string(mma));
      check(wgmma.cuda.wgmma_columns > 0 && wgmma.cuda.large_tiles, "a large dx takes it: " + to_string(wgmma));
      check(contains(to_string(wgmma), "wgmma dx_tile=128x" + std::to_string(wgmma.cuda.wgmma_columns)),
            to_string(wgmma));
      check(wgmma.cuda.predicted_us < mma.cuda.predicted_us && wgmma.workspace == mma.workspace,
            "which takes less time and no memory: " + to_string(wgmma) + ", " + to_string(mma));
      check(wgmma.cuda.a_splits == mma.cuda.a_splits && wgmma.cuda.dy_once == mma.cuda.dy_once,
            "and leaves the sums over rows as they are");
    }
  }
  b.needs_dlora = false;
  b.forward = problem_of(12000, 1280, 5120, 0);
  check(plan_on(with).cuda.predicted_us < 0.85 * plan_on(kH100).cuda.predicted_us, "dx alone is clearly faster");
  b.needs_dlora = true;
  for (const int64_t rows : {1, 32, 100}) {
    b.forward = problem_of(rows, 1280, 1280, 16);
    check(plan_on(with).cuda.wgmma_columns == 0, "few rows are bound by memory");
  }
  b.forward = problem_of(12000, 1280, 5120, 16);
  b.forward.dtype = b.forward.lora.dtype = DType::kFloat32;
  check(plan_on(with).cuda.wgmma_columns == 0, "fp32 keeps its precision, which wgmma has no products for");
  b.forward = problem_of(12000, 1280, 5120, 16);
  check(force_implementation("cuda_mma").ok(), "it can be left out by name");
  const LoraLinearBackwardPlan forced = plan_on(with);
  force_implementation("");
  check(forced.cuda.wgmma_columns == 0 && to_string(forced.cuda) == to_string(plan_on(kH100).cuda), to_string(forced));
}

void test_refusals() {
  LoraLinearPlan chosen;
  LoraLinearProblem p = problem_of(16, 64, 64, 4);
  p.dtype = DType::kBFloat16;
  Status s = plan(p, on_cuda(kT4), &chosen);
  check(s.code == StatusCode::kUnsupported && contains(s.text, "dtype: on sm_75 expected float16") &&
            contains(s.text, "bfloat16"),
        s.text);
  check(plan(p, on_cuda(kA10), &chosen).ok(), "sm_86 multiplies bfloat16");
  p.rows = int64_t{1} << 40;
  p.lora.groups = 0;
  p.lora.adapters = 100000;
  s = plan(p, on_cuda(device_of(70, 80, 1.4, 900)), &chosen);
  for (const char* part : {"architecture: expected sm_75", "rows of x: expected at most",
                           "adapters: expected at most 4096", "move them to the CPU", "lora_kernels.reference"})
    check(contains(s.text, part), std::string("every reason is listed, and the way out (") + part + "): " + s.text);
  p = problem_of(4, 8, 8, 2);
  p.dropout_p = 2;
  check(contains(plan(p, on_cuda(kH100), &chosen).text, "dropout_p"), "what is wrong anywhere is wrong on CUDA");

  DeviceInfo device;
  check(contains(cuda_device(0, &device).text, "built without its CUDA kernels"), "this library has none");
  check(plan(problem_of(4, 8, 8, 2), on_cuda(kH100), &chosen).ok(), "plans are made all the same");
  const Status run_status = run(chosen, LoraLinearArgs(), serial_executor());
  check(run_status.code == StatusCode::kUnsupported && contains(run_status.text, "LORA_KERNELS_CUDA=ON"),
        "and running one says how to build them: " + run_status.text);
}

Int8LoraLinearProblem int8_problem(int64_t rows, int64_t in, int64_t out, int64_t rank, int64_t adapters = 1) {
  Int8LoraLinearProblem p;
  const LoraLinearProblem same = problem_of(rows, in, out, rank, adapters);
  p.rows = rows;
  p.in_features = in;
  p.out_features = out;
  p.dtype = same.dtype;
  p.lora = same.lora;
  return p;
}

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

// Whisper large-v3: 20 heads of 64.
KvAttentionStepProblem kv_problem(int64_t rows, int64_t capacity, bool append) {
  KvAttentionStepProblem p;
  p.rows = p.cache_rows = rows;
  p.heads = 20;
  p.head_size = 64;
  p.capacity = capacity;
  p.dtype = p.cache_dtype = DType::kFloat16;
  p.append = append;
  return p;
}

KvAttentionStepProblem cross_problem(int64_t utterances, int64_t beams) {
  KvAttentionStepProblem p = kv_problem(utterances, 1500, false);
  p.rows = utterances * beams;
  p.slots = KvSlots::kPerRow;
  p.cache_dtype = DType::kInt8;
  p.scales = KvScales::kPerChannel;
  p.layout = KvLayout::kBlocked;
  return p;
}

KvAttentionStepPlan kv_plan(const KvAttentionStepProblem& p, const CudaDevice& device) {
  KvAttentionStepPlan chosen;
  const Status status = plan(p, on_cuda(device), &chosen);
  check(status.ok(), status.text);
  return chosen;
}

void test_kv_plans() {
  CudaDevice unknown;
  unknown.arch = 130;
  for (const CudaDevice& d : {kT4, kA100, kL4, kH200, unknown}) {
    const KvAttentionStepPlan own = kv_plan(kv_problem(16, 448, true), d);
    check(own.cuda.fused && own.cuda.splits == 1 && own.cuda.chunks == 1,
          "a step of self-attention is one launch: " + to_string(own));
    check(workspace_bytes(own) == 0, "which needs no memory: " + to_string(own));
    check(std::isfinite(own.cuda.predicted_us) && own.cuda.predicted_us > 0, to_string(own));
    const KvAttentionStepPlan alone = kv_plan(cross_problem(1, 5), d);
    check(alone.cuda.splits > 1, "few heads over many positions are split: " + to_string(alone));
    check(workspace_bytes(alone) >= alone.cuda.splits * 5 * 20 * 66 * 4, "partial sums have room: " + to_string(alone));
    check(int64_t{alone.cuda.splits} * alone.cuda.split_positions >= 1500 &&
              int64_t{alone.cuda.splits - 1} * alone.cuda.split_positions < 1500,
          "no split is empty: " + to_string(alone));
    check(to_string(alone) == to_string(kv_plan(cross_problem(1, 5), d)), "a plan is a function");
    // The beams of an utterance are one block's queries: K and V are read once, whoever shares them.
    const double one = kv_plan(cross_problem(16, 1), d).cuda.predicted_us;
    const KvAttentionStepPlan beams = kv_plan(cross_problem(16, 5), d);
    check(beams.cuda.grouped && beams.cuda.chunks == 1 && beams.cuda.predicted_us < 1.1 * one,
          "five beams take what one takes: " + to_string(beams));
    check(own.cuda.early_start == (d.arch >= 90), "kernels start early from sm_90 on");
  }
  KvAttentionStepProblem p = kv_problem(4, 448, true);
  p.slots = KvSlots::kPerPosition;
  check(kv_plan(p, kA100).cuda.places && !kv_plan(p, kA100).cuda.grouped, "a table is looked up");
  p.capacity = 20000;
  check(kv_plan(p, kA100).cuda.split_positions <= 4096, "in parts that fit shared memory");
  p = kv_problem(4, 448, true);
  p.cache_dtype = DType::kInt8;
  p.scales = KvScales::kPerPosition;
  check(!kv_plan(p, kA100).cuda.fused, "an int8 cache is appended to first");
  p = kv_problem(4, 448, true);
  p.tokens = 17;
  check(!kv_plan(p, kA100).cuda.fused && kv_plan(p, kA100).cuda.chunks == 2, "and so is a long prompt");
  p = kv_problem(4, 448, true);
  p.head_size = 80;
  check(kv_plan(p, kA100).cuda.groups == 2, "heads of more than 64 channels");

  KvAttentionStepPlan chosen;
  p = kv_problem(4, 448, true);
  p.dtype = DType::kBFloat16;
  p.head_size = 129;
  Status s = plan(p, on_cuda(kT4), &chosen);
  check(s.code == StatusCode::kUnsupported && contains(s.text, "q: on sm_75 expected float16") &&
            contains(s.text, "k_cache, v_cache: expected bfloat16, as q is, or int8, got float16") &&
            contains(s.text, "head size: expected at most 128, got 129") && contains(s.text, "move them to the CPU"),
        s.text);
  p = kv_problem(4, 8, true);
  p.tokens = 9;
  s = plan(p, on_cuda(kH100), &chosen);
  check(contains(s.text, "k, v: expected at most as many new tokens as the cache has positions, 8, got 9"), s.text);
  p = kv_problem(4, 8, true);
  p.slots = KvSlots::kPerRow;
  p.cache_rows = 0;
  check(contains(plan(p, on_cuda(kH100), &chosen).text, "got a cache without any"), "no cache rows at all");

  p = kv_problem(4, 448, true);
  p.weight_heads = 1;
  check(plan(p, on_cuda(kH100), &chosen).ok(), "weights of heads have a plan");
  KvAttentionStepArgs args;
  const int64_t head = 20;
  args.weight_heads = &head;
  s = run(chosen, args, serial_executor());
  check(s.code == StatusCode::kInvalidArgument && contains(s.text, "heads: entry 0 is 20, expected a head, 0 to 19"),
        "what the host knows is refused before the launch: " + s.text);
  check(plan(cross_problem(2, 5), on_cuda(kH100), &chosen).ok(), "blocked caches have a plan");
  args.k_cache = reinterpret_cast<void*>(uintptr_t{24});
  s = run(chosen, args, serial_executor());
  check(contains(s.text, "k_cache: expected an address that is a multiple of 16, got one of 8 beyond"), s.text);
  args.k_cache = nullptr;
  s = run(chosen, args, serial_executor());
  check(s.code == StatusCode::kUnsupported && contains(s.text, "LORA_KERNELS_CUDA=ON"), s.text);
}

void test_kv_pack_plans() {
  KvPackProblem p;
  p.cache_rows = 16;
  p.positions = 1500;
  p.heads = 20;
  p.head_size = 64;
  p.dtype = DType::kFloat16;
  KvPackPlan chosen;
  const Status planned = plan(p, on_cuda(kH100), &chosen);
  check(planned.ok(), planned.text);
  check(contains(to_string(chosen), "cuda sm_90"), to_string(chosen));
  check(workspace_bytes(chosen) == 0 && chosen.cuda.predicted_us > 0, to_string(chosen));
  check(contains(run(chosen, KvPackArgs(), serial_executor()).text, "LORA_KERNELS_CUDA=ON"), "nothing runs here");
  p.dtype = DType::kBFloat16;
  const Status s = plan(p, on_cuda(kT4), &chosen);
  check(s.code == StatusCode::kUnsupported && contains(s.text, "on sm_75 expected float16"), s.text);
}

// A decoder layer, as it is recorded: every stage is planned for the device, and none is left to the CPU.
void test_composite() {
  CompositeProblem step;
  Int8LoraLinearProblem linear = int8_problem(16, 1280, 1280, 16, 4);
  linear.has_norm = true;
  KvPackProblem pack;
  pack.cache_rows = 16;
  pack.positions = 1500;
  pack.heads = 20;
  pack.head_size = 64;
  pack.dtype = DType::kFloat16;
  Int8LoraLinearProblem choice = int8_problem(16, 1280, 51866, 0);
  choice.top_k = 1;
  step.stages = {pack, linear, kv_problem(16, 448, true), cross_problem(16, 1), choice};
  CompositePlan chosen;
  const Status planned = plan(step, on_cuda(kH100), &chosen);
  check(planned.ok() && chosen.threads == 1, planned.text);
  for (const StagePlan& stage : chosen.stages) {
    const std::string text = std::visit([](const auto& p) { return to_string(p); }, stage);
    check(contains(text, "cuda sm_90"), text);
    check(std::visit([](const auto& p) { return workspace_bytes(p); }, stage) <= workspace_bytes(chosen), text);
  }
  CompositeArgs args;
  args.stages = {KvPackArgs(), Int8LoraLinearArgs(), KvAttentionStepArgs(), KvAttentionStepArgs(),
                 Int8LoraLinearArgs()};
  const Status s = run(chosen, args, serial_executor());
  check(s.code == StatusCode::kUnsupported && contains(s.text, "kv_pack") && contains(s.text, "LORA_KERNELS_CUDA=ON"),
        "it stops at its first stage in a library without kernels: " + s.text);
}

}  // namespace

int main() {
  test_who_is_offered_what();
  test_paths();
  test_unknown_devices();
  test_workspaces();
  test_one_reading_of_dy();
  test_wgmma();
  test_wgmma_of_gradients();
  test_t_beside_the_product();
  test_refusals();
  test_int8_paths();
  test_kv_plans();
  test_kv_pack_plans();
  test_composite();
  if (failures) std::printf("%d checks failed\n", failures);
  if (!failures) std::printf("all checks passed\n");
  return failures != 0;
}

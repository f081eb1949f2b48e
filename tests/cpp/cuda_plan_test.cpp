// What a plan says of CUDA devices that are not here: who is offered which implementation, which path it takes, and
// that every reason against is listed. Nothing is launched. lora_linear's plans; cuda_plan_*.cpp have the others'.
#include <cmath>

#include "cuda_devices.h"
#include "lora_kernels/kv_pack.h"

using namespace lora_kernels;

namespace {

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
    for (int64_t rows : {1, 8, 16}) {  // x of more rows than W has in a block takes more of the way from L2
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
  // In a cluster each block makes a part of t, where A would take as much of the way from L2 as W does.
  const LoraLinearPlan together = plan_of(problem_of(1, 1280, 5120, 16), with_clusters(kH200));
  check(together.cuda.t_in_blocks && together.cuda.cluster > 1 && together.cuda.splits == 1, to_string(together));
  check(contains(to_string(together), "cluster=" + std::to_string(together.cuda.cluster)), to_string(together));
  check(plan_of(problem_of(1, 1280, 5120, 16), kH200).cuda.cluster == 1, "not without machine code for it");
  check(plan_of(problem_of(1, 1280, 5120, 0), with_clusters(kH200)).cuda.cluster == 1, "nor without an adapter");
  for (const int64_t rows : {1, 32})
    check(plan_of(problem_of(rows, 1280, 1280, 16), with_clusters(kH200)).cuda.predicted_us <
              1.1 * plan_of(problem_of(rows, 1280, 1280, 0), with_clusters(kH200)).cuda.predicted_us,
          "an adapter is a tenth at most");
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
  const auto most = plan_of_gradients(problem_of(65535 * 512, 1280, 1280, 16), kH100, false);
  check(most.cuda.dy_once && most.cuda.row_splits == 65535,
        "as many rows as a grid has blocks for: " + to_string(most));
  check(!plan_of_gradients(problem_of(65535 * 512 + 1, 1280, 1280, 16), kH100, false).cuda.dy_once, "and no more");
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
  const CudaDevice with = with_wgmma(kH100);
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
  LoraLinearProblem p = problem_of(4096, 5120, 5120, 0);
  check(plan_of(p, with).cuda.wgmma_columns == 256, "much depth: a wide tile reads less of shared memory");
  p = problem_of(4096, 1280, 5120, 0);
  check(plan_of(p, with).cuda.wgmma_columns == 128, "little depth: two narrow ones hide each other's ends");
  p = problem_of(12000, 1280, 5120, 16);
  p.dtype = p.lora.dtype = DType::kFloat32;
  check(plan_of(p, with).cuda.wgmma_columns == 0, "fp32 keeps its precision, which wgmma has no products for");
  check(force_implementation("cuda_mma").ok(), "it can be left out by name");
  p = problem_of(12000, 1280, 5120, 16);
  const LoraLinearPlan forced = plan_of(p, with);
  KvPackPlan other;
  KvPackProblem pack;
  pack.cache_rows = pack.positions = pack.heads = pack.head_size = 8;
  pack.dtype = DType::kFloat16;
  check(plan(pack, on_cuda(with), &other).ok(), "which other operators take for their CUDA kernels");
  LoraLinearPlan refused;
  check(!plan(p, DeviceInfo(), &refused).ok(), "and a CPU refuses");
  force_implementation("");
  check(forced.cuda.wgmma_columns == 0 && to_string(forced) == to_string(plan_of(p, kH100)), to_string(forced));
}

// t beside the product: in blocks of which each multiprocessor has two, and the product's time is about the base's.
void test_t_beside_the_product() {
  const CudaDevice device = with_wgmma(kH200);
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
  const CudaDevice with = with_wgmma(kH100);
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
  p.lora.max_rank = p.lora.total_rank = 65535 * 32;
  check(plan(p, on_cuda(kH100), &chosen).ok(), "as many rank rows as a grid has tiles of");
  p.lora.max_rank = p.lora.total_rank = 65535 * 32 + 1;
  s = plan(p, on_cuda(kH100), &chosen);
  check(s.code == StatusCode::kUnsupported && contains(s.text, "sum to at most 2097120") && contains(s.text, "2097121"),
        s.text);
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
  test_int8_plans();
  test_kv_plans();
  if (failures) std::printf("%d checks failed\n", failures);
  if (!failures) std::printf("all checks passed\n");
  return failures != 0;
}

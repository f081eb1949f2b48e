// The TensorRT plugins without TensorRT: what its builder and its runtime would ask, asked here. Operands are in the
// host's memory: built with the emulation, the device is an emulated H100 and launches end in the CUDA kernels' own
// source; without it, a CPU and its implementations, which all three operators have.
#include "lora_kernels/int8_lora_linear.h"
#include "lora_kernels/kv_attention_step.h"
#include "tensorrt_harness.h"

using lora_kernels::Status;
namespace plugins = lora_kernels::tensorrt;

namespace lora_kernels::tensorrt {

Status operands_device(DeviceInfo* device) {
#ifdef LORA_KERNELS_EMULATION
  return cuda_device(0, device);
#else
  *device = host_device();
  return {};
#endif
}

int copies = 0;
Status copy_on_stream(void* to, const void* from, size_t bytes, void*) {
  ++copies;
  std::memcpy(to, from, bytes);
  return {};
}

}  // namespace lora_kernels::tensorrt

namespace {

// ---- What a builder asks.

void creators_are_those_of_the_nodes() {
  int32_t count = 0;
  getCreators(count);
  check(count == 10, "ten creators");
  for (const char* name :
       {"LoraLinear", "LoraLinearGelu", "LoraLinearSilu", "Int8LoraLinear", "Int8LoraLinearGelu", "Int8LoraLinearSilu",
        "KvAttentionStep", "KvAttentionStepInt8", "KvAttentionFixed", "KvAttentionFixedInt8"}) {
    IPluginCreatorV3One* one = creator(name);
    check(one != nullptr, std::string(name) + " has a creator");
    check(one && std::string(one->getPluginNamespace()) == "lora_kernels", "namespace");
    check(one && std::string(one->getPluginVersion()) == "1", "version");
  }
}

void bad_fields_are_refused() {
  const auto refused = [](Attributes a, const std::string& what, std::vector<PluginField> others = {}) {
    IPluginV3* made = a.make("LoraLinear", std::move(others));
    check(made == nullptr, what);
    delete made;
  };
  Attributes missing = linear_attributes(false);
  missing.integers.erase("has_lora");
  refused(missing, "a missing field");
  Attributes unknown = linear_attributes(false);
  unknown.integers["has_norm"] = 1;
  refused(unknown, "an unknown field");
  Attributes beyond = linear_attributes(false);
  beyond.integers["has_bias"] = 2;
  refused(beyond, "a flag that is 2");
  Attributes typed = linear_attributes(false);
  typed.integers.erase("has_bias");
  typed.numbers["has_bias"] = 1;
  refused(typed, "a flag of another type");
  Attributes empty = linear_attributes(false);
  empty.integers.erase("has_bias");
  refused(empty, "a field without data", {{"has_bias", nullptr, PluginFieldType::kINT32, 1}});
  Attributes scale = kv_attributes(true);
  scale.numbers["scale"] = NAN;
  check(scale.make("KvAttentionStep") == nullptr, "a scale that is no number");
  check(creator("LoraLinear")->createPlugin("layer", nullptr, TensorRTPhase::kBUILD) == nullptr, "no fields at all");
}

void output_shapes_follow_the_inputs() {
  Expressions expressions;
  Size sizes[11][4];
  DimsExprs in[11], out[5];
  for (int i = 0; i < 11; ++i) {
    in[i].nbDims = i == 0 ? 3 : 2;
    for (int d = 0; d < 4; ++d) in[i].d[d] = &sizes[i][d];
  }
  IPluginV3* linear = linear_attributes(false).make("LoraLinear");
  check(build(linear)->getOutputShapes(in, 9, nullptr, 0, out, 1, expressions) == 0, "LoraLinear: shapes");
  check(out[0].nbDims == 3 && out[0].d[0] == in[0].d[0] && out[0].d[1] == in[0].d[1] && out[0].d[2] == in[1].d[0],
        "LoraLinear: y is [..., N]");
  check(build(linear)->getOutputShapes(in, 8, nullptr, 0, out, 1, expressions) != 0, "a missing input");
  delete linear;
  IPluginV3* int8 = linear_attributes(true).make("Int8LoraLinearGelu");
  build(int8)->getOutputShapes(in, 11, nullptr, 0, out, 1, expressions);
  check(out[0].d[2] == in[2].d[0], "Int8LoraLinear: N is the number of scales");
  delete int8;
  for (int i = 0; i < 11; ++i) in[i].nbDims = 4;
  IPluginV3* kv = kv_attributes(true).make("KvAttentionStepInt8");
  check(build(kv)->getNbOutputs() == 5, "KvAttentionStepInt8: outputs");
  check(build(kv)->getOutputShapes(in, 9, nullptr, 0, out, 5, expressions) == 0, "KvAttentionStepInt8: shapes");
  const int like[] = {0, 3, 4, 5, 6};
  for (int i = 0; i < 5; ++i)
    for (int d = 0; d < 4; ++d) check(out[i].d[d] == in[like[i]].d[d], "KvAttentionStepInt8: a cache as it came");
  delete kv;
}

const DataType kTypes[] = {DataType::kFLOAT, DataType::kHALF,  DataType::kBF16,
                           DataType::kINT8,  DataType::kINT32, DataType::kINT64};

// Every type at every position, all others right: accepted exactly where `allowed` says.
void format_grid(const std::string& name, Attributes attributes, const std::vector<DataType>& right, int inputs,
                 const std::function<bool(int, DataType)>& allowed) {
  IPluginV3* plugin = attributes.make(name);
  const int total = static_cast<int>(right.size());
  std::vector<PluginTensorDesc> tensors;
  for (const DataType type : right) tensors.push_back(tensor(type, {1}));
  for (int position = 0; position < total; ++position) {
    for (const DataType type : kTypes) {
      auto grid = profile(tensors, tensors);
      grid[position].desc.type = type;
      const bool accepted = build(plugin)->supportsFormatCombination(position, grid.data(), inputs, total - inputs);
      check(accepted == allowed(position, type),
            name + ": type " + std::to_string(static_cast<int>(type)) + " at position " + std::to_string(position));
      grid[position].desc.type = right[position];
      grid[position].desc.format = TensorFormat::kCHW32;
      check(!build(plugin)->supportsFormatCombination(position, grid.data(), inputs, total - inputs),
            name + ": a format that is not linear");
    }
  }
  delete plugin;
}

bool floating(DataType type) { return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16; }

void formats() {
  const DataType f = DataType::kFLOAT, h = DataType::kHALF, i = DataType::kINT32, b = DataType::kINT8;
  format_grid("LoraLinear", linear_attributes(false), {h, h, h, h, h, f, i, i, h, h}, 9, [&](int at, DataType type) {
    if (at == 0 || at == 3) return floating(type);
    if (at == 2) return type == h || type == f;
    return type == (at == 5 ? f : at == 6 || at == 7 ? i : h);
  });
  format_grid("Int8LoraLinear", linear_attributes(true), {h, i, f, f, h, h, f, i, i, h, f, h}, 11,
              [&](int at, DataType type) {
                if (at == 0 || at == 4) return floating(type);
                if (at == 3) return type == h || type == f;
                return type == (at == 1 || at == 7 || at == 8 ? i : at == 2 || at == 6 || at == 10 ? f : h);
              });
  format_grid("KvAttentionStepInt8", kv_attributes(true), {h, h, h, b, b, f, f, i, i, h, b, b, f, f}, 9,
              [&](int at, DataType type) {
                if (at == 0) return floating(type);
                const DataType right[] = {h, h, h, b, b, f, f, i, i, h, b, b, f, f};
                return type == right[at];
              });
}

void lora_linear_runs() {
  for (const bool gelu : {false, true}) {
    Linear l;
    Call call = lora_linear_call(&l);
    const std::string failure = run(gelu ? "LoraLinearGelu" : "LoraLinear", linear_attributes(false), &call);
    check(failure.empty(), "LoraLinear: " + failure);
    const auto base = [&](int64_t m, int64_t j) {
      double sum = 0;
      for (int64_t i = 0; i < l.k; ++i) sum += static_cast<double>(l.x[m * l.k + i]) * l.weight[j * l.k + i];
      return sum;
    };
    l.compare("LoraLinear", base, gelu);
  }
  // Placeholders: what is flagged as absent is not looked at, whatever its size.
  Linear l;
  Call call = lora_linear_call(&l);
  const std::vector<float> zero = {0};
  call.descriptions[2] = call.descriptions[8] = tensor(DataType::kFLOAT, {1});
  call.inputs[2] = call.inputs[8] = zero.data();
  Attributes none = linear_attributes(false);
  for (const char* flag : {"has_bias", "has_lora", "has_residual"}) none.integers[flag] = 0;
  check(run("LoraLinear", none, &call).empty(), "LoraLinear: placeholders");
  double sum = 0;
  for (int64_t i = 0; i < l.k; ++i) sum += static_cast<double>(l.x[i]) * l.weight[i];
  check(std::abs(l.y[0] - sum) < 1e-5, "LoraLinear: the base alone");
}

void shapes_that_do_not_fit_are_refused() {
  Linear l;
  Call call = lora_linear_call(&l);
  call.descriptions[1] = tensor(DataType::kFLOAT, {l.n, l.k + 1});
  check(run("LoraLinear", linear_attributes(false), &call) == "not configured", "a weight of another depth");
  call = lora_linear_call(&l);
  call.descriptions[4] = tensor(DataType::kFLOAT, {l.rank, l.n + 1});
  check(run("LoraLinear", linear_attributes(false), &call) == "not configured", "an adapter of another shape");
  call = lora_linear_call(&l);
  call.descriptions[7] = tensor(DataType::kINT32, {5});
  check(contains(run("LoraLinear", linear_attributes(false), &call), "adapter_ids"), "ids that do not divide the rows");

  // An engine that was built for less than what comes: the workspace is too small, and nothing is written.
  call = lora_linear_call(&l);
  IPluginV3* plugin = linear_attributes(false).make("LoraLinear");
  const auto small = profile(call.descriptions, call.descriptions);
  build(plugin)->configurePlugin(small.data(), 9, nullptr, 1);
  for (const int i : {0, 8}) call.descriptions[i].dims.d[1] = 4000;
  Recorder recorder;
  Context context;
  context.recorder = &recorder;
  IPluginV3* attached = runtime(plugin)->attachToContext(&context);
  check(runtime(attached)->onShapeChange(call.descriptions.data(), 9, nullptr, 1) != 0, "more rows than planned for");
  check(contains(recorder.text, "profile"), "the profile is named: " + recorder.text);
  delete attached;
  delete plugin;
}

// Any number of rows of a profile runs in the workspace that was asked for the profile.
void a_profile_covers_its_range() {
  Linear l;
  Call most = lora_linear_call(&l);
  for (const int i : {0, 8}) most.descriptions[i].dims.d[1] = 700;
  Call least = lora_linear_call(&l);
  for (const int i : {0, 8}) least.descriptions[i].dims.d[1] = 1;
  IPluginV3* plugin = linear_attributes(false).make("LoraLinear");
  const auto ranges = profile(least.descriptions, most.descriptions);
  check(build(plugin)->configurePlugin(ranges.data(), 9, nullptr, 1) == 0, "a profile");
  for (int64_t tokens = 1; tokens <= 700; tokens += tokens < 40 ? 1 : 33) {
    for (const int i : {0, 8}) most.descriptions[i].dims.d[1] = tokens;
    check(runtime(plugin)->onShapeChange(most.descriptions.data(), 9, nullptr, 1) == 0,
          "tokens of the profile: " + std::to_string(tokens));
  }
  delete plugin;
}

// On a CUDA device where the operator has kernels, and on a CPU.
void int8_lora_linear_runs() {
  lora_kernels::DeviceInfo device;
  plugins::operands_device(&device);
  lora_kernels::Int8LoraLinearProblem problem;
  problem.rows = problem.in_features = problem.out_features = 1;
  lora_kernels::Int8LoraLinearPlan plan;
  if (device.cuda.arch && !lora_kernels::plan(problem, device, &plan).ok()) return;
  Linear l;
  std::vector<int8_t> q(l.n * l.k);
  std::vector<float> weight_scales(l.n);
  for (int64_t i = 0; i < l.n * l.k; ++i) q[i] = static_cast<int8_t>((i * 37 + 11) % 255 - 127);
  for (int64_t j = 0; j < l.n; ++j) weight_scales[j] = 0.002f * static_cast<float>(j % 5 + 1);
  const int64_t bytes = lora_kernels::int8_packed_bytes(l.n, l.k);
  auto packed = Buffer<uint8_t>::aligned(bytes);
  lora_kernels::int8_pack(q.data(), weight_scales.data(), l.n, l.k, packed.get());
  const std::vector<float> x_scale = {0};
  const auto make = [&](int64_t words) {
    Call call;
    call.operand(DataType::kFLOAT, {l.batch, l.tokens, l.k}, l.x.data());
    call.operand(DataType::kINT32, {words}, packed.get());
    call.operand(DataType::kFLOAT, {l.n}, weight_scales.data());
    call.operand(DataType::kFLOAT, {l.n}, l.bias.data());
    l.bank_into(&call);
    call.operand(DataType::kFLOAT, {l.batch, l.tokens, l.n}, l.residual.data());
    call.operand(DataType::kFLOAT, {1}, x_scale.data());
    call.outputs = {l.y.data()};
    return call;
  };
  Call call = make(bytes / 4);
  const std::string failure = run("Int8LoraLinearGelu", linear_attributes(true), &call);
  check(failure.empty(), "Int8LoraLinear: " + failure);
  const auto base = [&](int64_t m, int64_t j) {
    float amax = 0;
    for (int64_t i = 0; i < l.k; ++i) amax = std::fmax(amax, std::fabs(l.x[m * l.k + i]));
    const float inverse = 127.0f / amax;
    int64_t sum = 0;
    for (int64_t i = 0; i < l.k; ++i)
      sum += static_cast<int64_t>(std::nearbyint(l.x[m * l.k + i] * inverse)) * q[j * l.k + i];
    return static_cast<double>(sum) * (amax / 127.0f * weight_scales[j]);
  };
  l.compare("Int8LoraLinear", base, true);
  call = make(bytes / 4 - 1);
  check(run("Int8LoraLinear", linear_attributes(true), &call) == "not configured", "a packed weight of another size");
}

#ifndef LORA_KERNELS_EMULATION  // a CPU checks what the caches' rows hold, and has every kind of cache

void kv_attention_step_runs() {
  Attention copied;
  const std::vector<float> before = copied.k_cache;
  Call call = copied.call();
  const int copies = plugins::copies;
  std::string failure = run("KvAttentionStep", kv_attributes(true), &call);
  check(failure.empty(), "KvAttentionStep: " + failure);
  check(copied.k_cache == before && plugins::copies == copies + 2, "KvAttentionStep: the input caches stay");
  copied.compare(copied.k_cache, copied.v_cache, "KvAttentionStep");

  Attributes in_place = kv_attributes(true);
  in_place.integers["in_place"] = 1;
  failure = run("KvAttentionStep", in_place, &call);
  check(contains(failure, "one buffer"), "KvAttentionStep: two addresses in place: " + failure);

  Attention shared;
  const std::vector<float> k_before = shared.k_cache, v_before = shared.v_cache;
  call = shared.call();
  call.outputs[1] = shared.k_cache.data();
  call.outputs[2] = shared.v_cache.data();
  failure = run("KvAttentionStep", in_place, &call);
  check(failure.empty(), "KvAttentionStep in place: " + failure);
  shared.k_out = shared.k_cache;
  shared.v_out = shared.v_cache;
  shared.compare(k_before, v_before, "KvAttentionStep in place");

  IPluginV3* plugin = in_place.make("KvAttentionStep");
  const int aliased[] = {build(plugin)->getAliasedInput(0), build(plugin)->getAliasedInput(1),
                         build(plugin)->getAliasedInput(2)};
  check(aliased[0] == -1 && aliased[1] == 3 && aliased[2] == 4, "KvAttentionStep: what is aliased");
  delete plugin;

  // What the core refuses at run time arrives in the recorder with its text.
  copied.lengths = {0, 6};
  call = copied.call();
  failure = run("KvAttentionStep", kv_attributes(true), &call);
  check(contains(failure, "lengths"), "KvAttentionStep: a full cache: " + failure);
}

void kv_attention_fixed_runs() {
  // The same caches, per row, quantized by hand with one scale per channel: every value is 2 * q.
  const int64_t rows = 2, heads = 2, size = 4, cache_rows = 2, capacity = 5;
  std::vector<int8_t> cache(cache_rows * heads * capacity * size);
  for (size_t i = 0; i < cache.size(); ++i) cache[i] = static_cast<int8_t>(static_cast<int>(i * 7 % 5) - 2);
  const std::vector<float> scales(cache_rows * heads * size, 2.0f), q(rows * heads * size, 0.0f);
  const std::vector<int32_t> lengths = {5, 2}, slots = {1, 0};
  std::vector<float> out(q.size(), NAN);
  Call call;
  const std::vector<int64_t> cached = {cache_rows, heads, capacity, size}, factors = {cache_rows, heads, 1, size};
  call.operand(DataType::kFLOAT, {rows, 1, heads, size}, q.data());
  call.operand(DataType::kINT8, cached, cache.data());
  call.operand(DataType::kINT8, cached, cache.data());
  call.operand(DataType::kFLOAT, factors, scales.data());
  call.operand(DataType::kFLOAT, factors, scales.data());
  call.operand(DataType::kINT32, {rows}, lengths.data());
  call.operand(DataType::kINT32, {rows, 1}, slots.data());
  call.outputs = {out.data()};
  const std::string failure = run("KvAttentionFixedInt8", kv_attributes(false), &call);
  check(failure.empty(), "KvAttentionFixedInt8: " + failure);
  for (int64_t i = 0; i < rows; ++i)  // q is zero: the mean of the valid positions
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t d = 0; d < size; ++d) {
        float sum = 0;
        for (int64_t p = 0; p < lengths[i]; ++p)
          sum += 2.0f * cache[((slots[i] * heads + h) * capacity + p) * size + d];
        check(std::fabs(out[(i * heads + h) * size + d] - sum / lengths[i]) < 1e-4f, "KvAttentionFixedInt8: the mean");
      }
}

#else

// An operator without CUDA kernels is refused while the engine is built, not when it runs.
void what_has_no_kernels_is_refused() {
  lora_kernels::DeviceInfo device;
  plugins::operands_device(&device);
  lora_kernels::KvAttentionStepProblem problem;
  problem.rows = problem.cache_rows = problem.tokens = problem.heads = 1;
  problem.head_size = problem.capacity = 8;
  lora_kernels::KvAttentionStepPlan plan;
  const bool here = lora_kernels::plan(problem, device, &plan).ok();
  std::vector<float> memory(64, 0.0f);
  const std::vector<int32_t> zeros = {0};
  Call call;
  for (int i = 0; i < 3; ++i)
    call.operand(DataType::kFLOAT, i ? std::vector<int64_t>{1, 1, 8, 8} : std::vector<int64_t>{1, 1, 1, 8},
                 memory.data());
  call.descriptions[1] = call.descriptions[2] = tensor(DataType::kFLOAT, {1, 1, 8, 8});
  call.operand(DataType::kINT32, {1}, zeros.data());
  call.operand(DataType::kINT32, {1, 1}, zeros.data());
  call.outputs = {memory.data()};
  const std::string failure = run("KvAttentionFixed", kv_attributes(false), &call);
  check((failure == "not configured") == !here, "KvAttentionFixed on CUDA: " + failure);
}

#endif

}  // namespace

int main() {
  creators_are_those_of_the_nodes();
  bad_fields_are_refused();
  output_shapes_follow_the_inputs();
  formats();
  lora_linear_runs();
  shapes_that_do_not_fit_are_refused();
  a_profile_covers_its_range();
  int8_lora_linear_runs();
#ifndef LORA_KERNELS_EMULATION
  kv_attention_step_runs();
  kv_attention_fixed_runs();
#else
  what_has_no_kernels_is_refused();
#endif
  if (failures == 0) std::printf("all checks passed\n");
  return failures != 0;
}

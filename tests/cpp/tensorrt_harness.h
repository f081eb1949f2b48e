// What TensorRT would bring to its plugins: expressions of sizes, contexts, attributes, a call from builder to enqueue;
// and the operands of the tests with what they should give.
#pragma once

#include <cmath>
#include <cstring>
#include <functional>
#include <map>

#include "check.h"
#include "plugin.h"

using namespace nvinfer1;

extern "C" IPluginCreatorInterface* const* getCreators(int32_t& count);

namespace {

// Expressions of sizes: a plugin hands them on, so their addresses say which is which.
class Size : public IDimensionExpr {
 public:
  Size() { mImpl = nullptr; }
  ~Size() noexcept override = default;
};
class Expressions : public IExprBuilder {
 public:
  Expressions() { mImpl = nullptr; }
  ~Expressions() noexcept override = default;
};

struct Recorder : IErrorRecorder {
  std::string text;
  int32_t getNbErrors() const noexcept override { return 0; }
  ErrorCode getErrorCode(int32_t) const noexcept override { return ErrorCode::kSUCCESS; }
  ErrorDesc getErrorDesc(int32_t) const noexcept override { return text.c_str(); }
  bool hasOverflowed() const noexcept override { return false; }
  void clear() noexcept override {}
  bool reportError(ErrorCode, ErrorDesc description) noexcept override {
    text = description;
    return true;
  }
  RefCount incRefCount() noexcept override { return 1; }
  RefCount decRefCount() noexcept override { return 1; }
};

struct Context : IPluginResourceContext {
  Recorder* recorder = nullptr;
  IGpuAllocator* getGpuAllocator() const noexcept override { return nullptr; }
  IErrorRecorder* getErrorRecorder() const noexcept override { return recorder; }
};

IPluginCreatorV3One* creator(const std::string& name) {
  int32_t count = 0;
  IPluginCreatorInterface* const* all = getCreators(count);
  for (int32_t i = 0; i < count; ++i) {
    auto* candidate = static_cast<IPluginCreatorV3One*>(all[i]);
    if (name == candidate->getPluginName()) return candidate;
  }
  return nullptr;
}

// Attributes as a parser hands them over.
struct Attributes {
  std::map<std::string, int32_t> integers;
  std::map<std::string, float> numbers;

  IPluginV3* make(const std::string& name, std::vector<PluginField> others = {}) {
    for (auto& [field, value] : integers) others.emplace_back(field.c_str(), &value, PluginFieldType::kINT32, 1);
    for (auto& [field, value] : numbers) others.emplace_back(field.c_str(), &value, PluginFieldType::kFLOAT32, 1);
    others.emplace_back("plugin_version", "1", PluginFieldType::kCHAR, 1);
    const PluginFieldCollection collection{static_cast<int32_t>(others.size()), others.data()};
    return creator(name)->createPlugin("layer", &collection, TensorRTPhase::kBUILD);
  }
};

Attributes linear_attributes(bool int8) {
  Attributes a{{{"has_bias", 1}, {"has_lora", 1}, {"has_residual", 1}}, {}};
  if (int8) a.integers["has_x_scale"] = 0;
  return a;
}
Attributes kv_attributes(bool append) {
  Attributes a{{{"has_slots", 1}}, {{"scale", 0.3f}}};
  if (append) a.integers["in_place"] = 0;
  return a;
}

template <class Capability>
Capability* as(IPluginV3* plugin, PluginCapabilityType type) {
  return static_cast<Capability*>(plugin->getCapabilityInterface(type));
}
IPluginV3OneBuildV2* build(IPluginV3* p) { return as<IPluginV3OneBuildV2>(p, PluginCapabilityType::kBUILD); }
IPluginV3OneRuntime* runtime(IPluginV3* p) { return as<IPluginV3OneRuntime>(p, PluginCapabilityType::kRUNTIME); }

PluginTensorDesc tensor(DataType type, const std::vector<int64_t>& sizes) {
  PluginTensorDesc d{};
  d.type = type;
  d.format = TensorFormat::kLINEAR;
  d.dims.nbDims = static_cast<int32_t>(sizes.size());
  for (size_t i = 0; i < sizes.size(); ++i) d.dims.d[i] = sizes[i];
  return d;
}

std::vector<DynamicPluginTensorDesc> profile(const std::vector<PluginTensorDesc>& least,
                                             const std::vector<PluginTensorDesc>& most) {
  std::vector<DynamicPluginTensorDesc> all(least.size());
  for (size_t i = 0; i < least.size(); ++i) {
    all[i].desc = most[i];
    all[i].min = least[i].dims;
    all[i].opt = all[i].max = most[i].dims;
  }
  return all;
}

// ---- One call, as an engine makes it: built, kept, read again, attached, run.

struct Call {
  std::vector<PluginTensorDesc> descriptions;
  std::vector<const void*> inputs;
  std::vector<void*> outputs;

  void operand(DataType type, const std::vector<int64_t>& sizes, const void* data) {
    descriptions.push_back(tensor(type, sizes));
    inputs.push_back(data);
  }
};

// The text of what went wrong; empty: all went well. `least`: the smallest sizes of the profile, the call's otherwise.
std::string run(const std::string& name, Attributes attributes, Call* call,
                const std::vector<PluginTensorDesc>& least = {}) {
  const int32_t inputs = static_cast<int32_t>(call->inputs.size());
  const int32_t outputs = static_cast<int32_t>(call->outputs.size());
  IPluginV3* plugin = attributes.make(name);
  if (!plugin) return "not created";
  const auto ranges = profile(least.empty() ? call->descriptions : least, call->descriptions);
  if (build(plugin)->configurePlugin(ranges.data(), inputs, nullptr, outputs) != 0) {
    delete plugin;
    return "not configured";
  }
  const size_t bytes = build(plugin)->getWorkspaceSize(ranges.data(), inputs, nullptr, outputs);
  // What the engine keeps is copied out, as into a file, and the plugin is gone before another is made of it.
  const PluginFieldCollection* kept = runtime(plugin)->getFieldsToSerialize();
  std::vector<std::string> names;
  std::vector<std::vector<char>> values;
  std::vector<PluginField> fields;
  for (int32_t i = 0; i < kept->nbFields; ++i) {
    const PluginField& field = kept->fields[i];
    const char* data = static_cast<const char*>(field.data);
    names.emplace_back(field.name);
    values.emplace_back(data, data + (field.type == PluginFieldType::kINT64 ? 8 : 4));
    fields.push_back(field);
  }
  delete plugin;
  for (size_t i = 0; i < fields.size(); ++i) {
    fields[i].name = names[i].c_str();
    fields[i].data = values[i].data();
  }
  const PluginFieldCollection collection{static_cast<int32_t>(fields.size()), fields.data()};
  IPluginV3* read = creator(name)->createPlugin("layer", &collection, TensorRTPhase::kRUNTIME);
  if (!read) return "not created from what was kept";
  Recorder recorder;
  Context context;
  context.recorder = &recorder;
  IPluginV3* attached = runtime(read)->attachToContext(&context);
  delete read;
  auto workspace = Buffer<uint8_t>::aligned(static_cast<int64_t>(bytes));
  std::vector<PluginTensorDesc> results(outputs);
  const PluginTensorDesc* in = call->descriptions.data();
  std::string failure;
  if (runtime(attached)->onShapeChange(in, inputs, results.data(), outputs) != 0 ||
      runtime(attached)->enqueue(in, results.data(), call->inputs.data(), call->outputs.data(), workspace.get(),
                                 nullptr) != 0)
    failure = recorder.text.empty() ? "failed without a text" : recorder.text;
  delete attached;
  return failure;
}

std::vector<float> normals(int64_t count, float factor = 1) {
  std::vector<float> values(count);
  for (float& v : values) v = factor * normal();
  return values;
}

struct Linear {
  int64_t batch = 2, tokens = 3, k = 37, n = 53, ranks[3] = {4, 0, 9}, rank = 13;
  std::vector<float> x, weight, bias, a, b, residual, scales = {0.5f, 1.0f, 2.0f};
  std::vector<int32_t> offsets = {0, 4, 4, 13}, ids = {2, -1};
  std::vector<float> y;

  Linear()
      : x(normals(batch * tokens * k)),
        weight(normals(n * k, 0.2f)),
        bias(normals(n)),
        a(normals(rank * k, 0.2f)),
        b(normals(rank * n)),
        residual(normals(batch * tokens * n)),
        y(batch * tokens * n, NAN) {}

  void bank_into(Call* call) const {
    call->operand(DataType::kFLOAT, {rank, k}, a.data());
    call->operand(DataType::kFLOAT, {rank, n}, b.data());
    call->operand(DataType::kFLOAT, {3}, scales.data());
    call->operand(DataType::kINT32, {4}, offsets.data());
    call->operand(DataType::kINT32, {batch}, ids.data());
  }

  // act(base + bias + LoRA) + residual of one element, in double precision.
  double expected(int64_t m, int64_t j, double base, bool gelu) const {
    double z = base + bias[j];
    const int32_t id = ids[m / tokens];
    for (int32_t r = id < 0 ? 0 : offsets[id]; id >= 0 && r < offsets[id + 1]; ++r) {
      double t = 0;
      for (int64_t i = 0; i < k; ++i) t += static_cast<double>(x[m * k + i]) * a[r * k + i];
      z += scales[id] * t * b[r * n + j];
    }
    if (gelu) z *= 0.5 * (1 + std::erf(z / std::sqrt(2.0)));
    return z + residual[m * n + j];
  }

  void compare(const std::string& what, const std::function<double(int64_t, int64_t)>& base, bool gelu) const {
    double worst = 0;
    for (int64_t m = 0; m < batch * tokens; ++m)
      for (int64_t j = 0; j < n; ++j) {
        const double error = std::abs(y[m * n + j] - expected(m, j, base(m, j), gelu));
        worst = error > worst || std::isnan(error) ? error : worst;
      }
    check(worst < 2e-5, what + ": error " + std::to_string(worst));
  }
};

Call lora_linear_call(Linear* l) {
  Call call;
  call.operand(DataType::kFLOAT, {l->batch, l->tokens, l->k}, l->x.data());
  call.operand(DataType::kFLOAT, {l->n, l->k}, l->weight.data());
  call.operand(DataType::kFLOAT, {l->n}, l->bias.data());
  l->bank_into(&call);
  call.operand(DataType::kFLOAT, {l->batch, l->tokens, l->n}, l->residual.data());
  call.outputs = {l->y.data()};
  return call;
}

struct Attention {
  int64_t rows = 2, tokens = 2, heads = 3, size = 8, cache_rows = 3, capacity = 7;
  std::vector<float> q, k, v, k_cache, v_cache, k_out, v_out, out;
  std::vector<int32_t> lengths = {0, 4}, slots;

  Attention()
      : q(normals(rows * tokens * heads * size)),
        k(normals(rows * tokens * heads * size)),
        v(normals(rows * tokens * heads * size)),
        k_cache(normals(cache_rows * heads * capacity * size)),
        v_cache(normals(cache_rows * heads * capacity * size)),
        k_out(k_cache.size(), NAN),
        v_out(v_cache.size(), NAN),
        out(q.size(), NAN),
        slots({2, 2, 2, 2, 2, 2, 2, 1, 2, 0, 1, 1, 1, 1}) {}

  Call call() {
    Call c;
    const std::vector<int64_t> now = {rows, tokens, heads, size}, cached = {cache_rows, heads, capacity, size};
    c.operand(DataType::kFLOAT, now, q.data());
    c.operand(DataType::kFLOAT, now, k.data());
    c.operand(DataType::kFLOAT, now, v.data());
    c.operand(DataType::kFLOAT, cached, k_cache.data());
    c.operand(DataType::kFLOAT, cached, v_cache.data());
    c.operand(DataType::kINT32, {rows}, lengths.data());
    c.operand(DataType::kINT32, {rows, capacity}, slots.data());
    c.outputs = {out.data(), k_out.data(), v_out.data()};
    return c;
  }

  int64_t index(int64_t row, int64_t h, int64_t p) const { return ((row * heads + h) * capacity + p) * size; }

  // Caches after the append; then attention over them, in double precision.
  void compare(std::vector<float> keys, std::vector<float> values, const std::string& what) const {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t h = 0; h < heads; ++h)
          for (int64_t d = 0; d < size; ++d) {
            const int64_t p = lengths[i] + t, from = ((i * tokens + t) * heads + h) * size + d;
            keys[index(slots[i * capacity + p], h, p) + d] = k[from];
            values[index(slots[i * capacity + p], h, p) + d] = v[from];
          }
    check(keys == k_out && values == v_out, what + ": the caches");
    double worst = 0;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t h = 0; h < heads; ++h) {
          const int64_t seen = lengths[i] + t + 1, at = ((i * tokens + t) * heads + h) * size;
          std::vector<double> weights(seen), sums(size);
          double total = 0;
          for (int64_t p = 0; p < seen; ++p) {
            double score = 0;
            for (int64_t d = 0; d < size; ++d)
              score += static_cast<double>(q[at + d]) * keys[index(slots[i * capacity + p], h, p) + d];
            total += weights[p] = std::exp(0.3f * score);
          }
          for (int64_t p = 0; p < seen; ++p)
            for (int64_t d = 0; d < size; ++d)
              sums[d] += weights[p] / total * values[index(slots[i * capacity + p], h, p) + d];
          for (int64_t d = 0; d < size; ++d) worst = std::fmax(worst, std::abs(sums[d] - out[at + d]));
        }
    check(worst < 1e-5, what + ": error " + std::to_string(worst));
  }
};

}  // namespace

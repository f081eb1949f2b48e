// kv_attention_step as a TensorRT plugin: the nodes KvAttentionStep (appends; the caches are outputs as well) and
// KvAttentionFixed, each also over int8 caches.
#include "lora_kernels/kv_attention_step.h"

#include <algorithm>

#include "operator.h"

namespace lora_kernels::tensorrt {
namespace {

// Where each tensor is; -1: the node has none such.
struct Positions {
  int q = 0, k = -1, v = -1, k_cache, v_cache, k_scales = -1, v_scales = -1, lengths, slots;
};

Positions positions_of(bool append, bool int8) {
  Positions at;
  int next = 1;
  if (append) at.k = next++, at.v = next++;
  at.k_cache = next++, at.v_cache = next++;
  if (int8) at.k_scales = next++, at.v_scales = next++;
  at.lengths = next++, at.slots = next;
  return at;
}

Signature signature_of(bool append, bool int8) {
  const Positions at = positions_of(append, int8);
  Signature s;
  s.inputs = {"q"};
  if (append) s.inputs.insert(s.inputs.end(), {"k", "v"});
  s.inputs.insert(s.inputs.end(), {"k_cache", "v_cache"});
  if (int8) s.inputs.insert(s.inputs.end(), {"k_scales", "v_scales"});
  s.inputs.insert(s.inputs.end(), {"lengths", "slots"});
  s.like = {at.q};
  if (append) s.like.insert(s.like.end(), {at.k_cache, at.v_cache});
  if (append && int8) s.like.insert(s.like.end(), {at.k_scales, at.v_scales});
  s.fields = {{"has_slots", true}, {"scale", true}};
  if (append) s.fields.push_back({"in_place", false});
  return s;
}

class KvAttentionStepOperator : public Operator {
 public:
  KvAttentionStepOperator(bool append, bool int8)
      : append_(append), int8_(int8), at_(positions_of(append, int8)), signature_(signature_of(append, int8)) {}

  std::unique_ptr<Operator> clone() const override { return std::make_unique<KvAttentionStepOperator>(*this); }
  const Signature& signature() const override { return signature_; }

  bool accepts(int position, const Types& types) const override {
    const nvinfer1::DataType type = types[position];
    const int inputs = static_cast<int>(signature_.inputs.size());
    if (position >= inputs) return type == types[signature_.like[position - inputs]];
    if (position == at_.q) return is_floating(type);
    if (position == at_.k || position == at_.v) return type == types[at_.q];
    if (position == at_.k_cache) return int8_ ? type == nvinfer1::DataType::kINT8 : is_floating(type);
    if (position == at_.v_cache) return type == types[at_.k_cache];
    if (position == at_.k_scales || position == at_.v_scales) return type == nvinfer1::DataType::kFLOAT;
    return type == nvinfer1::DataType::kINT32;
  }

  Status plan(Tensors inputs, const DeviceInfo& device) override {
    KvAttentionStepProblem problem;
    Status status = translate(inputs, &problem);
    if (status.ok()) status = lora_kernels::plan(problem, device, &plan_);
    if (!status.ok() || !append_) return status;
    cache_bytes_.clear();
    for (size_t output = 1; output < signature_.like.size(); ++output) {
      const nvinfer1::PluginTensorDesc& cache = inputs[signature_.like[output]];
      cache_bytes_.push_back(static_cast<size_t>(volume(cache.dims)) * size_of(dtype_of(cache.type)));
    }
    return status;
  }

  // Of every number of rows: a plan splits its work by them.
  Status workspace(Tensors least, Tensors most, const DeviceInfo& device, int64_t* bytes) const override {
    KvAttentionStepProblem problem, smallest;
    Status status = translate(most, &problem);
    if (status.ok()) status = translate(least, &smallest);
    *bytes = 0;
    const int64_t most_rows = problem.rows, most_tokens = problem.tokens;
    for (int64_t rows = smallest.rows; status.ok() && rows <= most_rows; ++rows) {
      for (const int64_t tokens : {smallest.tokens, most_tokens}) {
        problem.rows = rows;
        problem.tokens = tokens;
        KvAttentionStepPlan made;
        status = lora_kernels::plan(problem, device, &made);
        if (!status.ok()) break;
        *bytes = std::max(*bytes, workspace_bytes(made));
      }
    }
    return status;
  }

  int64_t planned_workspace() const override { return workspace_bytes(plan_); }

  Status run(const void* const* inputs, void* const* outputs, void* workspace, const Executor& executor) override {
    KvAttentionStepArgs args;
    if (append_) {
      // The caches that are written are the outputs: the inputs themselves, or copies of them.
      for (size_t output = 1; output < signature_.like.size(); ++output) {
        const int input = signature_.like[output];
        if (outputs[output] == inputs[input]) continue;
        if (fields_.in_place)
          return Status::invalid(std::string("KvAttentionStep: ") + signature_.inputs[input] +
                                 ": expected input and output in the same memory, as in_place says, got two addresses; "
                                 "bind one buffer to both");
        Status status = copy_on_stream(outputs[output], inputs[input], cache_bytes_[output - 1], executor.stream);
        if (!status.ok()) return status;
      }
      args.k = inputs[at_.k];
      args.v = inputs[at_.v];
    }
    const auto cache = [&](int input, int output) {  // an input that nothing is appended to is only read
      return append_ ? outputs[output] : const_cast<void*>(inputs[input]);
    };
    args.q = inputs[at_.q];
    args.k_cache = cache(at_.k_cache, 1);
    args.v_cache = cache(at_.v_cache, 2);
    if (int8_) {
      args.k_scales = static_cast<float*>(cache(at_.k_scales, 3));
      args.v_scales = static_cast<float*>(cache(at_.v_scales, 4));
    }
    args.lengths = static_cast<const int32_t*>(inputs[at_.lengths]);
    if (plan_.problem.slots != KvSlots::kIdentity) args.slots = static_cast<const int32_t*>(inputs[at_.slots]);
    args.scale = fields_.scale;
    args.out = outputs[0];
    args.workspace = workspace;
    return lora_kernels::run(plan_, args, executor);
  }

  int aliased_input(int output) const override {
    return append_ && fields_.in_place && output > 0 ? signature_.like[output] : -1;
  }

 private:
  Status translate(Tensors inputs, KvAttentionStepProblem* p) const {
    const char* op = "KvAttentionStep";
    const nvinfer1::Dims& q = inputs[at_.q].dims;
    const nvinfer1::Dims& cache = inputs[at_.k_cache].dims;
    if (q.nbDims != 4 || cache.nbDims != 4)
      return Status::invalid(std::string(op) + ": q, k_cache: expected [rows, T, H, D] and [S, H, C, D], got " +
                             text_of(q) + " and " + text_of(cache));
    p->rows = q.d[0];
    p->tokens = q.d[1];
    p->heads = q.d[2];
    p->head_size = q.d[3];
    p->cache_rows = cache.d[0];
    p->capacity = cache.d[2];
    p->dtype = dtype_of(inputs[at_.q].type);
    p->cache_dtype = dtype_of(inputs[at_.k_cache].type);
    p->append = append_;
    const std::vector<int64_t> same = {p->rows, p->tokens, p->heads, p->head_size};
    const std::vector<int64_t> cached = {p->cache_rows, p->heads, p->capacity, p->head_size};
    Status status = expect_dims(op, "k_cache", cache, cached);
    if (status.ok()) status = expect_dims(op, "v_cache", inputs[at_.v_cache].dims, cached);
    if (status.ok() && append_) status = expect_dims(op, "k", inputs[at_.k].dims, same);
    if (status.ok() && append_) status = expect_dims(op, "v", inputs[at_.v].dims, same);
    if (status.ok() && int8_) {
      const nvinfer1::Dims& scales = inputs[at_.k_scales].dims;
      const bool channels = !append_ && scales.nbDims == 4 && scales.d[2] == 1 && p->capacity != 1;
      p->scales = channels ? KvScales::kPerChannel : KvScales::kPerPosition;
      const std::vector<int64_t> expected = {p->cache_rows, p->heads, channels ? 1 : p->capacity,
                                             channels ? p->head_size : 1};
      status = expect_dims(op, "k_scales", scales, expected);
      if (status.ok()) status = expect_dims(op, "v_scales", inputs[at_.v_scales].dims, expected);
    }
    if (status.ok()) status = expect_dims(op, "lengths", inputs[at_.lengths].dims, {p->rows});
    const nvinfer1::Dims& slots = inputs[at_.slots].dims;
    const bool table = append_ && slots.nbDims == 2 && slots.d[1] != 1;
    if (status.ok()) status = expect_dims(op, "slots", slots, {p->rows, table ? p->capacity : 1});
    p->slots = !fields_.has_slots ? KvSlots::kIdentity : table ? KvSlots::kPerPosition : KvSlots::kPerRow;
    return status;
  }

  bool append_, int8_;
  Positions at_;
  Signature signature_;
  KvAttentionStepPlan plan_;
  std::vector<size_t> cache_bytes_;
};

}  // namespace

std::unique_ptr<Operator> make_kv_attention_step(bool append, bool int8) {
  return std::make_unique<KvAttentionStepOperator>(append, int8);
}

}  // namespace lora_kernels::tensorrt

// int8_lora_linear as a TensorRT plugin: the nodes Int8LoraLinear, Int8LoraLinearGelu and Int8LoraLinearSilu. The
// packed weight comes as int32 words, a type that every TensorRT passes on as it is; weight_scales, which it holds as
// well, is there for the node's body in standard operators, and tells N here.
#include "lora_kernels/int8_lora_linear.h"

#include "linear.h"

namespace lora_kernels::tensorrt {
namespace {

enum Tensor { kX, kPackedWeight, kWeightScales, kBias, kBank, kResidual = kBank + kBankTensors, kXScale, kY };

const Signature kSignature = {
    {"x", "packed_weight", "weight_scales", "bias", "lora_a", "lora_b", "scales", "offsets", "adapter_ids", "residual",
     "x_scale"},
    {kX},
    kWeightScales,
    {{"has_bias", true}, {"has_lora", true}, {"has_residual", true}, {"has_x_scale", true}},
};

class Int8LoraLinearOperator : public Operator {
 public:
  explicit Int8LoraLinearOperator(Activation activation) : activation_(activation) {}

  std::unique_ptr<Operator> clone() const override { return std::make_unique<Int8LoraLinearOperator>(*this); }
  const Signature& signature() const override { return kSignature; }

  bool accepts(int position, const Types& types) const override {
    const nvinfer1::DataType type = types[position];
    if (position == kX) return is_floating(type);
    if (position == kPackedWeight) return type == nvinfer1::DataType::kINT32;
    if (position == kWeightScales || position == kXScale) return type == nvinfer1::DataType::kFLOAT;
    if (position == kBias) return type == types[kX] || type == nvinfer1::DataType::kFLOAT;
    if (position >= kBank && position < kResidual) return bank_accepts(position, kBank, types);
    return type == types[kX];
  }

  Status plan(Tensors inputs, const DeviceInfo& device) override {
    Int8LoraLinearProblem problem;
    Status status = translate(inputs, &problem);
    return status.ok() ? lora_kernels::plan(problem, device, &plan_) : status;
  }

  Status workspace(Tensors least, Tensors most, const DeviceInfo& device, int64_t* bytes) const override {
    Int8LoraLinearProblem problem;
    if (Status status = translate(most, &problem); !status.ok()) return status;
    const int64_t least_rank = fields_.has_lora ? least[kBank + kLoraA].dims.d[0] : 0;
    return most_workspace<Int8LoraLinearProblem, Int8LoraLinearPlan>(problem, rows_of(least[kX].dims), problem.rows,
                                                                     least_rank, device, bytes);
  }

  int64_t planned_workspace() const override { return workspace_bytes(plan_); }

  Status run(const void* const* inputs, void* const* outputs, void* workspace, const Executor& executor) override {
    const Int8LoraLinearProblem& p = plan_.problem;
    Int8LoraLinearArgs args;
    args.x = inputs[kX];
    args.x_stride = p.in_features;
    args.packed_weight = static_cast<const uint8_t*>(inputs[kPackedWeight]);
    if (p.has_bias) args.bias = inputs[kBias];
    if (fields_.has_lora) args.lora = bank_of(inputs, kBank, p.in_features, p.out_features);
    if (p.static_scale) args.x_scale = static_cast<const float*>(inputs[kXScale]);
    if (p.has_residual) args.residual = inputs[kResidual];
    args.y = outputs[0];
    args.workspace = workspace;
    return lora_kernels::run(plan_, args, executor);
  }

 private:
  Status translate(Tensors inputs, Int8LoraLinearProblem* p) const {
    const char* op = "Int8LoraLinear";
    const nvinfer1::Dims& x = inputs[kX].dims;
    if (x.nbDims < 1) return Status::invalid(std::string(op) + ": x: expected [..., K], got a scalar");
    p->in_features = x.d[x.nbDims - 1];
    p->out_features = volume(inputs[kWeightScales].dims);
    p->activation = activation_;
    p->static_scale = fields_.has_x_scale != 0;
    Status status = expect_dims(op, "packed_weight", inputs[kPackedWeight].dims,
                                {int8_packed_bytes(p->out_features, p->in_features) / 4});
    if (status.ok()) status = describe(op, fields_, inputs, kX, kBias, kResidual, p);
    if (status.ok() && p->static_scale) status = expect_dims(op, "x_scale", inputs[kXScale].dims, {1});
    if (status.ok() && fields_.has_lora)
      status = bank_shape(op, inputs, kBank, p->in_features, p->out_features, &p->lora);
    return status;
  }

  Activation activation_;
  Int8LoraLinearPlan plan_;
};

}  // namespace

std::unique_ptr<Operator> make_int8_lora_linear(Activation activation) {
  return std::make_unique<Int8LoraLinearOperator>(activation);
}

}  // namespace lora_kernels::tensorrt

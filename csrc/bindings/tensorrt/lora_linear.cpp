// lora_linear as a TensorRT plugin: the nodes LoraLinear, LoraLinearGelu and LoraLinearSilu.
#include "lora_kernels/lora_linear.h"

#include "linear.h"

namespace lora_kernels::tensorrt {
namespace {

enum Tensor { kX, kWeight, kBias, kBank, kResidual = kBank + kBankTensors, kY };

const Signature kSignature = {
    {"x", "weight", "bias", "lora_a", "lora_b", "scales", "offsets", "adapter_ids", "residual"},
    {kX},
    kWeight,
    {{"has_bias", true}, {"has_lora", true}, {"has_residual", true}},
};

class LoraLinearOperator : public Operator {
 public:
  explicit LoraLinearOperator(Activation activation) : activation_(activation) {}

  std::unique_ptr<Operator> clone() const override { return std::make_unique<LoraLinearOperator>(*this); }
  const Signature& signature() const override { return kSignature; }

  bool accepts(int position, const Types& types) const override {
    const nvinfer1::DataType type = types[position];
    if (position == kX) return is_floating(type);
    if (position == kBias) return type == types[kX] || type == nvinfer1::DataType::kFLOAT;
    if (position >= kBank && position < kResidual) return bank_accepts(position, kBank, types);
    return type == types[kX];
  }

  Status plan(Tensors inputs, const DeviceInfo& device) override {
    LoraLinearProblem problem;
    Status status = translate(inputs, &problem);
    return status.ok() ? lora_kernels::plan(problem, device, &plan_) : status;
  }

  Status workspace(Tensors least, Tensors most, const DeviceInfo& device, int64_t* bytes) const override {
    LoraLinearProblem problem;
    if (Status status = translate(most, &problem); !status.ok()) return status;
    const int64_t least_rank = fields_.has_lora ? least[kBank + kLoraA].dims.d[0] : 0;
    return most_workspace<LoraLinearProblem, LoraLinearPlan>(problem, rows_of(least[kX].dims), problem.rows, least_rank,
                                                             device, bytes);
  }

  int64_t planned_workspace() const override { return workspace_bytes(plan_); }

  Status run(const void* const* inputs, void* const* outputs, void* workspace, const Executor& executor) override {
    const LoraLinearProblem& p = plan_.problem;
    LoraLinearArgs args;
    args.x = inputs[kX];
    args.x_stride = p.in_features;
    args.weight = inputs[kWeight];
    args.weight_stride = p.in_features;
    if (p.has_bias) args.bias = inputs[kBias];
    if (fields_.has_lora) args.lora = bank_of(inputs, kBank, p.in_features, p.out_features);
    if (p.has_residual) args.residual = inputs[kResidual];
    args.y = outputs[0];
    args.workspace = workspace;
    return lora_kernels::run(plan_, args, executor);
  }

 private:
  Status translate(Tensors inputs, LoraLinearProblem* p) const {
    const char* op = "LoraLinear";
    const nvinfer1::Dims& x = inputs[kX].dims;
    const nvinfer1::Dims& weight = inputs[kWeight].dims;
    if (x.nbDims < 1 || weight.nbDims != 2 || weight.d[1] != x.d[x.nbDims - 1])
      return Status::invalid(std::string(op) + ": weight: expected [N, K] to go with x [..., K] " + text_of(x) +
                             ", got " + text_of(weight));
    p->in_features = weight.d[1];
    p->out_features = weight.d[0];
    p->activation = activation_;
    Status status = describe(op, fields_, inputs, kX, kBias, kResidual, p);
    if (status.ok() && fields_.has_lora)
      status = bank_shape(op, inputs, kBank, p->in_features, p->out_features, &p->lora);
    return status;
  }

  Activation activation_;
  LoraLinearPlan plan_;
};

}  // namespace

std::unique_ptr<Operator> make_lora_linear(Activation activation) {
  return std::make_unique<LoraLinearOperator>(activation);
}

}  // namespace lora_kernels::tensorrt

// Which storage type's kernels a call takes, and the plan in the message if a launch fails; the unpacking of weights.
#include "cuda/int8_lora_linear.h"
#include "cuda/int8_unpack.cuh"
#include "cuda/sequence.h"

namespace lora_kernels::cuda {

extern template struct Int8LoraLinearKernels<__half>;
extern template struct Int8LoraLinearKernels<__nv_bfloat16>;
extern template struct Int8LoraLinearKernels<float>;

Status launch(const Int8LoraLinearPlan& plan, const Int8LoraLinearArgs& args, const Executor& executor) {
  Status status;
  switch (plan.problem.dtype) {
    case DType::kFloat16: status = Int8LoraLinearKernels<__half>::forward(plan, args, executor.stream); break;
    case DType::kBFloat16: status = Int8LoraLinearKernels<__nv_bfloat16>::forward(plan, args, executor.stream); break;
    default: status = Int8LoraLinearKernels<float>::forward(plan, args, executor.stream);
  }
  if (!status.ok()) status.text = "int8_lora_linear: " + status.text + "; the plan was: " + to_string(plan);
  return status;
}

Status launch_together(const Int8LoraLinearPlan* const* plans, const Int8LoraLinearArgs* const* args, int count,
                       const Executor& executor) {
  Status status;
  void* stream = executor.stream;
  switch (plans[0]->problem.dtype) {
    case DType::kFloat16: status = Int8LoraLinearKernels<__half>::forward_together(plans, args, count, stream); break;
    case DType::kBFloat16:
      status = Int8LoraLinearKernels<__nv_bfloat16>::forward_together(plans, args, count, stream);
      break;
    default: status = Int8LoraLinearKernels<float>::forward_together(plans, args, count, stream);
  }
  if (!status.ok())
    status.text = "int8_lora_linear, " + std::to_string(count) + " calls together: " + status.text +
                  "; the plan of the first was: " + to_string(*plans[0]);
  return status;
}

}  // namespace lora_kernels::cuda

namespace lora_kernels {

Status int8_unpack_cuda(const uint8_t* packed, int64_t out_features, int64_t in_features, int8_t* weight, float* scales,
                        void* stream) {
  using namespace cuda;
  launching::Sequence s(stream);
  const Int8UnpackParams p{packed,
                           static_cast<int>(out_features),
                           static_cast<int>(in_features),
                           int8_block_bytes(in_features),
                           kInt8BlockChannels * int8_padded_depth(in_features),
                           weight,
                           scales};
  const dim3 grid(launching::tiles(out_features, kInt8BlockChannels),
                  in_features > 0 ? launching::tiles(in_features, kInt8UnpackDepth) : 1, 1);
  s.run<&int8_unpack_kernel<int8_t>>("int8_unpack", grid, kInt8UnpackThreads, 0, p);
  return s.status();
}

}  // namespace lora_kernels

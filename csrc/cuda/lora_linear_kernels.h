// The launches of one storage type. Each type is a translation unit of its own (lora_linear_f16.cu, ...), so that they
// compile side by side.
#pragma once

#include "cuda/lora_linear.h"

namespace lora_kernels::cuda {

template <class T>
struct LoraLinearKernels {
  static Status forward(const LoraLinearPlan& plan, const LoraLinearArgs& args, void* stream);
  static Status backward(const LoraLinearBackwardPlan& plan, const LoraLinearBackwardArgs& args, void* stream);
};

}  // namespace lora_kernels::cuda

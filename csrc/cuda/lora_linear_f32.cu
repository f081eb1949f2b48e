#include "cuda/lora_linear_launch.cuh"

template struct lora_kernels::cuda::LoraLinearKernels<float>;

#include "cuda/int8_lora_linear_launch.cuh"

template struct lora_kernels::cuda::Int8LoraLinearKernels<float>;

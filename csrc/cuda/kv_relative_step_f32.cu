#include "cuda/kv_relative_step_launch.cuh"

template struct lora_kernels::cuda::KvRelativeStepKernels<float>;

#include "cuda/kv_pack_launch.cuh"

template struct lora_kernels::cuda::KvPackKernels<__half>;

#include "cuda/kv_attention_step_launch.cuh"

template struct lora_kernels::cuda::KvAttentionStepKernels<__nv_bfloat16>;

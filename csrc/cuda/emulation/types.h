// CUDA's storage types and vectors under a host compiler, from the toolkit's own headers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// The toolkit defines these empty for host compilers. Static shared memory is not guarded and would be shared by all
// blocks: kernels take theirs from primitives/shared.h.
#undef __shared__
#define __shared__ static_assert(false, "take shared memory from primitives/shared.h");
#undef __launch_bounds__
#define __launch_bounds__(...)

struct CUstream_st;
using cudaStream_t = CUstream_st*;

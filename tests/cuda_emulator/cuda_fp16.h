// fp16, by the compiler's own type.
#pragma once
#include "cuda_runtime.h"  // __device__

struct __half {
  _Float16 value;
};
__device__ inline float __half2float(__half x) { return static_cast<float>(x.value); }
__device__ inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }

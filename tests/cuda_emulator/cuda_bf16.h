// bf16 as the GPU converts it: round to nearest even, one NaN.
#pragma once
#include "cuda_runtime.h"  // __device__

#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t bits;
};
__device__ inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
__device__ inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

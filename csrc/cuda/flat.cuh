// fake_quant over memory: eight neighbours a thread, whatever their channels, because they share a byte of the mask.
#pragma once
#include "sweep.cuh"

namespace dfq {
namespace cuda {

struct Integers {
  float low, high;
};

// out and, if wanted, the mask; one scale for the tensor, or one per channel.
void fake_quant_flat(int dtype, const View& view, const void* x, const float* scale, const float* zero_point,
                     Integers integers, void* out, uint8_t* mask, const Launch& launch);

}  // namespace cuda
}  // namespace dfq

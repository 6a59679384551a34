// What the operators with batch statistics share.
#pragma once
#include "sweep.cuh"

namespace dfq {
namespace cuda {

// The gradient of x through mean and variance.
struct StatisticsGradient {
  const float *mean, *grad_mean, *grad_var;
  float count;

  struct Constants {
    float mean, slope, shift;
    __device__ float of(float x) const { return (x - mean) * slope + shift; }
  };
  __device__ Constants constants(int64_t c) const { return {mean[c], 2.0f / count * grad_var[c], grad_mean[c] / count}; }
};

// A batch norm's affine map and the activation behind it.
struct Normalization {
  const float *mean, *var, *weight, *bias;  // weight and bias may be null
  float eps;
  int activation;

  struct Constants {
    float mean, inv_std, factor, bias;
    __device__ float affine(float x) const { return (x - mean) * factor + bias; }
  };
  __device__ Constants constants(int64_t c) const {
    const float inv_std = inverse_deviation(var[c], eps);
    return {mean[c], inv_std, weight ? weight[c] * inv_std : inv_std, bias ? bias[c] : 0.0f};
  }
};

// What a channel's elements are measured from, so that a mean far from 0 costs no digits: its first element.
template <class T>
__device__ inline float pivot_of(const T* x, const Layout& l, int64_t c) {
  const float first = widen(x[c * l.inner]);
  return isfinite(first) ? first : 0.0f;
}

template <class T>
__global__ void finish(const T* x, const Layout l, const Moments* parts, float* mean, float* var) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (c >= l.channels) return;
  const Moments::Wide total = moments_of(parts, l.slices, l.channels, c);
  if (threadIdx.x % 32 != 0) return;
  mean[c] = static_cast<float>(pivot_of(x, l, c) + total.mean);
  var[c] = static_cast<float>(total.squares / total.count);
}

// Joins the Moments in the workspace, in order and in double, a warp per channel: mean and biased variance.
template <class T>
void finish_moments(const T* x, const Layout& l, float* mean, float* var, const Launch& launch) {
  run(finish<T>, static_cast<unsigned>(ceil_div(l.channels, 4)), 128, 0, launch, x, l,
      static_cast<const Moments*>(parts_in<Moments>(launch.workspace)), mean, var);
}

}  // namespace cuda
}  // namespace dfq

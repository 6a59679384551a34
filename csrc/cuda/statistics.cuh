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

// Joins the Moments in the workspace: mean and biased variance of every channel.
void finish_moments(const Layout& l, float* mean, float* var, const Launch& launch);

}  // namespace cuda
}  // namespace dfq

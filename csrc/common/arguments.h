// The arguments of every kernel, on whatever device, and the list of kernels.
//
// Tensors are dense, in the memory order that the View describes, and of type `dtype`. Constants and statistics of
// channels are fp32. Pointers that may be null say so. `threads` is for the CPU.
#pragma once
#include <cstdint>

#include "types.h"

namespace dfq {

struct FakeQuantForward {
  int dtype, threads;
  View view;
  const void* x;
  const float *scale, *zero_point;  // [channels]
  float quant_min, quant_max;
  void* out;
  uint8_t* mask;  // one bit per element, padded to two bytes; may be null
};

struct MaskBackward {
  int dtype, threads;
  int64_t size;
  const void* grad_out;
  const uint8_t* mask;
  void* grad_x;
};

struct FakeQuantBackward {
  int dtype, threads;
  View view;
  const void *grad_out, *x;
  const float *scale, *zero_point;  // [channels]
  float quant_min, quant_max;
  void* grad_x;
  float *grad_scale, *grad_zero_point;  // [channels]
};

// A moving range and the parameters that follow from it, one number each, updated in place.
struct MovingRange {
  float *running_min, *running_max, *scale, *zero_point;
  float averaging_constant;
  float quant_min, quant_max;
  bool symmetric;
};

struct ObserveFakeQuantForward {
  int dtype, threads;
  int64_t size;
  const void* x;
  MovingRange range;
  void* out;
  uint8_t* mask;
};

struct FakeQuantWeights {
  int dtype, out_dtype, threads;
  int64_t layers;
  const int64_t* weights;   // addresses
  const int64_t* channels;  // output channels of each layer
  const int64_t* sizes;     // elements of each output channel
  const int64_t* bits;
  const int64_t* outs;    // addresses
  const int64_t* scales;  // addresses of fp32 [channels]
};

struct BnStatsForward {
  int dtype, threads;
  View view;
  const void* x;
  float *mean, *var;
};

struct BnStatsBackward {
  int dtype, threads;
  View view;
  const float *grad_mean, *grad_var;
  const void* x;
  const float* mean;
  void* grad_x;
};

struct BnActStatsForward {
  int dtype, threads;
  View view;
  const void* x;
  const float *weight, *bias;  // may be null
  const float *running_mean, *running_var;
  float eps;
  int activation;
  void* out;
  float *mean, *var;
};

struct BnActStatsBackward {
  int dtype, threads;
  View view;
  const void* grad_out;
  const float *grad_mean, *grad_var;
  const void* x;
  const float* batch_mean;
  const float *weight, *bias;  // may be null
  const float *running_mean, *running_var;
  float eps;
  int activation;
  void* grad_x;
};

struct BnActFakeQuantForward {
  int dtype, threads;
  View view;
  const void* x;
  const float *weight, *bias;           // may be null
  float *running_mean, *running_var;    // updated in place if training
  bool training, observe;
  float momentum, eps;
  int activation;
  MovingRange range;
  void* out;
  float *mean, *var;  // what normalised: copies where it is what is stored
  float* used;        // the scale and the zero point that values were rounded with
};

struct BnActFakeQuantBackward {
  int dtype, threads;
  View view;
  const void *grad_out, *x;
  const float *weight, *bias;  // may be null
  const float *mean, *var;
  const float *scale, *zero_point;  // one number each
  bool training;
  float eps;
  int activation;
  float quant_min, quant_max;
  void* grad_x;
  float *grad_weight, *grad_bias;       // [channels]
  float *grad_scale, *grad_zero_point;  // one number each; null: not asked for
};

struct BnStatLoss {
  int64_t layers;
  const int64_t *means, *vars, *running_means, *running_vars;  // addresses of fp32 [channels]
  const int64_t* channels;
  const double* eps;
  const float* grad_out;             // null: forward
  float* loss;                       // forward
  const int64_t *grad_means, *grad_vars;  // backward: addresses
};

// Of the CPU alone. Tensors are channels-last and dense, x of type `dtype`, out of `out_dtype`.
struct FakeQuantConv2d {
  int dtype, out_dtype, threads;
  int64_t count;  // images
  int32_t height, width, channels, out_height, out_width, out_channels, kernel_y, kernel_x;
  int32_t stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x, groups;
  const void* x;
  const float* x_scale;       // one number
  const float* weight;        // [out_channels, kernel_y, kernel_x, channels / groups]
  const float* weight_scale;  // [out_channels]
  const float* bias;          // may be null
  void* out;
  bool* fits;  // whether all integers fit bytes; else out is left unfinished
};

#define DFQ_KERNELS(X)                                    \
  X(fake_quant_forward, FakeQuantForward)                     \
  X(mask_backward, MaskBackward)                              \
  X(fake_quant_backward, FakeQuantBackward)                   \
  X(observe_fake_quant_forward, ObserveFakeQuantForward)      \
  X(fake_quant_weights, FakeQuantWeights)                     \
  X(bn_stats_forward, BnStatsForward)                         \
  X(bn_stats_backward, BnStatsBackward)                       \
  X(bn_act_stats_forward, BnActStatsForward)                  \
  X(bn_act_stats_backward, BnActStatsBackward)                \
  X(bn_act_fake_quant_forward, BnActFakeQuantForward)         \
  X(bn_act_fake_quant_backward, BnActFakeQuantBackward)       \
  X(bn_stat_loss, BnStatLoss)

}  // namespace dfq

// The arithmetic that several operators share, one vector or one channel at a time.
#pragma once
#include <cmath>
#include <limits>

#include "kernels.h"
#include "reduce.h"

namespace dfq {
namespace DFQ_ISA {

constexpr float kScaleFloor = 0x1p-23f;   // of a range that is a single point

static inline std::vector<float> reciprocals(const float* values, int64_t n) {
  std::vector<float> inv(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) inv[i] = 1.0f / values[i];
  return inv;
}

// 1 / sqrt(var + eps).
static inline std::vector<float> inverse_deviations(const float* var, float eps, int64_t n) {
  std::vector<float> inv(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) inv[i] = 1.0f / std::sqrt(var[i] + eps);
  return inv;
}

static inline std::vector<float> products(const float* weight, const std::vector<float>& inv) {
  std::vector<float> result(inv);
  if (weight)
    for (size_t i = 0; i < inv.size(); ++i) result[i] = weight[i] * inv[i];
  return result;
}

static inline std::vector<float> or_zeros(const float* values, int64_t n) {
  return values ? std::vector<float>(values, values + n) : std::vector<float>(static_cast<size_t>(n), 0.0f);
}

struct Rounding {
  Vec low, high;
  Rounding(float quant_min, float quant_max) : low(broadcast(quant_min)), high(broadcast(quant_max)) {}
};

struct LearnedGradient {
  Vec x, scale, outside;  // outside: the gradient where the clamp changed something
  Mask inside;
};

DFQ_INLINE static inline LearnedGradient learned_gradient(Vec x, Vec grad, Vec inv, Vec zero_point,
                                                          const Rounding& rounding) {
  const Vec scaled = x * inv;
  const Vec rounded = rne(scaled + zero_point);
  const Vec q = clamp(rounded, rounding.low, rounding.high);
  const Mask inside = equal(q, rounded);
  const Vec grad_inside = keep(inside, grad);
  return {grad_inside, ((q - zero_point) - keep(inside, scaled)) * grad, grad - grad_inside, inside};
}

// None, ReLU or ReLU6, without a branch: a bound that is NaN neither clips nor compares.
struct Activation {
  Vec low, high;
  explicit Activation(int code)
      : low(broadcast(code == kIdentity ? std::numeric_limits<float>::quiet_NaN() : 0.0f)),
        high(broadcast(code == kReLU6 ? 6.0f : std::numeric_limits<float>::quiet_NaN())) {}

  DFQ_INLINE Vec operator()(Vec y) const { return min_keeping_nan(max_keeping_nan(y, low), high); }
  // Where it passes a gradient, its output being y: where it clipped nothing.
  DFQ_INLINE Mask passes(Vec y) const { return both(below(y, high), above(y, low)); }
};

static inline float activate(float y, int activation) {
  if (activation == kIdentity) return y;
  y = y < 0.0f ? 0.0f : y;
  return activation == kReLU6 && y > 6.0f ? 6.0f : y;
}

// The range moves towards [low, high]; scale and zero point follow. A non-finite range leaves everything as it is.
static inline void move_range(const MovingRange& r, float low, float high) {
  const float least = *r.running_min, most = *r.running_max;
  if (std::isfinite(low) && std::isfinite(high)) {
    const bool first = least > most;
    *r.running_min = first ? low : least + r.averaging_constant * (low - least);
    *r.running_max = first ? high : most + r.averaging_constant * (high - most);
  }
  const bool seen = *r.running_min <= *r.running_max;
  const float from = seen && *r.running_min < 0.0f ? *r.running_min : 0.0f;
  const float to = seen && *r.running_max > 0.0f ? *r.running_max : 0.0f;
  float scale, zero_point = 0.0f;
  if (r.symmetric) {
    scale = (-from > to ? -from : to) / r.quant_max;
    scale = scale < kScaleFloor ? kScaleFloor : scale;
  } else {
    scale = (to - from) / (r.quant_max - r.quant_min);
    scale = scale < kScaleFloor ? kScaleFloor : scale;
    zero_point = __builtin_rintf(r.quant_min - from / scale);
    zero_point = zero_point < r.quant_min ? r.quant_min : zero_point > r.quant_max ? r.quant_max : zero_point;
  }
  *r.scale = scale;
  *r.zero_point = zero_point;
}

// Least and largest value, by lanes; a NaN makes both NaN.
struct Extremes {
  Vec low = broadcast(std::numeric_limits<float>::infinity()), high = -low;
  VecInt nan = VecInt{};

  void add(Vec v) {
    low = min_keeping_nan(low, v);
    high = max_keeping_nan(high, v);
    nan = nan | (VecInt)(v != v);
  }
  // Folds the lanes into [least, most].
  void fold(float& least, float& most) const {
    for (int i = 0; i < kWidth; ++i) {
      least = low[i] < least ? low[i] : least;
      most = high[i] > most ? high[i] : most;
    }
    for (int i = 0; i < kWidth; ++i)
      if (nan[i]) least = most = std::numeric_limits<float>::quiet_NaN();
  }
};

}  // namespace DFQ_ISA
}  // namespace dfq

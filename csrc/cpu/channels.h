// The arithmetic that several operators share, one vector or one channel at a time.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.h"
#include "reduce.h"

namespace dfq {
namespace DFQ_ISA {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kScaleFloor = 0x1p-63f;  // of a range that is a single point: a product of two is still a normal number
constexpr float kRangeLimit = 0x1p126f;  // the width of a range, and what it moves by, stay finite

// Of a scale; NaN, which no result hides, of one that is not above 0 (an optimizer may push a learned one there).
static inline float reciprocal(float scale) {
  return scale > 0.0f ? 1.0f / scale : std::numeric_limits<float>::quiet_NaN();
}

static inline std::vector<float> reciprocals(const float* values, int64_t n) {
  std::vector<float> inv(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) inv[i] = reciprocal(values[i]);
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
};

DFQ_INLINE static inline LearnedGradient learned_gradient(Vec x, Vec grad, Vec inv, Vec zero_point,
                                                          const Rounding& rounding) {
  const Vec scaled = x * inv;
  const Vec rounded = rne(scaled + zero_point);
  const Vec q = clamp(rounded, rounding.low, rounding.high);
  const Mask inside = equal(q, rounded);
  const Vec grad_inside = keep(inside, grad);
  return {grad_inside, ((q - zero_point) - keep(inside, scaled)) * grad, grad - grad_inside};
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

// The least float, in order, for which `reached` holds, which holds for all above it; infinity if for none.
template <class Reached>
static float first_float(const Reached& reached) {
  const auto at = [](int32_t place) {  // floats in order: the negative ones have their other bits inverted
    const int32_t bits = place >= 0 ? place : place ^ 0x7fffffff;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  };
  int64_t low = -0x7f800000, high = 0x7f800000;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (reached(at(static_cast<int32_t>(middle)))) high = middle;
    else low = middle + 1;
  }
  return at(static_cast<int32_t>(low));
}

// The values whose gradient passes an activation and a fake quantization behind it. With a scale > 0 both are monotone,
// rounding included, so the values are an interval: two comparisons instead of the arithmetic.
struct Passing {
  Vec low, high;

  Passing(int activation, float scale, float zero_point, float quant_min, float quant_max) {
    const float inv = reciprocal(scale);
    const auto rounded = [=](float y) { return __builtin_rintf(y * inv + zero_point); };
    const float first = first_float(
        [&](float y) { return (activation == kIdentity || y > 0.0f) && rounded(y) >= quant_min; });
    const float behind = first_float(
        [&](float y) { return (activation == kReLU6 && y >= 6.0f) || rounded(y) > quant_max; });
    low = broadcast(first);
    high = broadcast(std::nextafter(behind, -kInfinity));
  }
  DFQ_INLINE Mask operator()(Vec y) const { return within(y, low, high); }
};

// The range moves towards [low, high]; scale and zero point follow. A non-finite range leaves everything as it is.
static inline void move_range(const MovingRange& r, float low, float high) {
  const float least = *r.running_min, most = *r.running_max;
  if (std::isfinite(low) && std::isfinite(high)) {
    low = std::min(std::max(low, -kRangeLimit), kRangeLimit);
    high = std::min(std::max(high, -kRangeLimit), kRangeLimit);
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

// Whether a NaN is among n values: asked only where a sum of them is not finite.
template <class T>
static bool holds_nan(const T* x, int64_t n) {
  return std::any_of(x, x + n, [](T value) { return std::isnan(to_float(value)); });
}

// Least and largest of n values; a NaN makes both NaN.
template <class T>
static void extremes_of(const T* x, int64_t n, float& least, float& most) {
  constexpr int kBeside = 4;  // what a minimum has to wait for
  const bool ahead = reads_ahead();
  Vec low[kBeside], high[kBeside], sum[kBeside];
  for (int b = 0; b < kBeside; ++b) {
    low[b] = broadcast(kInfinity);
    high[b] = -low[b];
    sum[b] = Vec{};
  }
  const int64_t whole = n / (kBeside * kWidth) * (kBeside * kWidth);
  for (int64_t j = 0; j < whole; j += kBeside * kWidth)
#pragma GCC unroll 4
    for (int b = 0; b < kBeside; ++b) {
      const Vec value = load_ahead(x + j + b * kWidth, ahead);
      low[b] = min_keeping_nan(value, low[b]);
      high[b] = max_keeping_nan(value, high[b]);
      sum[b] = sum[b] + value;
    }
  for (int b = 1; b < kBeside; ++b) {
    low[0] = min_keeping_nan(low[b], low[0]);
    high[0] = max_keeping_nan(high[b], high[0]);
    sum[0] = sum[0] + sum[b];
  }
  float total = 0;
  least = kInfinity;
  most = -least;
  const auto take = [&](float from, float to, float value) {
    least = from < least ? from : least;
    most = to > most ? to : most;
    total += value;
  };
  for (int i = 0; i < kWidth; ++i) take(low[0][i], high[0][i], sum[0][i]);
  for (int64_t j = whole; j < n; ++j) take(to_float(x[j]), to_float(x[j]), to_float(x[j]));
  if (!std::isfinite(total) && holds_nan(x, n)) least = most = std::numeric_limits<float>::quiet_NaN();
}

}  // namespace DFQ_ISA
}  // namespace dfq

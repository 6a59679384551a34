// The arithmetic that several operators share, one element at a time. Compiled with -fmad=false: every operation is
// rounded on its own, as on the CPU.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../common/arguments.h"

namespace dfq {
namespace cuda {

constexpr float kScaleFloor = 0x1p-63f;  // of a range that is a single point: a product of two is still a normal number
constexpr float kRangeLimit = 0x1p126f;  // the width of a range, and what it moves by, stay finite
constexpr float kScaledLimit = 0x1p24f;  // beyond every integer that can be asked for
constexpr float kInfinity = __builtin_huge_valf();

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }
template <class T>
__device__ inline T narrow(float x);
template <>
__device__ inline float narrow<float>(float x) { return x; }
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ inline __half narrow<__half>(float x) { return __float2half_rn(x); }

// One instruction each; a NaN in either is the result, as fmaxf and fminf would not have it.
#ifdef __CUDA_ARCH__
__device__ inline float larger(float a, float b) {
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(a) : "f"(a), "f"(b));
  return a;
}
__device__ inline float smaller(float a, float b) {
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(a) : "f"(a), "f"(b));
  return a;
}
#else
__device__ inline float larger(float a, float b) { return a > b || a != a ? a : b; }
__device__ inline float smaller(float a, float b) { return a < b || a != a ? a : b; }
#endif

__device__ inline float clamp(float x, float low, float high) { return smaller(larger(x, low), high); }

// Bounds that no loop has to choose again; what is not clipped has none.
__device__ inline float activate(float y, int activation) {
  return clamp(y, activation == kIdentity ? -kInfinity : 0.0f, activation == kReLU6 ? 6.0f : kInfinity);
}

// The gradient behind the activation, whose output is y: 0 where it clipped. Nothing compares with NaN.
__device__ inline float activation_gradient(float grad, float y, int activation) {
  const float none = __builtin_nanf("");
  const float low = activation == kIdentity ? none : 0.0f, high = activation == kReLU6 ? 6.0f : none;
  return y <= low || y >= high ? 0.0f : grad;
}

// Of a scale; NaN, which no result hides, of one that is not above 0.
__device__ inline float reciprocal(float scale) { return scale > 0.0f ? 1.0f / scale : __builtin_nanf(""); }

__device__ inline float inverse_deviation(float var, float eps) { return 1.0f / sqrtf(var + eps); }

struct LearnedGradient {
  float x, scale, outside;  // outside: the gradient where the clamp changed something
};

__device__ inline LearnedGradient learned_gradient(float x, float grad, float inv, float zero_point, float low,
                                                   float high) {
  const float scaled = x * inv;
  const float rounded = rintf(scaled + zero_point);
  const float q = clamp(rounded, low, high);
  const bool inside = q == rounded;
  const float finite = clamp(scaled, -kScaledLimit, kScaledLimit);  // before it meets a 0
  const float grad_inside = inside ? grad : 0.0f;
  return {grad_inside, ((q - zero_point) - (inside ? finite : 0.0f)) * grad, grad - grad_inside};
}

// The range moves towards [low, high]; scale and zero point follow. A non-finite range leaves everything as it is.
__device__ inline void move_range(const MovingRange& r, float low, float high) {
  float least = *r.running_min, most = *r.running_max;
  if (isfinite(low) && isfinite(high)) {
    low = clamp(low, -kRangeLimit, kRangeLimit);
    high = clamp(high, -kRangeLimit, kRangeLimit);
    const bool first = least > most;
    least = first ? low : least + r.averaging_constant * (low - least);
    most = first ? high : most + r.averaging_constant * (high - most);
    *r.running_min = least;
    *r.running_max = most;
  }
  const bool seen = least <= most;
  const float from = seen && least < 0.0f ? least : 0.0f, to = seen && most > 0.0f ? most : 0.0f;
  float zero_point = 0.0f;
  float scale = r.symmetric ? (-from > to ? -from : to) / r.quant_max : (to - from) / (r.quant_max - r.quant_min);
  scale = scale < kScaleFloor ? kScaleFloor : scale;
  if (!r.symmetric) zero_point = clamp(rintf(r.quant_min - from / scale), r.quant_min, r.quant_max);
  *r.scale = scale;
  *r.zero_point = zero_point;
}

// --- what is gathered over a channel: a thread's part in fp32; parts are joined in a fixed order, in double ---------

struct Nothing {
  struct Wide {
    __device__ void absorb(const Nothing&) {}
  };
  __device__ void merge(const Nothing&) {}
};

template <int K>
struct Sums {
  float value[K] = {};

  struct Wide {
    double value[K] = {};
    __device__ void absorb(const Sums& part) {
      for (int k = 0; k < K; ++k) value[k] += part.value[k];
    }
    __device__ void merge(const Wide& other) {
      for (int k = 0; k < K; ++k) value[k] += other.value[k];
    }
  };
  __device__ void merge(const Sums& other) {
    for (int k = 0; k < K; ++k) value[k] += other.value[k];
  }
};

// Count, mean (from a pivot) and sum of squared deviations. Source: Chan, Golub, LeVeque 1983, eq. 2.1.
struct Moments {
  float count = 0, mean = 0, squares = 0;

  struct Wide {
    double count, mean, squares;
  };
  __device__ const Moments& moments() const { return *this; }
  __device__ void join(float n, float m, float s) {
    const float total = count + n, delta = m - mean, share = __fdividef(n, total);
    mean += delta * share;
    squares += s + delta * delta * (count * share);
    count = total;
  }
  __device__ void merge(const Moments& other) {
    if (other.count > 0) join(other.count, other.mean, other.squares);
  }
  template <int N>
  __device__ void add(const float (&x)[N], int n, float pivot) {
    float sum = 0, squares_of_group = 0;
    for (int i = 0; i < N; ++i) sum += i < n ? x[i] - pivot : 0.0f;
    const float m = N == 1 ? sum : sum / static_cast<float>(n);
    for (int i = 0; i < N && N > 1; ++i) {
      const float deviation = (x[i] - pivot) - m;
      squares_of_group += i < n ? deviation * deviation : 0.0f;
    }
    join(static_cast<float>(n), m, squares_of_group);
  }
};

// Least and largest value; a NaN makes both NaN and stays.
struct Extremes {
  float low = kInfinity, high = -kInfinity;

  using Wide = Extremes;
  __device__ void take(float least, float most) {
    low = smaller(low, least);
    high = larger(high, most);
  }
  __device__ void absorb(const Extremes& part) { take(part.low, part.high); }
  __device__ void merge(const Extremes& other) { take(other.low, other.high); }
  template <int N>
  __device__ void add(const float (&x)[N], int n) {
    for (int i = 0; i < N; ++i)
      if (i < n) take(x[i], x[i]);
  }
};

struct MomentsAndExtremes {
  Moments of_all;
  Extremes extremes;

  __device__ const Moments& moments() const { return of_all; }
  __device__ void merge(const MomentsAndExtremes& other) {
    of_all.merge(other.of_all);
    extremes.merge(other.extremes);
  }
  template <int N>
  __device__ void add(const float (&x)[N], int n, float pivot) {
    of_all.add(x, n, pivot);
    extremes.add(x, n);
  }
};

}  // namespace cuda
}  // namespace dfq

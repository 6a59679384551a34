// Storage types: fp32 is read and written where it lies, bf16 and fp16 through a block of fp32.
#pragma once
#include "../common/types.h"
#include "vector.h"

namespace dfq {
namespace DFQ_ISA {

constexpr int64_t kBlock = 1024;  // elements; a multiple of every kWidth

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

static inline void load(const float* from, float* to, int64_t n) { std::memcpy(to, from, n * sizeof(float)); }
static inline void store(const float* from, float* to, int64_t n) { std::memcpy(to, from, n * sizeof(float)); }

static inline void load(const BFloat16* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i].bits) << 16;
    std::memcpy(&to[i], &bits, 4);
  }
}

// Round to nearest even; NaN stays NaN.
static inline void store(const float* from, BFloat16* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &from[i], 4);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    to[i].bits = static_cast<uint16_t>(nan ? 0x7fc0u : rounded);
  }
}

static inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  uint32_t bits = static_cast<uint32_t>(half & 0x7fffu) << 13;
  float value;
  if (bits >= 0x0f800000u) {
    bits |= 0x7f800000u;  // infinity, NaN
  } else {
    std::memcpy(&value, &bits, 4);
    value *= 0x1p112f;  // the other bias, by one exact product that makes subnormals normal
    std::memcpy(&bits, &value, 4);
  }
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
}

static inline uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00u;
  if (bits >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and above round to infinity
  if (bits < 0x38800000u) {  // subnormal: adding 0.5 leaves the mantissa, rounded, in the low bits
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return sign | static_cast<uint16_t>(bits - 0x3f000000u);
  }
  bits += 0xc8000fffu + ((bits >> 13) & 1u);  // the other bias, and half of the last place
  return sign | static_cast<uint16_t>(bits >> 13);
}

static inline void load(const Float16* from, float* to, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
  for (; i < n; ++i) to[i] = half_to_float(from[i].bits);
}

static inline void store(const float* from, Float16* to, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
#endif
  for (; i < n; ++i) to[i].bits = float_to_half(from[i]);
}

// A block as fp32, readable up to the next multiple of kWidth (zeros behind the end).
template <class T>
class Reader {
 public:
  const float* at(const T* from, int64_t n) {
    load(from, buffer_, n);
    for (int64_t i = n; i % kWidth; ++i) buffer_[i] = 0.0f;
    return buffer_;
  }

 private:
  alignas(64) float buffer_[kBlock];
};
template <>
inline const float* Reader<float>::at(const float* from, int64_t n) {
  if (n % kWidth == 0) return from;
  load(from, buffer_, n);
  for (int64_t i = n; i % kWidth; ++i) buffer_[i] = 0.0f;
  return buffer_;
}

// Where a block of fp32 may be written up to the next multiple of kWidth; `done` puts n elements in their place.
template <class T>
class Writer {
 public:
  float* at(T*, int64_t) { return buffer_; }
  void done(T* to, int64_t n) { store(buffer_, to, n); }

 private:
  alignas(64) float buffer_[kBlock];
};
template <>
inline float* Writer<float>::at(float* to, int64_t n) { return n % kWidth == 0 ? to : buffer_; }
template <>
inline void Writer<float>::done(float* to, int64_t n) {
  if (n % kWidth != 0) store(buffer_, to, n);
}

template <class Call>
static void with_type(int dtype, const Call& call) {
  if (dtype == kFloat32) call(float());
  else if (dtype == kBFloat16) call(BFloat16());
  else call(Float16());
}

}  // namespace DFQ_ISA
}  // namespace dfq

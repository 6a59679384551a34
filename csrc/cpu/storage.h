// Storage types: every kernel reads and writes vectors of them, and calculates in fp32.
#pragma once
#include <stdexcept>

#include "../common/types.h"
#include "traffic.h"
#include "vector.h"

namespace dfq {
namespace DFQ_ISA {

constexpr int64_t kBlock = 1024;  // elements; a multiple of every kWidth
constexpr int64_t kBlockPastCaches = 256;  // so that loads of the next block overlap with the stores of this one

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

typedef uint32_t VecBits __attribute__((vector_size(kWidth * sizeof(uint32_t))));
typedef uint16_t VecHalves __attribute__((vector_size(kWidth * sizeof(uint16_t))));

// To nearest even, in the upper halves of the lanes; NaN stays NaN.
static inline VecBits bfloat16_bits(Vec v) {
  const VecBits bits = (VecBits)v;
  const VecBits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return (VecBits)select((VecInt)(v != v), (Vec)(VecBits{} + 0x7fc00000u), (Vec)rounded);
}
#if defined(__AVX512F__)
static inline Vec load_vec(const BFloat16* from) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
}
static inline void store_vec(BFloat16* to, Vec v) {
  const __m512i upper = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 31, 29, 27, 25, 23, 21, 19, 17,
                                         15, 13, 11, 9, 7, 5, 3, 1);
  const __m512i halves = _mm512_permutexvar_epi16(upper, (__m512i)bfloat16_bits(v));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(halves));
}
#elif defined(__AVX2__)
static inline Vec load_vec(const BFloat16* from) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
}
static inline void store_vec(BFloat16* to, Vec v) {
  const __m256i bits = (__m256i)(bfloat16_bits(v) >> 16), packed = _mm256_packus_epi32(bits, bits);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 8)));
}
#else
static inline Vec load_vec(const BFloat16* from) {
  VecHalves halves;
  std::memcpy(&halves, from, sizeof halves);
  return (Vec)(__builtin_convertvector(halves, VecBits) << 16);
}
static inline void store_vec(BFloat16* to, Vec v) {
  const VecHalves halves = __builtin_convertvector(bfloat16_bits(v) >> 16, VecHalves);
  std::memcpy(to, &halves, sizeof halves);
}
#endif

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

#if defined(__AVX512F__)
static inline Vec load_vec(const Float16* from) {
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
static inline void store_vec(Float16* to, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)v, 0));
}
#elif defined(__F16C__)
static inline Vec load_vec(const Float16* from) {
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
static inline void store_vec(Float16* to, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)v, 0));
}
#else
static inline Vec load_vec(const Float16* from) {
  Vec v;
  for (int i = 0; i < kWidth; ++i) v[i] = half_to_float(from[i].bits);
  return v;
}
static inline void store_vec(Float16* to, Vec v) {
  for (int i = 0; i < kWidth; ++i) to[i].bits = float_to_half(v[i]);
}
#endif

// One element.
static inline float to_float(float value) { return value; }
static inline float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
static inline float to_float(Float16 value) { return half_to_float(value.bits); }

// Loads of a tensor that nobody has read just now; ahead: reads_ahead().
template <class T>
DFQ_INLINE static inline Vec load_ahead(const T* from, bool ahead) {
  if (ahead) __builtin_prefetch(reinterpret_cast<const char*>(from) + kAhead);
  return load_vec(from);
}

// What is read back after v was stored as T.
template <class T>
static inline Vec stored(Vec v) {
  T values[kWidth];
  store_vec(values, v);
  return load_vec(values);
}
template <>
inline Vec stored<float>(Vec v) { return v; }
template <>
inline Vec stored<BFloat16>(Vec v) { return (Vec)(bfloat16_bits(v) & 0xffff0000u); }

// A block of n elements, readable up to the next multiple of kWidth (zeros behind the end).
template <class T>
class Reader {
 public:
  const T* at(const T* from, int64_t n) {
    if (n % kWidth == 0) return from;
    std::memset(buffer_ + n / kWidth * kWidth, 0, kWidth * sizeof(T));
    std::memcpy(buffer_, from, n * sizeof(T));
    return buffer_;
  }

 private:
  alignas(64) T buffer_[kBlock];
};

// Whether results that are computed are written past the caches: halves are not, their conversion takes longer than their
// traffic (a masked gradient converts nothing and asks past_caches itself).
template <class T>
static inline bool results_past_caches(int64_t size, int threads) {
  return sizeof(T) == sizeof(float) && past_caches(size * sizeof(T), threads);
}

// Where a block may be written up to the next multiple of kWidth; `done` puts n elements in their place.
template <class T>
class Writer {
 public:
  explicit Writer(bool past) : past_(past) {}
  T* at(T* to, int64_t n) { return n % kWidth == 0 && !past_ ? to : buffer_; }
  void done(T* to, int64_t n) {
    if (past_) copy_past_caches(to, buffer_, n * sizeof(T));
    else if (n % kWidth != 0) std::memcpy(to, buffer_, n * sizeof(T));
  }

 private:
  alignas(64) T buffer_[kBlock];
  bool past_;  // the caches
};

template <class Call>
static void with_type(int dtype, const Call& call) {
  if (dtype == kFloat32) call(float());
  else if (dtype == kBFloat16) call(BFloat16());
  else if (dtype == kFloat16) call(Float16());
  else throw std::invalid_argument("no such dtype");
}

}  // namespace DFQ_ISA
}  // namespace dfq

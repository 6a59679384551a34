// A vector of kWidth floats and the few operations that plain loops do not give: rounding, minimum and maximum that keep
// NaN, comparisons as bits. Arithmetic is the operators + - *, each rounded on its own (-ffp-contract=off).
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__SSE4_1__)
#include <immintrin.h>
#endif

#ifndef DFQ_ISA
#error "DFQ_ISA must name the namespace of this instruction-set level"
#endif

namespace dfq {
namespace DFQ_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#else
constexpr int kWidth = 8;
#endif

typedef float Vec __attribute__((vector_size(kWidth * sizeof(float))));
typedef int32_t VecInt __attribute__((vector_size(kWidth * sizeof(int32_t))));

static inline Vec load_vec(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
static inline void store_vec(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }
static inline Vec broadcast(float value) { return value - Vec{}; }  // value - 0: exact, keeps -0 and NaN

// Inner loops are compiled into the loop around them, or sums leave their registers at every vector.
#define DFQ_INLINE __attribute__((always_inline))

// All bits of a lane set or none, from a comparison of two Vecs.
static inline Vec select(VecInt mask, Vec yes, Vec no) { return mask ? yes : no; }

#if defined(__AVX512F__)
static inline Vec rne(Vec v) { return (Vec)_mm512_roundscale_ps((__m512)v, 8); }
static inline Vec max_keeping_nan(Vec v, Vec bound) { return (Vec)_mm512_max_ps((__m512)bound, (__m512)v); }
static inline Vec min_keeping_nan(Vec v, Vec bound) { return (Vec)_mm512_min_ps((__m512)bound, (__m512)v); }
static inline Vec keep_bits(uint32_t bits, Vec v) {
  return (Vec)_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), (__m512)v);
}
#elif defined(__AVX2__)
static inline Vec rne(Vec v) { return (Vec)_mm256_round_ps((__m256)v, 8); }
static inline Vec max_keeping_nan(Vec v, Vec bound) { return (Vec)_mm256_max_ps((__m256)bound, (__m256)v); }
static inline Vec min_keeping_nan(Vec v, Vec bound) { return (Vec)_mm256_min_ps((__m256)bound, (__m256)v); }
static inline Vec keep_bits(uint32_t bits, Vec v) {
  const __m256i place = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i all = _mm256_set1_epi32(static_cast<int>(bits));
  return (Vec)_mm256_and_ps((__m256)v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, place), place)));
}
#elif defined(__SSE4_1__)
struct Halves {
  __m128 low, high;
};
static inline Halves halves(Vec v) {
  Halves h;
  std::memcpy(&h, &v, sizeof v);
  return h;
}
static inline Vec join(__m128 low, __m128 high) {
  const Halves h{low, high};
  Vec v;
  std::memcpy(&v, &h, sizeof v);
  return v;
}
static inline Vec rne(Vec v) {
  const Halves h = halves(v);
  return join(_mm_round_ps(h.low, 8), _mm_round_ps(h.high, 8));
}
static inline Vec max_keeping_nan(Vec v, Vec bound) {
  const Halves a = halves(bound), b = halves(v);
  return join(_mm_max_ps(a.low, b.low), _mm_max_ps(a.high, b.high));
}
static inline Vec min_keeping_nan(Vec v, Vec bound) {
  const Halves a = halves(bound), b = halves(v);
  return join(_mm_min_ps(a.low, b.low), _mm_min_ps(a.high, b.high));
}
static inline Vec keep_bits(uint32_t bits, Vec v) {
  const __m128i all = _mm_set1_epi32(static_cast<int>(bits));
  const __m128i low = _mm_setr_epi32(1, 2, 4, 8), high = _mm_setr_epi32(16, 32, 64, 128);
  const Halves h = halves(v);
  return join(_mm_and_ps(h.low, _mm_castsi128_ps(_mm_cmpeq_epi32(_mm_and_si128(all, low), low))),
              _mm_and_ps(h.high, _mm_castsi128_ps(_mm_cmpeq_epi32(_mm_and_si128(all, high), high))));
}
#else
static inline Vec rne(Vec v) {
  for (int i = 0; i < kWidth; ++i) v[i] = __builtin_rintf(v[i]);
  return v;
}
static inline Vec max_keeping_nan(Vec v, Vec bound) { return v < bound ? bound : v; }
static inline Vec min_keeping_nan(Vec v, Vec bound) { return v > bound ? bound : v; }
static inline Vec keep_bits(uint32_t bits, Vec v) {
  for (int i = 0; i < kWidth; ++i)
    if (!(bits >> i & 1)) v[i] = 0.0f;
  return v;
}
#endif

// Which lanes a comparison holds for. above and below: also where one of the two is NaN.
#if defined(__AVX512F__)
typedef __mmask16 Mask;
static inline Mask equal(Vec a, Vec b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_EQ_OQ); }
static inline Mask above(Vec v, Vec bound) { return _mm512_cmp_ps_mask((__m512)v, (__m512)bound, _CMP_NLE_UQ); }
static inline Mask below(Vec v, Vec bound) { return _mm512_cmp_ps_mask((__m512)v, (__m512)bound, _CMP_NGE_UQ); }
static inline Vec keep(Mask mask, Vec v) { return (Vec)_mm512_maskz_mov_ps(mask, (__m512)v); }
static inline uint32_t bits_of(Mask mask) { return mask; }
#else
typedef VecInt Mask;
static inline Mask equal(Vec a, Vec b) { return a == b; }
static inline Mask above(Vec v, Vec bound) { return ~(v <= bound); }
static inline Mask below(Vec v, Vec bound) { return ~(v >= bound); }
static inline Vec keep(Mask mask, Vec v) { return (Vec)((VecInt)v & mask); }
static inline uint32_t bits_of(Mask mask) {
#if defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#elif defined(__SSE4_1__)
  const Halves h = halves((Vec)mask);
  return static_cast<uint32_t>(_mm_movemask_ps(h.low) | _mm_movemask_ps(h.high) << 4);
#else
  uint32_t bits = 0;
  for (int i = 0; i < kWidth; ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
  return bits;
#endif
}
#endif
static inline Mask both(Mask a, Mask b) { return a & b; }
static inline Mask within(Vec v, Vec low, Vec high) {  // false for NaN
#if defined(__AVX512F__)
  const Mask from = _mm512_cmp_ps_mask((__m512)v, (__m512)low, _CMP_GE_OQ);
  return _mm512_mask_cmp_ps_mask(from, (__m512)v, (__m512)high, _CMP_LE_OQ);
#else
  return (v >= low) & (v <= high);
#endif
}

static inline Vec clamp(Vec v, Vec low, Vec high) { return min_keeping_nan(max_keeping_nan(v, low), high); }

// kWidth bits at element `index` (a multiple of kWidth) of a bit mask; the first element is the lowest bit.
static inline void store_bits(uint8_t* mask, int64_t index, uint32_t bits) {
  std::memcpy(mask + index / 8, &bits, kWidth / 8);  // little-endian, as every processor that torch supports
}
static inline uint32_t load_bits(const uint8_t* mask, int64_t index) {
  uint32_t bits = 0;
  std::memcpy(&bits, mask + index / 8, kWidth / 8);
  return bits;
}

// The first `count` lanes of v, those of `rest` behind them.
static inline Vec first_lanes(Vec v, Vec rest, int64_t count) {
  VecInt index;
  for (int i = 0; i < kWidth; ++i) index[i] = i;
  return select(index < static_cast<int32_t>(count < kWidth ? count : kWidth) - VecInt{}, v, rest);
}

}  // namespace DFQ_ISA
}  // namespace dfq

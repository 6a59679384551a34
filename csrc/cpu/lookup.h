// Bytes looked up in tables of 256 bytes, and how such tables are made.
#pragma once
#include "finish.h"

namespace dfq {
namespace DFQ_ISA {
namespace {

#if defined(__AVX512F__)
#define DFQ_VBMI __attribute__((target("avx512vbmi")))

inline bool has_vbmi() {
  static const char* limit = std::getenv("DFQ_CPU");  // as in select.cpp; "v4_vbmi" comes after "v4"
  static const bool there = __builtin_cpu_supports("avx512vbmi") && (!limit || std::strcmp("v4_vbmi", limit) <= 0);
  return there;
}

// 64 bytes at once: two lookups of 128 entries, and the highest bit says which of them counts.
struct WideTable {
  __m512i parts[4];
};
DFQ_VBMI inline __m512i look_up(const WideTable& table, __m512i codes) {
  const __m512i low = _mm512_permutex2var_epi8(table.parts[0], codes, table.parts[1]);
  const __m512i high = _mm512_permutex2var_epi8(table.parts[2], codes, table.parts[3]);
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), low, high);
}

DFQ_VBMI inline void look_up_wide(const uint8_t* table, const uint8_t* from, int64_t from_step, uint8_t* to, int64_t to_step,
                                  int64_t pixels, int64_t bytes) {
  WideTable wide;
  for (int i = 0; i < 4; ++i) wide.parts[i] = _mm512_loadu_si512(table + 64 * i);
  if (bytes == 16) {  // as a tile's end has just stored them: a wider load would wait until they are in the cache
    for (int64_t p = 0; p < pixels; ++p, from += from_step, to += to_step) {
      const __m512i codes = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_castsi512_si128(look_up(wide, codes)));
    }
    return;
  }
  for (int64_t p = 0; p < pixels; ++p, from += from_step, to += to_step)
    for (int64_t i = 0; i < bytes; i += 64) {
      const __mmask64 there = bytes - i >= 64 ? ~__mmask64(0) : (__mmask64(1) << (bytes - i)) - 1;
      _mm512_mask_storeu_epi8(to + i, there, look_up(wide, _mm512_maskz_loadu_epi8(there, from + i)));
    }
}

// Of every pixel up to 64 bytes, each from where its pick says. from, steps: of every source, the first pixel and the
// bytes to the next.
DFQ_VBMI inline void pick_pixels(const Pick* first, const Pick* last, const uint8_t* const* from, const int64_t* steps,
                                 uint8_t* to, int64_t to_step, int64_t pixels) {
  uint64_t there = 0;
  for (const Pick* pick = first; pick != last; ++pick) there |= pick->there;
  for (int64_t p = 0; p < pixels; ++p, to += to_step) {
    __m512i found = _mm512_setzero_si512();
    for (const Pick* pick = first; pick != last; ++pick) {
      const __m512i bytes = _mm512_loadu_si512(from[pick->source] + p * steps[pick->source] + pick->from);
      found = _mm512_mask_permutexvar_epi8(found, pick->there, _mm512_loadu_si512(pick->codes), bytes);
    }
    _mm512_mask_storeu_epi8(to, there, found);
  }
}
#else
inline bool has_vbmi() { return false; }
inline void pick_pixels(const Pick*, const Pick*, const uint8_t* const*, const int64_t*, uint8_t*, int64_t, int64_t) {}
#endif

// `bytes` bytes of every pixel.
inline void look_up_pixels(const uint8_t* table, const uint8_t* from, int64_t from_step, uint8_t* to, int64_t to_step,
                           int64_t pixels, int64_t bytes) {
  if (from_step == bytes && to_step == bytes) bytes *= pixels, pixels = 1;
#if defined(__AVX512F__)
  if (has_vbmi()) return look_up_wide(table, from, from_step, to, to_step, pixels, bytes);
#endif
  for (int64_t p = 0; p < pixels; ++p, from += from_step, to += to_step)
    for (int64_t i = 0; i < bytes; ++i) to[i] = table[from[i]];
}

// Of every result of a step `count` tables; values: t of every code. Activation and rounding are those of all steps.
inline void add_tables(const Program& program, Step& s, const float* values, int64_t count) {
  for (int out : s.outs) {
    const Sink sink(program.planes[out], nullptr, s);
    for (int64_t code = 0; code < count * kCodes; code += kWidth) {
      Vec t = load_vec(values + code);
      if (bends(s.activation)) t = bend(s, t);
      const Bytes bytes = sink.stored(sink.round(t));
      for (int i = 0; i < kWidth; ++i) s.tables.push_back(bytes[i]);
    }
  }
}

}  // namespace
}  // namespace DFQ_ISA
}  // namespace dfq

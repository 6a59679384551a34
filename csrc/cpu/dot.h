// Tiles of integer products: `pixels` x 16 `blocks` accumulators in registers, one broadcast of a pixel's channels
// against vectors of 16 output channels.
//
// kGroup channels are multiplied at once: 4 with VNNI (unsigned x signed bytes, no saturation), else 2 as 16-bit pairs.
// Weights: [kernel position][channel group][16 output channels][kGroup], so that every load is one vector.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "vector.h"

namespace dfq {
namespace DFQ_ISA {

constexpr int kLanes = 16;  // output channels of one block

// Where a tile reads: kernel rows and columns in bytes, channels in groups.
struct Taps {
  int32_t rows, columns, groups;
  int64_t row_bytes, column_bytes, pixel_bytes;
};

// Where a depthwise row reads: dilated kernel rows in bytes; stride and dilation in columns of `column_bytes`.
struct RowTaps {
  int32_t rows, columns;
  int64_t row_bytes, column_bytes, stride, dilation;

  int64_t columns_of(int64_t count) const { return (count - 1) * stride + (columns - 1) * dilation + 1; }
};

#if defined(__AVX512F__)
#define DFQ_VNNI __attribute__((target("avx512vnni")))

static inline bool has_vnni() {
  static const char* limit = std::getenv("DFQ_CPU");  // as in select.cpp; "v4_vnni" comes after "v4"
  static const bool there = __builtin_cpu_supports("avx512vnni") && (!limit || std::strcmp("v4_vnni", limit) <= 0);
  return there;
}

// An address as the compiler does not know it: it would keep one register for each pixel of a tile, more than there are.
static inline const uint8_t* apart(const uint8_t* from) {
  asm("" : "+r"(from));
  return from;
}

template <int kPixels, int kBlocks>
DFQ_VNNI static void dot4(const uint8_t* x, const Taps& taps, const uint8_t* weight, int64_t block_bytes,
                          const int32_t* start, int32_t* acc) {
  constexpr int kBases = (kPixels + 3) / 4;
  __m512i sum[kPixels][kBlocks];
#pragma GCC unroll 4
  for (int b = 0; b < kBlocks; ++b) {
    const __m512i first = _mm512_loadu_si512(start + b * kLanes);
#pragma GCC unroll 16
    for (int p = 0; p < kPixels; ++p) sum[p][b] = first;
  }
  const int64_t pixel = taps.pixel_bytes;
  const int32_t groups = taps.groups, columns = taps.columns, rows = taps.rows;
  const int64_t column_bytes = taps.column_bytes, row_bytes = taps.row_bytes;
  for (int r = 0; r < rows; ++r, x += row_bytes) {
    const uint8_t* tap = x;
    for (int s = 0; s < columns; ++s, tap += column_bytes) {
      const uint8_t* from[kBases];
#pragma GCC unroll 4
      for (int i = 0; i < kBases; ++i) from[i] = apart(tap + 4 * i * pixel);
      for (int64_t g = 0; g < groups; ++g, weight += 64) {
        __m512i w[kBlocks];
#pragma GCC unroll 4
        for (int b = 0; b < kBlocks; ++b) w[b] = _mm512_loadu_si512(weight + b * block_bytes);
#pragma GCC unroll 16
        for (int p = 0; p < kPixels; ++p) {
          int32_t four;
          std::memcpy(&four, from[p / 4] + p % 4 * pixel, 4);
          const __m512i a = _mm512_set1_epi32(four);
#pragma GCC unroll 4
          for (int b = 0; b < kBlocks; ++b) sum[p][b] = _mm512_dpbusd_epi32(sum[p][b], a, w[b]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < kBases; ++i) from[i] += 4;
      }
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < kPixels; ++p)
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) _mm512_storeu_si512(acc + (p * kBlocks + b) * kLanes, sum[p][b]);
}

// One row of a depthwise convolution for 16 channels. Four kernel rows of one column lie in the bytes of each lane, so a
// column is put together once and multiplied by every kernel column that meets it.
// weight: [ceil(rows / 4)][columns][16][4]; acc: [count][16]; scratch: 64 bytes for each input column
DFQ_VNNI static void depthwise4(const uint8_t* x, const RowTaps& taps, const int8_t* weight, const int32_t* start,
                                int64_t count, int32_t* acc, uint8_t* scratch) {
  const int64_t columns = taps.columns_of(count);
  for (int first = 0; first < taps.rows; first += 4, weight += taps.columns * 64) {
    const int rows = taps.rows - first < 4 ? taps.rows - first : 4;
    for (int64_t column = 0; column < columns; ++column) {
      const uint8_t* from = x + first * taps.row_bytes + column * taps.column_bytes;
      __m512i four = _mm512_setzero_si512();
      for (int r = 0; r < rows; ++r) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + r * taps.row_bytes));
        four = _mm512_or_si512(four, _mm512_slli_epi32(_mm512_cvtepu8_epi32(bytes), static_cast<unsigned>(8 * r)));
      }
      _mm512_storeu_si512(scratch + column * 64, four);
    }
    for (int64_t p = 0; p < count; ++p) {
      __m512i sum = _mm512_loadu_si512(first ? acc + p * kLanes : start);
      for (int k = 0; k < taps.columns; ++k)
        sum = _mm512_dpbusd_epi32(sum, _mm512_loadu_si512(scratch + (p * taps.stride + k * taps.dilation) * 64),
                                  _mm512_loadu_si512(weight + k * 64));
      _mm512_storeu_si512(acc + p * kLanes, sum);
    }
  }
}

// The bytes of up to four rows in the lanes of 16 channels.
template <int kRows>
DFQ_VNNI static inline __m512i rows_in_lanes(const uint8_t* from, int64_t row_bytes) {
  const auto row = [&](int r) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + r * row_bytes)); };
  if (kRows == 1) return _mm512_cvtepu8_epi32(row(0));
  __m512i rows = _mm512_inserti32x4(_mm512_zextsi128_si512(row(0)), row(1), 1);
  if (kRows > 2) rows = _mm512_inserti32x4(rows, row(2), 2);
  if (kRows > 3) rows = _mm512_inserti32x4(rows, row(3), 3);
  const __m512i fours = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m128i places = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_shuffle_epi8(_mm512_permutexvar_epi32(fours, rows), _mm512_broadcast_i32x4(places));
}

// depthwise4 of a square kernel, whose weights stay in registers; columns of all its rows lie together in `scratch`.
template <int kSize>
DFQ_VNNI static void depthwise_square(const uint8_t* x, const RowTaps& taps, const int8_t* weight, const int32_t* start,
                                      int64_t count, int32_t* acc, uint8_t* scratch) {
  constexpr int kFours = (kSize + 3) / 4, kLast = kSize - 4 * (kFours - 1), kColumn = kFours * 64;
  const int64_t columns = taps.columns_of(count), row_bytes = taps.row_bytes;
  for (int64_t column = 0; column < columns; ++column, x += taps.column_bytes) {
    uint8_t* const to = scratch + column * kColumn;
    if (kFours == 2) _mm512_storeu_si512(to, rows_in_lanes<4>(x, row_bytes));
    _mm512_storeu_si512(to + kColumn - 64, rows_in_lanes<kLast>(x + (kSize - kLast) * row_bytes, row_bytes));
  }
  __m512i w[kFours][kSize];
  for (int f = 0; f < kFours; ++f)
    for (int k = 0; k < kSize; ++k) w[f][k] = _mm512_loadu_si512(weight + (f * kSize + k) * 64);
  const __m512i first = _mm512_loadu_si512(start);
  const int64_t step = taps.stride * kColumn, apart = taps.dilation * kColumn;
  for (int64_t p = 0; p < count; ++p, scratch += step) {
    __m512i sum = first, second = _mm512_setzero_si512();  // two, so that products wait for fewer
    for (int k = 0; k < kSize; ++k) {
      sum = _mm512_dpbusd_epi32(sum, _mm512_loadu_si512(scratch + k * apart), w[0][k]);
      if (kFours == 2) second = _mm512_dpbusd_epi32(second, _mm512_loadu_si512(scratch + k * apart + 64), w[kFours - 1][k]);
    }
    _mm512_storeu_si512(acc + p * kLanes, kFours == 2 ? _mm512_add_epi32(sum, second) : sum);
  }
}

using Depthwise = void (*)(const uint8_t*, const RowTaps&, const int8_t*, const int32_t*, int64_t, int32_t*, uint8_t*);
constexpr int64_t kDepthwiseScratch = 128;  // bytes of a column at most

static inline Depthwise depthwise_of(const RowTaps& taps) {
  if (taps.rows != taps.columns) return depthwise4;
  switch (taps.rows) {
    case 3: return depthwise_square<3>;
    case 5: return depthwise_square<5>;
    case 7: return depthwise_square<7>;
    default: return depthwise4;
  }
}
#else
static inline bool has_vnni() { return false; }
#endif

// Two channels at once in 16 bits: |u8 * s8| sums of two fit 32 bits.
#if defined(__AVX512F__)
typedef __m512i Pairs;
static inline Pairs load_pairs(const void* from) { return _mm512_loadu_si512(from); }
static inline Pairs same_pair(int32_t pair) { return _mm512_set1_epi32(pair); }
static inline Pairs add_products(Pairs sum, Pairs a, Pairs b) { return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b)); }
static inline void store_pairs(void* to, Pairs v) { _mm512_storeu_si512(to, v); }
#elif defined(__AVX2__)
typedef __m256i Pairs;
static inline Pairs load_pairs(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
static inline Pairs same_pair(int32_t pair) { return _mm256_set1_epi32(pair); }
static inline Pairs add_products(Pairs sum, Pairs a, Pairs b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
static inline void store_pairs(void* to, Pairs v) { _mm256_storeu_si256(static_cast<__m256i*>(to), v); }
#else
struct Pairs {
  int32_t lanes[4];
};
static inline Pairs load_pairs(const void* from) {
  Pairs v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
static inline Pairs same_pair(int32_t pair) { return {{pair, pair, pair, pair}}; }
static inline Pairs add_products(Pairs sum, Pairs a, Pairs b) {
  for (int i = 0; i < 4; ++i) {
    const int32_t low = int16_t(a.lanes[i]) * int32_t(int16_t(b.lanes[i]));
    sum.lanes[i] += low + (a.lanes[i] >> 16) * (b.lanes[i] >> 16);
  }
  return sum;
}
static inline void store_pairs(void* to, Pairs v) { std::memcpy(to, &v, sizeof v); }
#endif
constexpr int kVectors = kLanes * 4 / static_cast<int>(sizeof(Pairs));  // of one block

template <int kPixels, int kBlocks>
static void dot2(const uint8_t* x, const Taps& taps, const uint8_t* weight, int64_t block_bytes, const int32_t* start,
                 int32_t* acc) {
  Pairs sum[kPixels][kBlocks * kVectors];
  constexpr int kLoad = kLanes / kVectors;  // accumulators of a vector
  for (int p = 0; p < kPixels; ++p)
    for (int v = 0; v < kBlocks * kVectors; ++v) sum[p][v] = load_pairs(start + v * kLoad);
  for (int r = 0; r < taps.rows; ++r)
    for (int s = 0; s < taps.columns; ++s) {
      const uint8_t* from = x + r * taps.row_bytes + s * taps.column_bytes;
      for (int g = 0; g < taps.groups; ++g, from += 2, weight += 64) {
        Pairs w[kBlocks * kVectors];
        for (int v = 0; v < kBlocks * kVectors; ++v)
          w[v] = load_pairs(weight + v / kVectors * block_bytes + v % kVectors * sizeof(Pairs));
        for (int p = 0; p < kPixels; ++p) {
          const uint8_t* pixel = from + p * taps.pixel_bytes;
          const Pairs a = same_pair(pixel[0] | pixel[1] << 16);
          for (int v = 0; v < kBlocks * kVectors; ++v) sum[p][v] = add_products(sum[p][v], a, w[v]);
        }
      }
    }
  for (int p = 0; p < kPixels; ++p)
    for (int v = 0; v < kBlocks * kVectors; ++v) store_pairs(acc + p * kBlocks * kLanes + v * kLoad, sum[p][v]);
}

using Dot = void (*)(const uint8_t*, const Taps&, const uint8_t*, int64_t, const int32_t*, int32_t*);

}  // namespace DFQ_ISA
}  // namespace dfq
